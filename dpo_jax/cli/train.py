"""`dpo-jax train METHOD`: from rows to an aligned Hugging Face checkpoint, resumable at any step."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from dpo_jax.cli.adapters import Adapted, adapted_model, frozen_part, write_model
from dpo_jax.cli.annotate import annotate
from dpo_jax.cli.catalogue import Method, initial_loss_state
from dpo_jax.cli.checks import check_loss_options, check_options, mesh_of
from dpo_jax.cli.configs import config_record
from dpo_jax.cli.console import UsageError, say
from dpo_jax.cli.data import Prepared, check_columns, prepare, wanted_by
from dpo_jax.cli.job import Job, hyper_parameters, keep_config, run_job, summarise
from dpo_jax.cli.loop import with_tokens
from dpo_jax.cli.models import open_model
from dpo_jax.cli.processes import is_first, join_processes
from dpo_jax.language.data.batches import batches, epoch_batches
from dpo_jax.language.models.decoder import RULES
from dpo_jax.language.objectives import from_loss, needs_reference
from dpo_jax.sharding import data_shards
from dpo_jax.train import (
    TrainState,
)
from dpo_jax.tree import combine
from dpo_jax.types import Array, PyTree


def train(method: Method, config: Any) -> None:
    """Run or continue a training run.

    Args:
      method: the loss to train.
      config: an instance of `configs.train_config_class(method)`.

    Raises:
      UsageError: options that do not fit each other, the method or an earlier run in the same folder.
    """
    check_options(method, config)
    if config.mesh.distributed:
        join_processes()
    check_loss_options(method, config)
    out = Path(config.loop.out)
    record = config_record("train", method.slug, config)
    mesh = mesh_of(config.mesh)
    keep_config(out, record)
    model = open_model(config.model.model, config.model, reward=method.reward)
    if config.model.router_loss and not model.config.experts:
        raise UsageError(f"--router-loss is for mixtures of experts, and {config.model.model} is none; leave it out")
    adapted = adapted_model(model, config.adapters)
    wanted = wanted_by(method.loss)
    multiple = data_shards(mesh) * config.loop.microbatches
    data = prepare(config, wanted, model.tokenizer, out, row_multiple=multiple)
    data = annotate(data, wanted, config, mesh, out)
    check_columns(method.slug, wanted, data.train[0].columns)
    outcome, resumed = run_job(job_of(method, config, mesh, adapted, data, out), config, mesh, record, out)
    if is_first():
        more = {"tokens_per_second": outcome.tokens_per_second, "fill_rate": data.fill_rate}
        speed = f"{outcome.tokens_per_second:.0f} tokens/s, fill rate {data.fill_rate:.3f}"
        summarise(method.slug, config, out, outcome, resumed, more, speed)


def job_of(method: Method, config: Any, mesh: Mesh, adapted: Adapted, data: Prepared, out: Path) -> Job:
    """The run that the options ask for."""
    model = adapted.model
    adapters = adapted.rslora is not None

    def variables(mesh: Mesh, key: Array) -> PyTree:
        return adapted.complete(model.load(mesh), key)

    def other_reference(mesh: Mesh) -> PyTree:
        opened = open_model(config.model.reference_model, config.model)
        if opened.config != model.config:
            raise UsageError(
                f"{config.model.reference_model} has another shape or vocabulary than {config.model.model}; "
                "--reference columns takes a reference of another shape"
            )
        return opened.load(mesh)

    place = {"host": jax.process_index(), "hosts": jax.process_count(), "padded": config.data.layout == "padded"}

    def stream(step: int) -> Iterator[tuple[Any, int]]:
        size, seed = config.loop.batch_size, config.loop.seed
        return with_tokens(batches(data.train, data.layout, batch_size=size, seed=seed, start_step=step, **place))

    def held_out() -> Iterator[Any]:
        assert data.held_out_layout is not None
        stream = epoch_batches(data.held_out, data.held_out_layout, batch_size=config.loop.batch_size, **place)
        return (stream[number] for number in range(len(stream)))

    return Job(
        slug=method.slug,
        objective=from_loss(method.loss, frozen_head=adapters, **hyper_parameters(config)),
        apply_fn=model.apply_fn,
        rules=RULES,
        abstract=adapted.abstract,
        trainable=adapted.trainable,
        variables=variables,
        frozen_part=(lambda variables: frozen_part(adapted, variables)) if adapters else None,
        fingerprint=model.fingerprint(),
        reference=needs_reference(method.loss, tuple(data.train[0].columns)),
        other_reference=other_reference if config.model.reference_model is not None else None,
        loss_state=initial_loss_state(method),
        steps=data.steps,
        stream=stream,
        held_out=held_out if data.held_out else None,
        export=lambda state: export_state(state, adapted, out, base=config.model.model),
    )


def export_state(state: TrainState, adapted: Adapted, out: Path, *, base: str) -> None:
    """Write the policy (its moving average if there is one) as a Hugging Face folder, and its adapters alone."""
    params = state.params if state.ema is None else state.ema
    write_model(adapted, combine(params, state.frozen), out / "export", out / "adapter", base=base)
    say(f"exported to {out / 'export'}")

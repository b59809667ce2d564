"""`dpo-jax train METHOD` for diffusion models: from rows of images to an aligned diffusers folder, resumable."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dpo_jax.cli.catalogue import Method, initial_loss_state
from dpo_jax.cli.checks import check_adapter_course, check_course, check_optimizer, check_ranges, mesh_of, option
from dpo_jax.cli.configs import config_record
from dpo_jax.cli.console import UsageError, say
from dpo_jax.cli.image_adapters import AdaptedPipeline, adapted_pipeline, frozen_part, write_pipeline
from dpo_jax.cli.image_configs import ImageAdapterConfig
from dpo_jax.cli.image_data import PreparedImages, prepare_images
from dpo_jax.cli.image_models import open_images
from dpo_jax.cli.image_texts import condition_of
from dpo_jax.cli.job import Job, hyper_parameters, keep_config, run_job, summarise
from dpo_jax.cli.processes import is_first, join_processes
from dpo_jax.diffusion.data.batches import batches, epoch_batches
from dpo_jax.diffusion.objectives import from_loss, needs_reference, origin
from dpo_jax.sharding import data_shards
from dpo_jax.signatures import read_needs
from dpo_jax.train import TrainState
from dpo_jax.tree import combine
from dpo_jax.types import Array, PyTree


def train_images(method: Method, config: Any) -> None:
    """Run or continue a training run.

    Args:
      method: the loss to train, of the diffusion wing.
      config: an instance of `image_configs.image_train_config_class(method)`.

    Raises:
      UsageError: options that do not fit each other, the method or an earlier run in the same folder.
    """
    check_image_options(method, config)
    if config.mesh.distributed:
        join_processes()
    check_loss_options(method, config)
    out = Path(config.loop.out)
    record = config_record("train", method.slug, config)
    mesh = mesh_of(config.mesh)
    multiple = data_shards(mesh) * config.loop.microbatches
    if config.loop.batch_size % multiple:
        raise UsageError(
            f"--batch-size {config.loop.batch_size} does not fall evenly on {data_shards(mesh)} batch shards and "
            f"{config.loop.microbatches} microbatches; give a multiple of {multiple}"
        )
    keep_config(out, record)
    model = open_images(config.model.model, config.model)
    adapted = adapted_pipeline(model, config.adapters)
    data = prepare_images(config, method, model, mesh, out)
    job = job_of(method, config, adapted, data, out)
    outcome, resumed = run_job(job, config, mesh, record, out)
    if is_first():
        rate = outcome.tokens_per_second
        summarise(method.slug, config, out, outcome, resumed, {"images_per_second": rate}, f"{rate:.2f} images/s")


def check_image_options(method: Method, config: Any) -> None:
    """Raise UsageError for what is missing or out of range, and for options that would have no effect."""
    if method.online:
        raise UsageError(
            f"{method.slug} learns from samples of its own policy, which are judged as it goes on: it has no data to "
            f"train on; `{method.module.__name__}` has its parts for a loop of one's own"
        )
    given = (("model", config.model.model), ("data", config.data.data), ("out", config.loop.out))
    if missing := [option(name) for name, value in given if not value]:
        raise UsageError(f"train {method.slug} needs {', '.join(missing)}")
    for part in (config.model, config.adapters, config.data, config.loop, config.optimizer):
        check_ranges(part)
    check_optimizer(config.optimizer)
    check_course(config.data, config.loop)
    names = {
        "--reference-model": config.model.reference_model is not None,
        "--reference-update-every": config.loop.reference_update_every > 0,
    }
    if (idle := [name for name, used in names.items() if used]) and not method.reference:
        raise UsageError(f"{', '.join(idle)} has no effect: {method.slug} reads no reference")
    usual, chosen = ImageAdapterConfig(), config.adapters
    changed = [
        option(name)
        for name in ("lora_alpha", "lora_targets", "rslora", "dora")
        if getattr(chosen, name) != getattr(usual, name)
    ]
    if changed and not chosen.lora_rank:
        raise UsageError(f"{', '.join(changed)} has no effect without --lora-rank")
    if not chosen.lora_rank:
        return
    check_adapter_course(config.loop, config.optimizer)
    if config.model.reference_model is not None:
        raise UsageError(
            "--reference-model needs a second frozen base beside that of the adapters; leave it out: the base is then "
            "the reference"
        )


def check_loss_options(method: Method, config: Any) -> None:
    """Raise UsageError if the loss refuses its hyper-parameters, before data and weights are read.

    The loss is traced on one row; one that reads columns, whose shapes are not known yet, is left for the first step.
    """
    needs = read_needs(method.loss)
    if any(origin(name).maker == "column" for name in needs.arrays):
        return
    axes = {"error_map": 2, "frame_error": 1, "pred": 3, "target": 3}
    arrays = {}
    for name in needs.arrays:
        source = origin(name)
        images = (source.side is None and source.maker in ("policy", "reference")) or name == "valid"
        arrays[name] = jnp.ones((1,) * (1 + images + axes.get(source.statistic, 0)))
    hyper = {name: value for name, value in hyper_parameters(config).items() if name in needs.hyper}
    special = {"loss_state": initial_loss_state(method)} if needs.state else {}
    special |= {"key": jax.random.key(0)} if needs.key else {}
    try:
        jax.eval_shape(partial(method.loss, **hyper), **arrays, **special)
    except ValueError as error:
        raise UsageError(f"{method.slug}: {error}") from error


def job_of(method: Method, config: Any, adapted: AdaptedPipeline, data: PreparedImages, out: Path) -> Job:
    """The run that the options ask for."""
    model, loop = adapted.model, config.loop
    place = {"host": jax.process_index(), "hosts": jax.process_count()}
    process = replace(model.process, empty=condition_of(data.cache[data.no_text], model))
    objective = from_loss(
        method.loss,
        process,
        inputs=method.inputs,
        offset_noise=config.data.offset_noise,
        **hyper_parameters(config),
    )

    def stream(step: int) -> Iterator[tuple[Any, int]]:
        endless = batches(
            data.train,
            data.cache,
            batch_size=loop.batch_size,
            seed=loop.seed,
            start_step=step,
            caption_dropout=config.data.caption_dropout,
            empty=data.empty,
            **place,
        )
        return ((batch, int(batch.weight.sum()) * batch.latents.shape[1]) for batch in endless)

    def held_out() -> Iterator[Any]:
        return epoch_batches(data.held_out, data.cache, batch_size=loop.batch_size, **place)

    def variables(mesh: Mesh, key: Array) -> PyTree:
        return adapted.complete(model.load(mesh), key)

    def other_reference(mesh: Mesh) -> PyTree:
        opened = open_images(config.model.reference_model, config.model)
        if opened.config != model.config:
            raise UsageError(f"{config.model.reference_model} has another shape than {config.model.model}")
        return opened.load(mesh)

    return Job(
        slug=method.slug,
        objective=objective,
        apply_fn=adapted.apply_fn,
        rules=model.rules,
        abstract=adapted.abstract,
        trainable=adapted.trainable,
        variables=variables,
        frozen_part=(lambda variables: frozen_part(adapted, variables)) if adapted.holds_frozen else None,
        fingerprint=model.fingerprint(),
        reference=needs_reference(method.loss, method.inputs),
        other_reference=other_reference if config.model.reference_model is not None else None,
        loss_state=initial_loss_state(method),
        steps=data.steps,
        stream=stream,
        held_out=held_out if data.held_out else None,
        export=lambda state: export_state(state, adapted, out),
        unit="images",
        start_noise=start_noise_of(method, config),
    )


def start_noise_of(method: Method, config: Any) -> float:
    """Noise that the policy starts with: as given, or what the method needs unless its reference is another model."""
    if config.model.start_noise is not None:
        return config.model.start_noise
    return method.start_noise if config.model.reference_model is None else 0.0


def export_state(state: TrainState, adapted: AdaptedPipeline, out: Path) -> None:
    """Write the policy (its moving average if there is one) as a diffusers folder, and its adapters alone."""
    params = state.params if state.ema is None else state.ema
    write_pipeline(adapted, combine(params, state.frozen), out / "export", out / "adapter")
    say(f"exported to {out / 'export'}")

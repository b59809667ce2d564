"""`dpo-jax train METHOD` for diffusion models: from rows of images to an aligned diffusers folder, resumable."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from dpo_jax.cli.catalogue import Method, initial_loss_state
from dpo_jax.cli.checks import mesh_of
from dpo_jax.cli.configs import config_record
from dpo_jax.cli.console import UsageError, say
from dpo_jax.cli.images.adapters import AdaptedPipeline, adapted_pipeline, frozen_part, write_pipeline
from dpo_jax.cli.images.checks import check_image_options, check_objective
from dpo_jax.cli.images.data import PreparedImages, prepare_images
from dpo_jax.cli.images.models import OpenPipeline, open_images, require_alike
from dpo_jax.cli.images.texts import condition_of
from dpo_jax.cli.job import Job, hyper_parameters, keep_config, run_job, summarise
from dpo_jax.cli.processes import is_first, join_processes
from dpo_jax.diffusion.data.batches import batches, epoch_batches
from dpo_jax.diffusion.objectives import from_loss, needs_reference
from dpo_jax.sharding import data_shards
from dpo_jax.train import TrainState
from dpo_jax.tree import combine
from dpo_jax.types import Array, PyTree


def train_images(method: Method, config: Any) -> None:
    """Run or continue a training run.

    Args:
      method: the loss to train, of the diffusion wing.
      config: an instance of `images.configs.image_train_config_class(method)`.

    Raises:
      UsageError: options that do not fit each other, the method or an earlier run in the same folder.
    """
    check_image_options(method, config)
    if config.mesh.distributed:
        join_processes()
    out = Path(config.loop.out)
    record = config_record("train", method.slug, config)
    mesh = mesh_of(config.mesh)
    multiple = data_shards(mesh) * config.loop.microbatches
    if config.loop.batch_size % multiple:
        raise UsageError(
            f"--batch-size {config.loop.batch_size} does not fall evenly on {data_shards(mesh)} batch shards and "
            f"{config.loop.microbatches} microbatches; give a multiple of {multiple}"
        )
    model = open_images(config.model.model, config.model)
    reference = open_reference(config, model)
    if not method.columns:
        check_objective(method, config, model.process)
    keep_config(out, record)
    adapted = adapted_pipeline(model, config.adapters)
    data = prepare_images(config, method, model, mesh, out)
    job = job_of(method, config, adapted, data, out, reference)
    outcome, resumed = run_job(job, config, mesh, record, out)
    if is_first():
        rate = outcome.tokens_per_second
        summarise(method.slug, config, out, outcome, resumed, {"images_per_second": rate}, f"{rate:.2f} images/s")


def open_reference(config: Any, model: OpenPipeline) -> OpenPipeline | None:
    """The reference that --reference-model names; UsageError if it cannot stand beside the model."""
    if config.model.reference_model is None:
        return None
    reference = open_images(config.model.reference_model, config.model)
    require_alike(model, reference)
    return reference


def job_of(
    method: Method,
    config: Any,
    adapted: AdaptedPipeline,
    data: PreparedImages,
    out: Path,
    reference: OpenPipeline | None,
) -> Job:
    """The run that the options ask for.

    Args:
      reference: another one than the policy at the start, or None.
    """
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
        other_reference=None if reference is None else reference.load,
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

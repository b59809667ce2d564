"""What a training command refuses before any work is done: options that are missing, out of range or without effect."""

import math
from dataclasses import asdict, fields
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dpo_jax.cli.catalogue import Method, initial_loss_state
from dpo_jax.cli.configs import AdapterConfig, DataConfig, LoopConfig, MeshConfig
from dpo_jax.cli.console import UsageError
from dpo_jax.cli.data import wanted_by
from dpo_jax.language.data.columns import sources_of
from dpo_jax.language.objectives import column_names, origin
from dpo_jax.optimizers import OptimizerConfig
from dpo_jax.sharding import make_mesh
from dpo_jax.signatures import read_needs

# Options that an algorithm does not read: given together with it they would be silently ignored.
_UNREAD = {
    "adafactor": ("b1", "b2", "epsilon"),
    "lion": ("epsilon",),
    "muon": ("epsilon",),
    "sgd": ("b2", "epsilon"),
    "adamw": (),
}
# Name -> (lowest, highest) of the numbers that an option takes; both belong to the range.
_RANGES = {
    "held_out": (0, float("inf")),
    "max_length": (2, float("inf")),
    "max_prompt_length": (1, float("inf")),
    "steps": (1, float("inf")),
    "batch_size": (1, float("inf")),
    "microbatches": (1, float("inf")),
    "seed": (0, 2**32 - 1),
    "log_every": (1, float("inf")),
    "eval_every": (0, float("inf")),
    "save_every": (0, float("inf")),
    "keep": (1, float("inf")),
    "reference_update_every": (0, float("inf")),
    "reference_update_rate": (0, 1),
    "lora_rank": (0, float("inf")),
    "router_loss": (0, float("inf")),
    "warmup": (0, float("inf")),
    "final_learning_rate": (0, 1),
    "weight_decay": (0, float("inf")),
    "clip": (0, float("inf")),
    "mesh_slices": (1, float("inf")),
    "caption_dropout": (0, 1),
    "offset_noise": (0, float("inf")),
    "resolution": (1, float("inf")),
    "encode_batch": (1, float("inf")),
    "max_pixels": (1, float("inf")),
    "samples": (1, float("inf")),
    "sampling_steps": (1, float("inf")),
    "guidance": (0, float("inf")),
    "guidance_rescale": (0, 1),
    "eta": (0, 1),
    "trajectory_steps": (1, float("inf")),
    "inversion_steps": (1, float("inf")),
    "rollout_steps": (1, float("inf")),
    "grid": (1, float("inf")),
    "calls": (1, float("inf")),
    "height": (1, float("inf")),
    "start_noise": (0, 1),
    "width": (1, float("inf")),
}
# Name -> (low, high) of numbers that lie strictly between.
_OPEN_RANGES = {
    "epochs": (0, float("inf")),
    "ema_decay": (0, 1),
    "lora_alpha": (0, float("inf")),
    "learning_rate": (0, float("inf")),
    "epsilon": (0, float("inf")),
    "b1": (-1e-30, 1),
    "b2": (-1e-30, 1),
}


def option(name: str) -> str:
    """A field's name as it is typed."""
    return "--" + name.replace("_", "-")


def check_options(method: Method, config: Any) -> None:
    """Raise UsageError for what is missing or out of range, and for options that would have no effect."""
    missing = [
        option(name)
        for name, value in (("model", config.model.model), ("data", config.data.data), ("out", config.loop.out))
        if not value
    ]
    if missing:
        raise UsageError(f"train {method.slug} needs {', '.join(missing)}")
    for part in (config.model, config.adapters, config.data, config.loop, config.optimizer):
        check_ranges(part)
    check_optimizer(config.optimizer)
    check_course(config.data, config.loop)
    _check_lengths(config.data)
    _check_reference(method, config)
    _check_adapters(config)
    _check_frozen(method, config)


def _check_frozen(method: Method, config: Any) -> None:
    """Raise UsageError for a frozen model or a way to read rows that the method has no use for."""
    columns = wanted_by(method.loss).columns
    uses = {
        "--guidance-model": (config.frozen.guidance_model, "guidance_logps" in columns),
        "--positive-model": (config.frozen.positive_model, "contrastive_logps" in columns),
        "--negative-model": (config.frozen.negative_model, "contrastive_logps" in columns),
        "--embedding-model": (
            config.frozen.embedding_model,
            "semantic_distance" in columns or "step_similarity" in columns,
        ),
        "--reward-model": (config.frozen.reward_model, any("score" in n for c in columns for n in sources_of(c))),
        "--step-delimiter": (config.data.step_delimiter, "step_ids" in columns),
        "--revision-instruction": (
            config.data.revision_instruction != DataConfig.revision_instruction,
            method.form == "revisions",
        ),
    }
    if idle := [name for name, (given, used) in uses.items() if given and not used]:
        raise UsageError(f"{', '.join(idle)} has no effect: {method.slug} reads nothing that comes from it")
    if bool(config.frozen.positive_model) != bool(config.frozen.negative_model):
        raise UsageError("--positive-model and --negative-model are given together or not at all")
    if config.data.step_delimiter == "":
        raise UsageError("--step-delimiter is empty; give the text that ends a step")


def check_ranges(part: Any) -> None:
    """Raise UsageError if a number of a part of a config lies outside its range; nan lies outside all of them."""
    for name, value in asdict(part).items():
        if value is None:
            continue
        if name in _RANGES and not _RANGES[name][0] <= value <= _RANGES[name][1]:
            raise UsageError(f"{option(name)} is {value}; give {_words(*_RANGES[name])}")
        if isinstance(value, float) and math.isnan(value):
            raise UsageError(f"{option(name)} is nan; give a number")
        if name in _OPEN_RANGES and not _OPEN_RANGES[name][0] < value < _OPEN_RANGES[name][1]:
            raise UsageError(f"{option(name)} is {value}; give a number {_between(*_OPEN_RANGES[name])}")


def _words(low: float, high: float) -> str:
    return f"at least {low:g}" if high == float("inf") else f"a number from {low:g} to {high:g}"


def _between(low: float, high: float) -> str:
    if high == float("inf"):
        return f"above {low:g}"
    return f"between {low:g} and {high:g}" if low == 0 else f"from 0 to below {high:g}"


def check_optimizer(chosen: OptimizerConfig) -> None:
    """Raise UsageError for options that the algorithm does not read."""
    defaults = OptimizerConfig()
    for name in _UNREAD[chosen.optimizer]:
        if getattr(chosen, name) != getattr(defaults, name):
            raise UsageError(f"{option(name)} has no effect with --optimizer {chosen.optimizer}")
    if chosen.schedule == "constant" and chosen.final_learning_rate:
        raise UsageError("--final-learning-rate has no effect with --schedule constant")


def check_course(data: Any, loop: LoopConfig) -> None:
    """Raise UsageError for options of the loop and of held-out rows that have no effect; `data` is of either wing."""
    without_effect = {
        "--epochs has no effect with --steps": loop.steps is not None and loop.epochs != LoopConfig.epochs,
        "--held-out has no effect with --eval-data": bool(data.eval_data) and data.held_out != type(data).held_out,
        "--eval-every has no effect with --held-out 0": (
            not data.eval_data and not data.held_out and loop.eval_every != LoopConfig.eval_every
        ),
        "--reference-update-rate has no effect without --reference-update-every": (
            loop.reference_update_rate != LoopConfig.reference_update_rate and not loop.reference_update_every
        ),
    }
    for sentence, given in without_effect.items():
        if given:
            raise UsageError(sentence)


def _check_lengths(data: DataConfig) -> None:
    if data.truncation == "drop" and data.max_prompt_length is not None:
        raise UsageError("--max-prompt-length has no effect with --truncation drop")
    if data.max_prompt_length is not None and data.max_prompt_length >= data.max_length:
        raise UsageError(
            f"--max-prompt-length is {data.max_prompt_length} and --max-length {data.max_length}; "
            "leave a completion at least one token"
        )


def _check_reference(method: Method, config: Any) -> None:
    options = {
        "--reference-model": config.model.reference_model is not None,
        "--reference columns": config.model.reference == "columns",
        "--reference-update-every": config.loop.reference_update_every > 0,
    }
    given = [name for name, is_given in options.items() if is_given]
    if given and not method.reference:
        raise UsageError(f"{', '.join(given)} has no effect: {method.slug} reads no reference")
    if config.loop.reference_update_every and config.model.reference == "columns":
        raise UsageError("--reference-update-every has no effect with --reference columns: columns do not move")


def _check_adapters(config: Any) -> None:
    """Raise UsageError for options of adapters without any, and for what adapters cannot do."""
    chosen, usual = config.adapters, AdapterConfig()
    names = ("lora_alpha", "lora_targets", "rslora", "dora")
    given = [option(name) for name in names if getattr(chosen, name) != getattr(usual, name)]
    if chosen.adapter is not None:
        if given := given + (["--lora-rank"] if chosen.lora_rank else []):
            raise UsageError(f"{', '.join(given)} has no effect with --adapter: its folder says it")
    elif not chosen.lora_rank:
        given += ["--base-quantization"] if chosen.base_quantization != "none" else []
        if given:
            raise UsageError(f"{', '.join(given)} has no effect without --lora-rank")
        return
    if config.model.reference_model is not None and config.model.reference == "model":
        raise UsageError(
            "--reference-model needs a second frozen base beside that of the adapters; "
            "give --reference columns, or leave it out: the base is then the reference"
        )
    check_adapter_course(config.loop, config.optimizer)


def check_adapter_course(loop: LoopConfig, optimizer: OptimizerConfig) -> None:
    """Raise UsageError for what a run of adapters cannot do."""
    if loop.reference_update_every and loop.reference_update_rate < 1:
        raise UsageError(
            f"--reference-update-rate {loop.reference_update_rate:g} would mix the factors of adapters and not "
            "their products; give 1"
        )
    if optimizer.optimizer == "muon":
        raise UsageError("--optimizer muon has no effect on adapters: it moves whole kernels; give another")


def check_loss_options(method: Method, config: Any) -> None:
    """Raise UsageError if the loss refuses its hyper-parameters, before data and weights are read.

    The loss is traced on one example without any tokens of its own; a loss that reads columns of the data, whose
    shapes are not known yet, is left for the first step.
    """
    if column_names(method.loss):
        return
    hyper = {f.name: getattr(config.loss, f.name) for f in fields(config.loss)}
    needs = read_needs(method.loss)
    arrays = {}
    for name in needs.arrays:
        reward = origin(name).statistic == "reward"
        shape = (1,) if origin(name).side else (1, 1)
        arrays[name] = jnp.ones(shape if reward else (*shape, 1))
    special = {"loss_state": initial_loss_state(method)} if needs.state else {}
    special |= {"key": jax.random.key(0)} if needs.key else {}
    try:
        jax.eval_shape(partial(method.loss, **hyper), **arrays, **special)
    except ValueError as error:
        raise UsageError(f"{method.slug}: {error}") from error


def mesh_of(config: MeshConfig) -> Mesh:
    """The mesh that the options ask for.

    Raises:
      UsageError: it does not fit the devices.
    """
    check_ranges(config)
    try:
        return make_mesh(
            data=config.mesh_data,
            fsdp=config.mesh_fsdp,
            expert=config.mesh_expert,
            model=config.mesh_model,
            slices=config.mesh_slices,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error

"""Adapters of diffusion models as the commands use them: made, selected for training, joined again, written."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from dpo_jax.cli.console import UsageError, say
from dpo_jax.cli.images.configs import ImageAdapterConfig
from dpo_jax.cli.images.models import OpenPipeline, denoiser_function
from dpo_jax.diffusion.models import mmdit
from dpo_jax.diffusion.models.adapters import save_adapter
from dpo_jax.diffusion.models.folder import denoiser_name, save_pipeline
from dpo_jax.lora import LoraConfig, init_adapters, is_trainable, merge, split_adapters, with_adapters
from dpo_jax.tree import named_leaves, partition
from dpo_jax.types import Array, PyTree


@dataclass(frozen=True, eq=False)
class AdaptedPipeline:
    """What is trained of a pipeline's denoiser, and how its variables come about.

    Attributes:
      model: the pipeline.
      apply_fn: the denoiser's function, with adapters if there are any.
      abstract: shapes of the variables, adapters among them.
      complete: `(base variables, key) -> variables` at the start of a run.
      adapters: whether there are any.
    """

    model: OpenPipeline
    apply_fn: Callable[..., Array]
    abstract: PyTree
    complete: Callable[[PyTree, Array], PyTree]
    adapters: bool = False

    def trainable(self, name: str) -> bool:
        """Whether a variable is trained."""
        return is_trainable(name) if self.adapters else mmdit.is_trainable(name)

    @property
    def holds_frozen(self) -> bool:
        """Whether some variable is not trained."""
        return not all(map(self.trainable, named_leaves(self.abstract)))


def adapted_pipeline(model: OpenPipeline, options: ImageAdapterConfig) -> AdaptedPipeline:
    """The pipeline with the adapters that the options ask for, or as it is.

    Raises:
      UsageError: no kernel matches the targets.
    """
    base = model.abstract
    if not options.lora_rank:
        return AdaptedPipeline(model, denoiser_function(model), base, lambda variables, key: variables)
    alpha = float(options.lora_rank) if options.lora_alpha is None else options.lora_alpha
    try:
        re.compile(options.lora_targets)
        config = LoraConfig(options.lora_rank, alpha, options.lora_targets, options.rslora, options.dora)
    except re.error as error:
        raise UsageError(f"--lora-targets is no regular expression: {error}") from error
    except ValueError as error:
        raise UsageError(str(error)) from error

    def make(key: Array, variables: PyTree) -> PyTree:
        return init_adapters(key, variables, config)

    try:
        shapes = jax.eval_shape(make, jax.random.key(0), base)
        function = denoiser_function(model, shapes)
    except ValueError as error:
        raise UsageError(f"--lora-targets: {error}") from error
    adapted = AdaptedPipeline(
        model, function, with_adapters(base, shapes), lambda v, key: with_adapters(v, jax.jit(make)(key, v)), True
    )
    count = sum(leaf.size for name, leaf in named_leaves(adapted.abstract).items() if adapted.trainable(name))
    whole = sum(leaf.size for leaf in jax.tree.leaves(base))
    say(f"training adapters: {count:,} parameters beside {whole:,} frozen ones ({count / whole:.2%})")
    return adapted


def write_pipeline(adapted: AdaptedPipeline, variables: PyTree, folder: Path, adapter_folder: Path) -> None:
    """Write the pipeline as a diffusers folder, adapters merged, and the adapter alone as diffusers' file."""
    model = adapted.model
    if adapted.adapters:
        adapters: Any = split_adapters(variables)[1]
        prefix = denoiser_name(model.pipeline.kind)
        save_adapter(adapter_folder, model.table, model.abstract, adapters, prefix=prefix)
        say(f"adapter exported to {adapter_folder}")
        variables = jax.jit(merge)(variables)
    save_pipeline(folder, model.pipeline, variables)


def frozen_part(adapted: AdaptedPipeline, variables: PyTree) -> PyTree:
    """The variables that are not trained, as a state keeps them."""
    return partition(variables, adapted.trainable)[1]

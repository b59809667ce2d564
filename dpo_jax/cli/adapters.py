"""Adapters as the commands use them: made or read, selected for training, joined again, written."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from dpo_jax.cli.configs import AdapterConfig
from dpo_jax.cli.console import UsageError, say
from dpo_jax.cli.models import OpenModel
from dpo_jax.language.models.adapters import LoadedAdapter, check_names, load_adapter, save_adapter
from dpo_jax.language.models.decoder import abstract_variables, decoder_function
from dpo_jax.language.models.weights import save_hf
from dpo_jax.lora import LoraConfig, init_adapters, is_trainable, merge, split_adapters, with_adapters
from dpo_jax.quantize import Kind, dequantize_kernels, quantize_kernels
from dpo_jax.report import human_bytes
from dpo_jax.tree import named_leaves, partition, tree_bytes
from dpo_jax.types import Array, PyTree

_HEAD = "score"


@dataclass(frozen=True)
class Adapted:
    """What is trained of a model, and how its variables come about.

    Attributes:
      model: with the adapted model's function; it keeps the base's kernels as the options say.
      abstract: shapes of the variables, adapters among them.
      complete: `(base variables, key) -> variables` at the start of a run.
      rslora: how alpha and scale belong together; None where the whole model is trained.
    """

    model: OpenModel
    abstract: PyTree
    complete: Callable[[PyTree, Array], PyTree]
    rslora: bool | None = None

    def trainable(self, name: str) -> bool:
        """Whether a variable is trained: all of them, or adapters and a reward model's head."""
        return self.rslora is None or is_trainable(name) or name.split("/", 1)[0] == _HEAD


def adapted_model(model: OpenModel, options: AdapterConfig) -> Adapted:
    """The model with the adapters that the options ask for, or as it is.

    Raises:
      UsageError: no kernel matches the targets.
      WeightsError: an adapter's folder that cannot be read, or an adapter that could not be written in the end.
    """
    if options.adapter is not None:
        loaded = load_adapter(options.adapter, model.config)
        return _adapted(model, options, loaded.adapters, lambda v, key: _with_loaded(v, loaded), loaded.rslora)
    base = abstract_variables(model.config)
    if not options.lora_rank:
        return Adapted(model, base, lambda variables, key: variables)
    config = lora_config(options)

    def make(key: Array, variables: PyTree) -> PyTree:
        return init_adapters(key, dequantize_kernels(variables), config)

    try:
        abstract = jax.eval_shape(make, jax.random.key(0), base)
    except ValueError as error:
        raise UsageError(f"--lora-targets: {error}") from error
    return _adapted(model, options, abstract, lambda v, key: with_adapters(v, jax.jit(make)(key, v)), config.rslora)


def _adapted(model: OpenModel, options: AdapterConfig, adapters: PyTree, complete: Callable, rslora: bool) -> Adapted:
    # Known before a long run, not after it.
    check_names(model.config, adapters)
    kernels = None if options.base_quantization == "none" else options.base_quantization
    whole = abstract_variables(model.config)
    base = whole if kernels is None else _abstract_small(whole, kernels)
    adapters = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), adapters)
    model = replace(model, apply_fn=decoder_function(model.config, adapters, kernels=kernels), kernels=kernels)
    adapted = Adapted(model, with_adapters(base, adapters), complete, rslora)
    count = sum(leaf.size for name, leaf in named_leaves(adapted.abstract).items() if adapted.trainable(name))
    size = sum(leaf.size for leaf in jax.tree.leaves(whole))
    say(f"training adapters: {count:,} parameters beside {size:,} frozen ones ({count / size:.2%})")
    if kernels is not None:
        say(
            f"the base is rounded to {kernels}: {human_bytes(tree_bytes(base))} instead of "
            f"{human_bytes(tree_bytes(whole))}; a reference that runs beside the policy is that rounded model too"
        )
    return adapted


def _abstract_small(base: PyTree, kernels: Kind) -> PyTree:
    try:
        return jax.eval_shape(lambda variables: quantize_kernels(variables, kernels), base)
    except ValueError as error:
        raise UsageError(f"--base-quantization {kernels}: {error}") from error


def _with_loaded(variables: PyTree, loaded: LoadedAdapter) -> PyTree:
    dtypes = {name: leaf.dtype for name, leaf in named_leaves(variables).items()}
    learned = {
        name: {k: leaf.astype(dtypes[f"{name}/{k}"]) for k, leaf in p.items()} for name, p in loaded.learned.items()
    }
    return with_adapters(with_adapters(variables, learned), loaded.adapters)


def lora_config(options: AdapterConfig) -> LoraConfig:
    """The adapters that options with a rank ask for.

    Raises:
      UsageError: what `LoraConfig` refuses.
    """
    alpha = 2.0 * options.lora_rank if options.lora_alpha is None else options.lora_alpha
    try:
        return LoraConfig(options.lora_rank, alpha, options.lora_targets, options.rslora, options.dora)
    except ValueError as error:
        raise UsageError(str(error)) from error


def write_model(adapted: Adapted, variables: PyTree, folder: Path, adapter_folder: Path, *, base: str) -> None:
    """Write the model as a Hugging Face folder, adapters merged, and the adapter alone as a PEFT folder."""
    model = adapted.model
    if adapted.rslora is not None:
        adapters = split_adapters(variables)[1]
        learned: Any = {_HEAD: variables[_HEAD]} if _HEAD in variables else None
        save_adapter(adapter_folder, model.config, adapters, learned=learned, rslora=adapted.rslora, base=base)
        say(f"adapter exported to {adapter_folder}")
        variables = jax.jit(merge)(variables if model.kernels is None else _on_read_base(model, variables))
    save_hf(folder, model.config, variables, source=model.folder, dtype=model.config.param_dtype)


def _on_read_base(model: OpenModel, variables: PyTree) -> PyTree:
    """The adapted variables on kernels as they are in the checkpoint."""
    layout = jax.tree.leaves(variables)[0].sharding
    assert isinstance(layout, NamedSharding) and isinstance(layout.mesh, Mesh)
    base, adapters = replace(model, kernels=None).load(layout.mesh), split_adapters(variables)[1]
    return with_adapters(with_adapters(base, {name: variables[name] for name in variables if name == _HEAD}), adapters)


def frozen_part(adapted: Adapted, variables: PyTree) -> PyTree:
    """The variables that are not trained, as a state keeps them."""
    return partition(variables, adapted.trainable)[1]

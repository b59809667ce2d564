"""A checkpoint's folder opened for a run: its config, its tokenizer, its weights on a mesh."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from dpo_jax.cli.configs import ModelConfig
from dpo_jax.cli.console import UsageError
from dpo_jax.language.models.decoder import DecoderConfig, decoder_function
from dpo_jax.language.models.folder import WeightsError, config_from_hf, load_tokenizer, local_folder, read_config
from dpo_jax.language.models.weights import load_hf
from dpo_jax.quantize import Kind
from dpo_jax.types import PyTree


@dataclass(frozen=True)
class OpenModel:
    """A model as the commands use it; the weights are read when `load` is called.

    Attributes:
      folder: of the checkpoint, on this machine.
      config: of the decoder.
      apply_fn: `(variables, tokens, positions, subtree_end) -> Prediction`.
      tokenizer: of transformers.
      kernels: how `load` keeps those of the layers; None as they are.
    """

    folder: Path
    config: DecoderConfig
    apply_fn: Callable[..., Any]
    tokenizer: Any
    kernels: Kind | None = None

    def load(self, mesh: Mesh) -> PyTree:
        """The variables, read straight into their layout on the mesh."""
        return load_hf(self.folder, config=self.config, mesh=mesh, kernels=self.kernels)[1]

    def fingerprint(self) -> str:
        """Changes when the weights' files do: names, sizes and times of change."""
        files = sorted(self.folder.glob("*.safetensors"))
        facts = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        return hashlib.blake2b(repr(facts).encode(), digest_size=12).hexdigest()


def open_model(model: str, options: ModelConfig, *, reward: bool = False) -> OpenModel:
    """Open a folder or hub id; reads its config and tokenizer, not yet its weights.

    Args:
      reward: open it as a reward model; a language model then gets a new head.

    Raises:
      WeightsError: not a checkpoint that can be read, or a reward model where a language model is needed.
    """
    folder = local_folder(model)
    found = config_from_hf(read_config(folder), place=str(folder / "config.json"))
    if found.reward and not reward:
        raise WeightsError(f"{folder} is a reward model; a language model is needed here")
    config = replace(
        found,
        reward=reward,
        dtype=options.dtype,
        param_dtype=options.param_dtype,
        remat=options.remat,
        router_loss=options.router_loss if found.experts else 0.0,
    )
    return OpenModel(folder, config, decoder_function(config), load_tokenizer(folder))


def open_reward_model(model: str, options: ModelConfig) -> OpenModel:
    """Open a folder or hub id that has a reward head of its own.

    Raises:
      UsageError: it is a language model, whose head would be a new, random one.
      WeightsError: not a checkpoint that can be read.
    """
    folder = local_folder(model)
    if not config_from_hf(read_config(folder), place=str(folder / "config.json")).reward:
        raise UsageError(f"--reward-model {folder} has no reward head; train one with `dpo-jax train reward-model`")
    return open_model(str(folder), options, reward=True)

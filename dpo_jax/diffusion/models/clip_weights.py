"""CLIP's variables out of safetensors: transformers' names, or those of OpenAI and OpenCLIP, told apart by themselves.

OpenAI's layout keeps query, key and value in one tensor and projections as [in, out]; it is presented as transformers'
is, still read lazily.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from dpo_jax.diffusion.models.clip import RULES, abstract_variables, weight_table
from dpo_jax.diffusion.models.clip_config import ClipConfig
from dpo_jax.diffusion.models.layers import Types
from dpo_jax.diffusion.models.weights import read_variables
from dpo_jax.sharding import Rules, make_mesh
from dpo_jax.types import PyTree

_FLOAT32 = Types()
_OPENAI = "visual.conv1.weight"  # a name of OpenAI's and OpenCLIP's layout alone
_FUSED = re.compile(r"attn\.in_proj_(weight|bias)$")
_TRANSPOSED = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
_RENAMES = (
    (r"^visual\.", "vision_model."),
    (r"^(?!vision_model\.|logit_scale$)", "text_model."),
    (r"\.transformer\.resblocks\.", ".encoder.layers."),
    (r"\.ln_(1|2)\.", r".layer_norm\1."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"\.(token_embedding\.weight|class_embedding)$", r".embeddings.\1"),
    (r"\.positional_embedding$", ".embeddings.position_embedding.weight"),
    (r"\.conv1\.", ".embeddings.patch_embedding."),
    (r"\.ln_pre\.", ".pre_layrnorm."),
    (r"\.ln_post\.", ".post_layernorm."),
    (r"\.ln_final\.", ".final_layer_norm."),
)
_BUFFERS = re.compile(r"position_ids$|attn_mask$|^(input_resolution|context_length|vocab_size)$")


def is_buffer(name: str) -> bool:
    """Whether a tensor of a file is one that no model reads, such as the places 0 to 76 that old files hold."""
    return _BUFFERS.search(name) is not None


@dataclass(frozen=True)
class _Rows:
    """Some of the rows of a lazy tensor, itself lazy."""

    tensor: Any
    first: int
    count: int

    def get_shape(self) -> list[int]:
        return [self.count, *self.tensor.get_shape()[1:]]

    def get_dtype(self) -> str:
        return self.tensor.get_dtype()

    def __getitem__(self, index: tuple[slice, ...]) -> Any:
        start, stop, _ = index[0].indices(self.count)
        return self.tensor[(slice(self.first + start, self.first + stop), *index[1:])]


@dataclass(frozen=True)
class _Turned:
    """A lazy matrix transposed, itself lazy."""

    tensor: Any

    def get_shape(self) -> list[int]:
        return self.tensor.get_shape()[::-1]

    def get_dtype(self) -> str:
        return self.tensor.get_dtype()

    def __getitem__(self, index: tuple[slice, ...]) -> Any:
        return self.tensor[index[::-1]].T


def as_transformers(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Lazy tensors by transformers' names, without buffers.

    Args:
      tensors: of `dpo_jax.weights.open_tensors`, in either layout.
    """
    tensors = {name: tensor for name, tensor in tensors.items() if not is_buffer(name)}
    if _OPENAI not in tensors:
        return tensors
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if name in _TRANSPOSED:
            found[_TRANSPOSED[name]] = _Turned(tensor)
            continue
        ours = name
        for pattern, by in _RENAMES:
            ours = re.sub(pattern, by, ours)
        fused = _FUSED.search(ours)
        if fused is None:
            found[ours] = tensor
            continue
        third = tensor.get_shape()[0] // 3
        for number, part in enumerate("qkv"):
            target = f"{ours[: fused.start()]}self_attn.{part}_proj.{fused[1]}"
            found[target] = _Rows(tensor, number * third, third)
    return found


def read_clip(
    tensors: Mapping[str, Any],
    config: ClipConfig,
    *,
    place: Path,
    mesh: Mesh | None = None,
    rules: Rules = RULES,
    types: Types = _FLOAT32,
) -> PyTree:
    """Variables of the towers that the config has, each device's part read by itself; other towers are passed over.

    Args:
      tensors: of `as_transformers`, their files open.
      place: of the files, for errors.
      mesh: by default the first device alone.

    Raises:
      WeightsError: anything that is missing, surplus, wrongly shaped or of an unknown type, all of it named.
    """
    mesh = mesh or make_mesh(devices=jax.devices()[:1])
    abstract, table = abstract_variables(config, types), weight_table(config)
    other = [
        name
        for name, tower in (("text_", config.text), ("vision_", config.vision), ("visual_", config.vision))
        if tower is None
    ]
    if other:
        other.append("logit_scale")
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(tuple(other))}
    return read_variables(tensors, abstract, table, place=place, mesh=mesh, rules=rules)

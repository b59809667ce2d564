"""CLIP: a text tower, an image tower or both, in transformers' layout; also read from OpenAI's and OpenCLIP's.

Radford et al. 2021, arXiv 2103.00020. Tokens are int32 [B, L]; images [B, H, W, 3], normalised. Layers are stacked and
scanned. Diffusion models read all hidden states of the text tower (`TextStates.layers`), rewards the projected vectors.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dpo_jax.diffusion.models.clip_config import LEGACY_END, ClipConfig, TextConfig, VisionConfig
from dpo_jax.diffusion.models.layers import (
    ACTIVATIONS,
    Conv,
    Embedding,
    LayerNorm,
    Linear,
    Types,
    attend,
    split_heads,
)
from dpo_jax.diffusion.models.table import Place, table_of
from dpo_jax.functional import abstract_module, function_of, functional, set_adapters, shapes_of
from dpo_jax.lora import adapter_rules
from dpo_jax.sharding import BATCH_AXES, P, constrain
from dpo_jax.types import Array, PyTree

# Stacked kernels lead with the layer axis.
RULES = (
    (r"layers/.*(q_proj|k_proj|v_proj|fc1)/kernel$", P(None, "fsdp", "model")),
    (r"layers/.*(out_proj|fc2)/kernel$", P(None, "model", "fsdp")),
    (r"layers/.*(q_proj|k_proj|v_proj|fc1)/bias$", P(None, "model")),
    (r"token_embedding/embedding$", P("model", "fsdp")),
    (r"_projection/kernel$", P("fsdp", None)),
)
RULES += adapter_rules(RULES)

_FLOAT32 = Types()
_LOGIT_SCALE = 2.6592  # at the start of training, log(1 / 0.07)


class TextStates(NamedTuple):
    """What the text tower says.

    Attributes:
      layers: [N + 1, B, L, D], the embeddings and the output of each layer, not normed; SDXL reads `layers[-2]`.
      last: [B, L, D], the output of the last layer, normed.
      pooled: [B, D], of it the vector at the text's end.
      projected: [B, P], or None for a tower without projection.
    """

    layers: Array
    last: Array
    pooled: Array
    projected: Array | None


class VisionStates(NamedTuple):
    """What the image tower says.

    Attributes:
      layers: [N + 1, B, 1 + patches, D], what enters the layers and the output of each.
      pooled: [B, D], the vector of the class token, normed.
      projected: [B, P], or None for a tower without projection.
    """

    layers: Array
    pooled: Array
    projected: Array | None


class SelfAttention(nnx.Module):
    """Attention of a sequence to itself."""

    def __init__(self, config: TextConfig | VisionConfig, *, types: Types, rngs: nnx.Rngs):
        size = config.hidden_size
        self.heads = config.heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            Linear(size, size, types=types, rngs=rngs) for _ in range(4)
        )

    def __call__(self, x: Array, *, causal: bool) -> Array:
        query, key, value = (split_heads(project(x), self.heads) for project in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attend(query, key, value, causal=causal))


class FeedForward(nnx.Module):
    """Two linear layers with the activation between them."""

    def __init__(self, config: TextConfig | VisionConfig, *, types: Types, rngs: nnx.Rngs):
        self.activation = config.activation
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, types=types, rngs=rngs)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, types=types, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class Layer(nnx.Module):
    """Attention and feed-forward part, each normed before and added."""

    def __init__(self, config: TextConfig | VisionConfig, *, types: Types, rngs: nnx.Rngs):
        self.layer_norm1 = LayerNorm(config.hidden_size, epsilon=config.epsilon, types=types)
        self.self_attn = SelfAttention(config, types=types, rngs=rngs)
        self.layer_norm2 = LayerNorm(config.hidden_size, epsilon=config.epsilon, types=types)
        self.mlp = FeedForward(config, types=types, rngs=rngs)

    def __call__(self, x: Array, *, causal: bool) -> Array:
        x = x + self.self_attn(self.layer_norm1(x), causal=causal)
        return x + self.mlp(self.layer_norm2(x))


def _stacked(config: TextConfig | VisionConfig, types: Types, rngs: nnx.Rngs) -> Layer:
    @nnx.split_rngs(splits=config.layers)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def make(rngs: nnx.Rngs) -> Layer:
        return Layer(config, types=types, rngs=rngs)

    return make(rngs)


def _run(layers: Layer, x: Array, *, causal: bool, remat: bool) -> tuple[Array, Array]:
    """The output of the last layer, and [N + 1, ...] what entered each layer and that output."""
    graphdef, stacked = nnx.split(layers)

    def step(x: Array, state: PyTree) -> tuple[Array, Array]:
        x = constrain(x, BATCH_AXES, None, None)
        return nnx.merge(graphdef, state)(x, causal=causal), x

    if remat:
        step = jax.checkpoint(step, prevent_cse=False)
    last, entered = jax.lax.scan(step, x, stacked)
    return last, jnp.concatenate([entered, last[None]])


class TextEmbeddings(nnx.Module):
    """Words and places."""

    def __init__(self, config: TextConfig, *, types: Types, rngs: nnx.Rngs):
        self.token_embedding = Embedding(config.vocabulary_size, config.hidden_size, types=types, rngs=rngs)
        self.position_embedding = Embedding(config.positions, config.hidden_size, types=types, rngs=rngs)

    def __call__(self, ids: Array) -> Array:
        return self.token_embedding(ids) + self.position_embedding(jnp.arange(ids.shape[1]))


class TextTower(nnx.Module):
    """A causal transformer over tokens."""

    def __init__(self, config: ClipConfig, text: TextConfig, *, types: Types, rngs: nnx.Rngs):
        self.config, self.remat = text, config.remat
        self.embeddings = TextEmbeddings(text, types=types, rngs=rngs)
        self.layers = _stacked(text, types, rngs)
        self.final_layer_norm = LayerNorm(text.hidden_size, epsilon=text.epsilon, types=types)

    def __call__(self, ids: Array) -> tuple[Array, Array, Array]:
        """(layers, last, pooled) of `TextStates`."""
        if ids.shape[1] > self.config.positions:
            raise ValueError(f"texts of {ids.shape[1]} tokens; this tower knows {self.config.positions} positions")
        last, layers = _run(self.layers, self.embeddings(ids), causal=True, remat=self.remat)
        last = self.final_layer_norm(last)
        ends = ids if self.config.end_token == LEGACY_END else ids == self.config.end_token
        place = jnp.argmax(ends, axis=1)  # the first of equals
        return layers, last, jnp.take_along_axis(last, place[:, None, None], axis=1)[:, 0]


class VisionEmbeddings(nnx.Module):
    """A class token and patches, with places."""

    def __init__(self, config: VisionConfig, *, types: Types, rngs: nnx.Rngs):
        size, patch = config.hidden_size, config.patch_size
        places = (config.image_size // patch) ** 2 + 1
        self.types = types
        normal = jax.random.normal(rngs.params(), (size,), jnp.float32) / jnp.sqrt(size)
        self.class_embedding = nnx.Param(normal.astype(types.params))
        self.patch_embedding = Conv(
            config.channels, size, window=patch, stride=patch, padding=(0, 0), bias=False, types=types, rngs=rngs
        )
        self.position_embedding = Embedding(places, size, types=types, rngs=rngs)

    def __call__(self, images: Array) -> Array:
        patches = self.patch_embedding(images)
        patches = patches.reshape(patches.shape[0], -1, patches.shape[-1])  # [B, h, w, D] -> [B, h w, D]
        first = self.class_embedding[...].astype(patches.dtype)
        first = jnp.broadcast_to(first, (patches.shape[0], 1, patches.shape[-1]))
        return jnp.concatenate([first, patches], axis=1) + self.position_embedding(jnp.arange(patches.shape[1] + 1))


class VisionTower(nnx.Module):
    """A transformer over patches."""

    def __init__(self, config: ClipConfig, vision: VisionConfig, *, types: Types, rngs: nnx.Rngs):
        self.config, self.remat = vision, config.remat
        self.embeddings = VisionEmbeddings(vision, types=types, rngs=rngs)
        self.pre_layrnorm = LayerNorm(vision.hidden_size, epsilon=vision.epsilon, types=types)
        self.layers = _stacked(vision, types, rngs)
        self.post_layernorm = LayerNorm(vision.hidden_size, epsilon=vision.epsilon, types=types)

    def __call__(self, images: Array) -> tuple[Array, Array]:
        """(layers, pooled) of `VisionStates`."""
        side = self.config.image_size
        if images.shape[1:3] != (side, side):
            raise ValueError(f"images of {images.shape[1]} x {images.shape[2]} pixels; this tower sees {side} x {side}")
        x = self.pre_layrnorm(self.embeddings(images))
        last, layers = _run(self.layers, x, causal=False, remat=self.remat)
        return layers, self.post_layernorm(last[:, 0])


class Clip(nnx.Module):
    """The towers that the config has."""

    def __init__(self, config: ClipConfig, *, types: Types = _FLOAT32, rngs: nnx.Rngs):
        text, vision, size = config.text, config.vision, config.projection
        self.text_model = None if text is None else TextTower(config, text, types=types, rngs=rngs)
        self.vision_model = None if vision is None else VisionTower(config, vision, types=types, rngs=rngs)
        self.text_projection, self.visual_projection = (
            None
            if tower is None or size is None
            else Linear(tower.hidden_size, size, bias=False, types=types, rngs=rngs)
            for tower in (text, vision)
        )
        both = text is not None and vision is not None
        self.logit_scale = nnx.Param(jnp.asarray(_LOGIT_SCALE, types.params)) if both else None

    def text(self, ids: Array) -> TextStates:
        """States of texts.

        Args:
          ids: int32 [B, L], L up to `positions`; each row holds the end token. What stands behind its first one has
            no influence on the pooled vector, and needs no mask.
        """
        if self.text_model is None:
            raise ValueError("this model has no text tower")
        layers, last, pooled = self.text_model(ids)
        return TextStates(layers, last, pooled, None if self.text_projection is None else self.text_projection(pooled))

    def skipped(self, ids: Array, skip: int) -> Array:
        """States [B, L, D] of the text tower without its last layers, normed (Stable Diffusion's "clip skip")."""
        if self.text_model is None:
            raise ValueError("this model has no text tower")
        layers, _, _ = self.text_model(ids)
        if not 0 <= skip < layers.shape[0]:
            raise ValueError(f"{skip} layers to be skipped; there are {layers.shape[0] - 1}")
        return self.text_model.final_layer_norm(layers[layers.shape[0] - 1 - skip])

    def vision(self, images: Array) -> VisionStates:
        """States of images [B, H, W, 3], of the config's size and normalised by CLIP's means."""
        if self.vision_model is None:
            raise ValueError("this model has no image tower")
        layers, pooled = self.vision_model(images)
        projected = None if self.visual_projection is None else self.visual_projection(pooled)
        return VisionStates(layers, pooled, projected)


def clip_function(config: ClipConfig, types: Types = _FLOAT32, adapters: PyTree = None) -> Callable[..., Any]:
    """`apply_fn(variables, x, method="text")` (or vision, skipped) of a config, without making any weights.

    Args:
      adapters: of the variables that the function will get (`dpo_jax.lora`), arrays or their shapes; None for the base.

    Raises:
      ValueError: an adapter of what is no linear layer.
    """
    if adapters is None:
        return function_of(Clip, config, types=types)
    model = abstract_module(Clip, config, types=types)
    set_adapters(model, adapters)
    return functional(model)[0]


def init_variables(config: ClipConfig, key: Array, types: Types = _FLOAT32) -> PyTree:
    """Random weights."""
    return functional(Clip(config, types=types, rngs=nnx.Rngs(params=key)))[1]


def abstract_variables(config: ClipConfig, types: Types = _FLOAT32) -> PyTree:
    """Shapes and dtypes of the variables, without making any."""
    return shapes_of(Clip, config, types=types)


def weight_table(config: ClipConfig) -> dict[str, Place]:
    """Path name of a variable -> place in model.safetensors, as transformers writes it."""
    return _table(config, {}, ((r"^layers/", "encoder/layers/{layer}/"),))


def _table(config: ClipConfig, towers: Mapping[str, str], renames: tuple[tuple[str, str], ...]) -> dict[str, Place]:
    variables, table = abstract_variables(config), {}
    sizes = {"text_model": config.text, "vision_model": config.vision}
    for name, part in variables.items():
        tower = sizes.get(name)
        if tower is None:
            table |= table_of({name: part})
            continue
        prefix = towers.get(name, f"{name}.")
        for path, place in table_of(part, renames, {"layers": range(tower.layers)}).items():
            table[f"{name}/{path}"] = place._replace(name=prefix + place.name)
    return table

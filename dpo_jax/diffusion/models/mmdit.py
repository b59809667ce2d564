"""The multimodal diffusion transformer of Stable Diffusion 3 and 3.5, in diffusers' layout (SD3Transformer2DModel).

Esser et al. 2024, arXiv 2403.03206. Latents [B, H, W, C] are cut into patches; patches and text states are two
sequences with weights of their own that attend to each other in every block. Blocks of a kind are stacked and scanned,
so that the program does not grow with depth: first those with a second attention of the image alone (SD3.5 medium),
then the others. The last block stands by itself, for it leaves the text behind.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dpo_jax.diffusion.models.layers import (
    ACTIVATIONS,
    Conv,
    LayerNorm,
    Linear,
    RMSNorm,
    Types,
    attend,
    split_heads,
    timestep_embedding,
)
from dpo_jax.diffusion.models.mmdit_config import MMDiTConfig, config_from_dict, config_to_dict
from dpo_jax.diffusion.models.table import Place, table_of
from dpo_jax.diffusion.types import TextCondition
from dpo_jax.functional import abstract_module, function_of, functional, set_adapters, shapes_of
from dpo_jax.lora import adapter_rules
from dpo_jax.sharding import BATCH_AXES, MODEL_AXIS, P, constrain
from dpo_jax.types import Array, PyTree

__all__ = [
    "RULES",
    "MMDiT",
    "MMDiTConfig",
    "abstract_variables",
    "config_from_dict",
    "config_to_dict",
    "init_variables",
    "is_trainable",
    "mmdit_function",
    "position_table",
    "weight_table",
]

# Stacked kernels lead with the layer axis, those of the last block do not. What makes scales, shifts and gates is wide
# and meets one vector per example: it is only stored in parts.
RULES = (
    *(
        (rf"{owner}/.*{layers}/{kind}$", P(*lead, *spec))
        for owner, lead in (("blocks", (None,)), ("last", ()))
        for layers, kind, spec in (
            ("(to_q|to_k|to_v|add_q_proj|add_k_proj|add_v_proj|up)", "kernel", ("fsdp", "model")),
            ("(to_q|to_k|to_v|add_q_proj|add_k_proj|add_v_proj|up)", "bias", ("model",)),
            ("(to_out/0|to_add_out|down)", "kernel", ("model", "fsdp")),
            ("linear", "kernel", (("fsdp", "model"), None)),
        )
    ),
    (r"pos_embed/proj/kernel$", P(None, None, None, "fsdp")),
    (r"kernel$", P("fsdp", None)),
)
RULES += adapter_rules(RULES)

_EPSILON = 1e-6
_TIMES = 256  # sines and cosines of a timestep
_POSITIONS = "pos_embed/pos_embed"


class Modulation(nnx.Module):
    """Scales, shifts and gates [B, 1, D] out of a vector per example (adaptive layer norm, arXiv 2212.09748)."""

    def __init__(self, width: int, parts: int, *, types: Types, rngs: nnx.Rngs):
        self.parts = parts
        self.linear = Linear(width, parts * width, types=types, rngs=rngs)

    def __call__(self, vector: Array) -> list[Array]:
        return jnp.split(self.linear(jax.nn.silu(vector))[:, None], self.parts, axis=-1)


class FeedForward(nnx.Module):
    """Two projections around a GELU."""

    def __init__(self, width: int, *, types: Types, rngs: nnx.Rngs):
        self.up = Linear(width, 4 * width, types=types, rngs=rngs)
        self.down = Linear(4 * width, width, types=types, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.down(constrain(ACTIVATIONS["gelu_tanh"](self.up(x)), BATCH_AXES, None, MODEL_AXIS))


class Attention(nnx.Module):
    """Attention of an image to itself, or with the text's own projections of both sequences to both."""

    def __init__(self, config: MMDiTConfig, *, text: bool, last: bool = False, types: Types, rngs: nnx.Rngs):
        linear = partial(Linear, config.width, config.width, types=types, rngs=rngs)
        norm = partial(RMSNorm, config.attention_head_dim, epsilon=_EPSILON, types=types)
        self.heads = config.num_attention_heads
        self.to_q, self.to_k, self.to_v = linear(), linear(), linear()
        self.to_out = nnx.List([linear()])
        self.norm_q, self.norm_k = (norm(), norm()) if config.qk_norm else (None, None)
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (linear() if text else None for _ in range(3))
        self.norm_added_q, self.norm_added_k = (norm(), norm()) if config.qk_norm and text else (None, None)
        self.to_add_out = linear() if text and not last else None

    def __call__(self, x: Array) -> Array:
        """The image's states [B, L, D] after attention to themselves."""
        key, value = self._heads(self.to_k, self.norm_k, x), self._heads(self.to_v, None, x)
        return self.to_out[0](attend(self._heads(self.to_q, self.norm_q, x), key, value))

    def joint(self, x: Array, text: Array, mask: Array | None) -> tuple[Array, Array | None]:
        """The states of both sequences after attention to both; the last block's text is not asked.

        Args:
          x: [B, L, D].
          text: [B, S, D].
          mask: bool [B, S], text that may be seen; all by default.
        """
        key = [self._heads(self.to_k, self.norm_k, x), self._heads(self.add_k_proj, self.norm_added_k, text)]
        value = [self._heads(self.to_v, None, x), self._heads(self.add_v_proj, None, text)]
        key, value = jnp.concatenate(key, axis=1), jnp.concatenate(value, axis=1)
        if mask is not None:
            mask = jnp.concatenate([jnp.ones(x.shape[:2], bool), mask], axis=1)
        # Apart, so that the image's queries stay a round number.
        seen = self.to_out[0](attend(self._heads(self.to_q, self.norm_q, x), key, value, mask=mask))
        if self.to_add_out is None:
            return seen, None
        query = self._heads(self.add_q_proj, self.norm_added_q, text)
        return seen, self.to_add_out(attend(query, key, value, mask=mask))

    def _heads(self, project: Linear | None, norm: RMSNorm | None, x: Array) -> Array:
        assert project is not None
        split = split_heads(project(x), self.heads)
        return split if norm is None else norm(split)


class Block(nnx.Module):
    """Joint attention and a feed-forward for each sequence, all of them modulated (figure 2b)."""

    def __init__(self, config: MMDiTConfig, *, dual: bool = False, last: bool = False, types: Types, rngs: nnx.Rngs):
        width = config.width
        self.norm = LayerNorm(width, epsilon=_EPSILON, affine=False, types=types)
        self.norm1 = Modulation(width, 9 if dual else 6, types=types, rngs=rngs)
        self.norm1_context = Modulation(width, 2 if last else 6, types=types, rngs=rngs)
        self.attn = Attention(config, text=True, last=last, types=types, rngs=rngs)
        self.attn2 = Attention(config, text=False, types=types, rngs=rngs) if dual else None
        self.ff = FeedForward(width, types=types, rngs=rngs)
        self.ff_context = None if last else FeedForward(width, types=types, rngs=rngs)

    def __call__(self, x: Array, text: Array, vector: Array, mask: Array | None) -> tuple[Array, Array]:
        """Both sequences after the block.

        Args:
          x, text: [B, L, D], [B, S, D].
          vector: [B, D], of the timestep and the whole text.
          mask: bool [B, S].
        """
        shift, scale, gate, shift_forward, scale_forward, gate_forward, *second = self.norm1(vector)
        normed = self.norm(x)
        if self.ff_context is None:
            # This one, as the norm before the output, has scale and shift the other way round.
            text_scale, text_shift = self.norm1_context(vector)
            rest = []
        else:
            text_shift, text_scale, *rest = self.norm1_context(vector)
        seen, text_seen = self.attn.joint(
            _moved(normed, scale, shift), _moved(self.norm(text), text_scale, text_shift), mask
        )
        x = x + gate * seen
        if self.attn2 is not None:
            shift, scale, gate = second
            x = x + gate * self.attn2(_moved(normed, scale, shift))
        x = x + gate_forward * self.ff(_moved(self.norm(x), scale_forward, shift_forward))
        x = constrain(x, BATCH_AXES)
        if self.ff_context is None or text_seen is None:
            return x, text
        gate, shift, scale, gate_forward = rest
        text = text + gate * text_seen
        text = text + gate_forward * self.ff_context(_moved(self.norm(text), scale, shift))
        return x, constrain(text, BATCH_AXES)


def _moved(x: Array, scale: Array, shift: Array) -> Array:
    return x * (1 + scale) + shift


class TwoLayers(nnx.Module):
    """Two projections around a SiLU."""

    def __init__(self, size_in: int, width: int, *, types: Types, rngs: nnx.Rngs):
        self.linear_1 = Linear(size_in, width, types=types, rngs=rngs)
        self.linear_2 = Linear(width, width, types=types, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.linear_2(jax.nn.silu(self.linear_1(x)))


class Vector(nnx.Module):
    """The timestep and the whole text as one vector [B, D]."""

    def __init__(self, config: MMDiTConfig, *, types: Types, rngs: nnx.Rngs):
        self.timestep_embedder = TwoLayers(_TIMES, config.width, types=types, rngs=rngs)
        self.text_embedder = TwoLayers(config.pooled_projection_dim, config.width, types=types, rngs=rngs)

    def __call__(self, timesteps: Array, pooled: Array) -> Array:
        return self.timestep_embedder(timestep_embedding(timesteps, _TIMES)) + self.text_embedder(pooled)


class Patches(nnx.Module):
    """Latents [B, H, W, C] to patches [B, L, D] with the middle of a table of positions added, which is not trained."""

    def __init__(self, config: MMDiTConfig, *, types: Types, rngs: nnx.Rngs):
        size = config.patch_size
        self.types, self.size, self.side = types, size, config.pos_embed_max_size
        options: dict[str, Any] = {"window": size, "stride": size, "padding": (0, 0), "types": types, "rngs": rngs}
        self.proj = Conv(config.in_channels, config.width, **options)
        self.pos_embed = nnx.Param(position_table(config).astype(types.params))

    def __call__(self, latents: Array) -> Array:
        x = self.proj(latents)
        height, width = x.shape[1:3]
        if max(height, width) > self.side or any(n % self.size for n in latents.shape[1:3]):
            raise ValueError(
                f"latents of {latents.shape[1]} x {latents.shape[2]}: the sides must be multiples of {self.size}, "
                f"at most {self.side * self.size}"
            )
        top, left = (self.side - height) // 2, (self.side - width) // 2
        table = jax.lax.stop_gradient(self.pos_embed[...]).reshape(self.side, self.side, -1)
        near = table[top : top + height, left : left + width].astype(jnp.float32)
        x = (x.astype(jnp.float32) + near).astype(self.types.compute)
        return x.reshape(x.shape[0], height * width, -1)


def position_table(config: MMDiTConfig) -> Array:
    """Sines and cosines of columns and rows, float32 [1, side^2, D] for a table of side x side patches."""
    side, quarter = config.pos_embed_max_size, config.width // 4
    places = np.arange(side) / (side / (config.sample_size // config.patch_size))
    angles = places[:, None] * 10_000.0 ** -(np.arange(quarter) / quarter)  # [side, D / 4]
    axis = jnp.asarray(np.concatenate([np.sin(angles), np.cos(angles)], axis=1), jnp.float32)
    columns, rows = (jnp.broadcast_to(a, (side, side, 2 * quarter)) for a in (axis[None], axis[:, None]))
    return jnp.concatenate([columns, rows], axis=-1).reshape(1, side * side, 4 * quarter)


class MMDiT(nnx.Module):
    """Noisy latents, timesteps and text to a prediction of the latents' shape."""

    def __init__(self, config: MMDiTConfig, *, rngs: nnx.Rngs):
        types = config.types

        def stack(numbers: range, *, dual: bool) -> Block | None:
            if not numbers:
                return None

            @nnx.split_rngs(splits=len(numbers))
            @nnx.vmap(in_axes=(0,), out_axes=0)
            def stacked(rngs: nnx.Rngs) -> Block:
                return Block(config, dual=dual, types=types, rngs=rngs)

            return stacked(rngs)

        linear = partial(Linear, types=types, rngs=rngs)
        self.config = config
        self.pos_embed = Patches(config, types=types, rngs=rngs)
        self.time_text_embed = Vector(config, types=types, rngs=rngs)
        self.context_embedder = linear(config.joint_attention_dim, config.width)
        self.dual_blocks = stack(config.stacks["dual_blocks"], dual=True)
        self.blocks = stack(config.stacks["blocks"], dual=False)
        self.last = Block(config, last=True, types=types, rngs=rngs)
        self.norm = LayerNorm(config.width, epsilon=_EPSILON, affine=False, types=types)
        self.norm_out = Modulation(config.width, 2, types=types, rngs=rngs)
        self.proj_out = linear(config.width, config.patch_size**2 * config.out_channels)

    def __call__(self, latents: Array, timesteps: Array, condition: TextCondition) -> Array:
        """What the model predicts, float32 [B, H, W, C].

        Args:
          latents: [B, H, W, C], any float type.
          timesteps: [B], 1000 sigma.
          condition: text states [B, S, E] and pooled [B, P].

        Raises:
          ValueError: latents that are too large for the table of positions, or no pooled vector.
        """
        if condition.pooled is None:
            raise ValueError("the condition has no pooled vector; this model needs states and pooled")
        x = constrain(self.pos_embed(latents), BATCH_AXES)
        text = constrain(self.context_embedder(jnp.asarray(condition.states)), BATCH_AXES)
        vector = self.time_text_embed(timesteps, jnp.asarray(condition.pooled))

        def run(graphdef: nnx.GraphDef, carry: tuple[Array, Array], state: PyTree) -> tuple[tuple[Array, Array], None]:
            return nnx.merge(graphdef, state)(*carry, vector, condition.mask), None

        for stack in (self.dual_blocks, self.blocks):
            if stack is not None:
                graphdef, stacked = nnx.split(stack)
                (x, text), _ = jax.lax.scan(self._kept(partial(run, graphdef)), (x, text), stacked)
        graphdef, state = nnx.split(self.last)
        (x, _), _ = self._kept(partial(run, graphdef))((x, text), state)
        scale, shift = self.norm_out(vector)
        return self._latents(self.proj_out(_moved(self.norm(x), scale, shift)), latents.shape).astype(jnp.float32)

    def _kept(self, run: Callable) -> Callable:
        return jax.checkpoint(run, prevent_cse=False) if self.config.remat == "full" else run

    def _latents(self, patches: Array, shape: tuple[int, ...]) -> Array:
        """[B, L, p p C] -> [B, H, W, C]."""
        size = self.config.patch_size
        batch, height, width = shape[0], shape[1] // size, shape[2] // size
        pixels = patches.reshape(batch, height, width, size, size, -1)
        return jnp.swapaxes(pixels, 2, 3).reshape(batch, height * size, width * size, -1)


def mmdit_function(config: MMDiTConfig, adapters: PyTree = None) -> Callable[..., Array]:
    """`predict(variables, latents, timesteps, condition)` of a config, without making any weights.

    Args:
      adapters: of the variables that the function will get (`dpo_jax.lora`), arrays or their shapes; None for the base.

    Raises:
      ValueError: an adapter of what is no linear layer.
    """
    if adapters is None:
        return function_of(MMDiT, config)
    model = abstract_module(MMDiT, config)
    set_adapters(model, adapters)
    return functional(model)[0]


def init_variables(config: MMDiTConfig, key: Array) -> PyTree:
    """Random weights; the positions are those of `position_table`."""
    return functional(MMDiT(config, rngs=nnx.Rngs(params=key)))[1]


def abstract_variables(config: MMDiTConfig) -> PyTree:
    """Shapes and dtypes of the variables, without making any."""
    return shapes_of(MMDiT, config)


def is_trainable(name: str) -> bool:
    """Whether a path name is that of a variable that training moves; the positions are constants."""
    return name != _POSITIONS


def weight_table(config: MMDiTConfig) -> dict[str, Place]:
    """Path name of a variable -> place in diffusion_pytorch_model.safetensors."""
    renames = (
        (r"^(dual_)?blocks/", r"transformer_blocks/{layer}/"),
        (r"^last/", f"transformer_blocks/{config.num_layers - 1}/"),
        (r"/up$", "/net/0/proj"),
        (r"/down$", "/net/2"),
    )
    return table_of(abstract_variables(config), renames, config.stacks)

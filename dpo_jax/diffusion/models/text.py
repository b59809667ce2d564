"""What text-to-image models are told of prompts: states of CLIP encoders, put together as each model reads them.

    sd      [B, 77, 768]         the last states, normed
    sdxl    [B, 77, 768 + 1280]  the last states but one of both encoders; pooled of the second; sizes
    sd3     [B, 77 + L, 4096]    the same filled up with zeros, then L states of a T5; pooled of both

SD3's T5 is not run here: its states were made once by another program (`dpo_jax.diffusion.data.t5_states`), or are
zeros as for a pipeline without it.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.diffusion.models.clip import TextStates, clip_function
from dpo_jax.diffusion.models.clip_config import ClipConfig
from dpo_jax.diffusion.models.folder import Pipeline
from dpo_jax.diffusion.models.layers import Types
from dpo_jax.diffusion.models.mmdit_config import MMDiTConfig
from dpo_jax.diffusion.types import TextCondition
from dpo_jax.types import Array, PyTree

_FLOAT32 = Types()
_T5_LENGTH = 256


def tokenize(pipeline: Pipeline, prompts: Sequence[str]) -> tuple[np.ndarray, ...]:
    """Tokens of each text encoder, int32 [B, positions]; longer prompts are cut off, shorter ones filled up."""
    return tuple(
        np.asarray(
            tokenizer(
                list(prompts),
                padding="max_length",
                max_length=min(tokenizer.model_max_length, _positions(config)),
                truncation=True,
            )["input_ids"],
            np.int32,
        )
        for tokenizer, config in zip(pipeline.tokenizers, pipeline.encoders)
    )


def _positions(config: ClipConfig) -> int:
    if config.text is None:
        raise ValueError("the encoder has no text tower")
    return config.text.positions


@lru_cache(maxsize=16)
def _encoder(config: ClipConfig, types: Types) -> Callable[[PyTree, np.ndarray], TextStates]:
    apply = clip_function(config, types)
    return jax.jit(lambda variables, ids: apply(variables, ids, method="text"))


def encode_text(
    pipeline: Pipeline,
    encoders: Sequence[PyTree],
    prompts: Sequence[str],
    *,
    sizes: Array | np.ndarray | None = None,
    t5_states: Array | np.ndarray | None = None,
    t5_length: int = _T5_LENGTH,
    types: Types = _FLOAT32,
) -> TextCondition:
    """The condition of some prompts.

    Args:
      encoders: variables of the text encoders.
      prompts: B of them.
      sizes: [B, 6] or [6], see `TextCondition`; by default whole images of the size that the model was made for. SDXL's
        only.
      t5_states: [B, L, 4096], or None for zeros; SD3's only.
      t5_length: L of those zeros.
      types: of the encoders' computation and variables.

    Raises:
      ValueError: prompts that are none, or states or sizes that do not fit them.
    """
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"prompts is {prompts!r}; give a list of at least one text")
    tokens = tokenize(pipeline, prompts)
    said = [
        _encoder(config, types)(variables, ids) for config, variables, ids in zip(pipeline.encoders, encoders, tokens)
    ]
    if pipeline.kind == "sd":
        return TextCondition(said[0].last)
    states = jnp.concatenate([one.layers[-2] for one in said], axis=-1)
    if pipeline.kind == "sdxl":
        return TextCondition(states, _projected(said[1]), _sizes(pipeline, len(prompts), sizes))
    pooled = jnp.concatenate([_projected(one) for one in said], axis=-1)
    return TextCondition(_with_t5(pipeline, states, t5_states, t5_length), pooled)


def empty_text(pipeline: Pipeline, encoders: Sequence[PyTree], **options) -> TextCondition:
    """What guidance leads away from without a negative prompt, leaves [1, ...]: the empty text, or zeros (SDXL).

    Args:
      options: of `encode_text`.
    """
    said = encode_text(pipeline, encoders, [""], **options)
    if not pipeline.zero_empty or said.pooled is None:
        return said
    return said._replace(states=jnp.zeros_like(said.states), pooled=jnp.zeros_like(said.pooled))


def _projected(said: TextStates) -> Array:
    if said.projected is None:
        raise ValueError("the text encoder has no projection, which this pipeline's pooled vectors need")
    return said.projected


def _sizes(pipeline: Pipeline, count: int, sizes: Array | np.ndarray | None) -> Array:
    if sizes is None:
        factor = 1 if pipeline.autoencoder is None else pipeline.autoencoder.factor
        side = (pipeline.denoiser.sample_size or 128) * factor
        sizes = np.asarray([side, side, 0, 0, side, side])
    sizes = jnp.asarray(sizes, jnp.float32)
    if sizes.shape not in ((6,), (count, 6)):
        raise ValueError(f"sizes of shape {sizes.shape} for {count} prompts; give [6] or [{count}, 6]")
    return jnp.broadcast_to(sizes, (count, 6))


def _with_t5(pipeline: Pipeline, states: Array, t5_states: Array | np.ndarray | None, length: int) -> Array:
    assert isinstance(pipeline.denoiser, MMDiTConfig)
    width, count = pipeline.denoiser.joint_attention_dim, states.shape[0]
    t5 = jnp.zeros((count, length, width), states.dtype) if t5_states is None else jnp.asarray(t5_states, states.dtype)
    if t5.ndim != 3 or (t5.shape[0], t5.shape[2]) != (count, width):
        raise ValueError(f"t5_states of shape {t5.shape} for {count} prompts; give [{count}, L, {width}]")
    states = jnp.pad(states, ((0, 0), (0, 0), (0, width - states.shape[-1])))
    return jnp.concatenate([states, t5], axis=1)

"""Captions and prompts as the commands encode them: CLIP's states, a T5's that were made before, and no text at all."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.cli.console import UsageError, say
from dpo_jax.cli.images.models import Entries, OpenPipeline
from dpo_jax.diffusion.data.cache import content_key
from dpo_jax.diffusion.data.t5_states import T5States, open_t5_states
from dpo_jax.diffusion.models.folder import load_encoders
from dpo_jax.diffusion.models.text import empty_text, encode_text
from dpo_jax.diffusion.types import TextCondition
from dpo_jax.sharding import make_mesh

_SHOWN = 80  # letters of a text that an error shows


def open_t5(model: OpenPipeline, place: str | None) -> T5States | None:
    """The states that --t5-states names; without them a model that reads a T5 gets zeros, which is said.

    Raises:
      UsageError: no such place, states of another width, or a model that reads none.
    """
    if model.t5_width is None:
        if place is not None:
            raise UsageError(f"--t5-states has no effect: {model.pipeline.folder} reads no T5")
        return None
    if place is None:
        there = "which is not run here; --t5-states gives its states" if model.pipeline.names_t5 else "and has none"
        say(f"{model.pipeline.folder} reads a T5, {there}: zeros stand for them, as in diffusers without the encoder")
        return None
    if not Path(place).exists():
        raise UsageError(f"--t5-states {place}: no such file or folder")
    states = open_t5_states(place)
    if states.shape[1] != model.t5_width:
        wide = f"{states.shape[1]} numbers; the model reads {model.t5_width}"
        raise UsageError(f"--t5-states {place} has states of {wide}")
    return states


def require_states(t5: T5States | None, texts: Sequence[str]) -> None:
    """Raise UsageError for the first text without states."""
    if t5 is None:
        return
    if missing := [text for text in texts if text not in t5]:
        raise UsageError(lacking(t5, missing[0]))


def lacking(t5: T5States, text: str) -> str:
    """What is wrong with a text without states."""
    shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    return f"--t5-states {t5.place} has no states of the text {shown!r}; add them with write_t5_states"


def text_key(fingerprint: str, t5: T5States | None, text: str | None) -> str:
    """Key of a text's entry in the cache; None is no text at all.

    Args:
      fingerprint: of the encoders (`OpenPipeline.text_fingerprint`).
    """
    made_of = [] if t5 is None else [t5.fingerprint(text or "")]
    return content_key(fingerprint, "float16", *([] if text is None else ["text", text]), *made_of)


def text_encoder(model: OpenPipeline, t5: T5States | None = None) -> Callable[[Sequence[str | None]], Entries]:
    """`encode(texts)` gives the cache's entries of texts, on this process's first device.

    None is no text at all, what guidance leads away from by default: zeros where the pipeline says so (SDXL), otherwise
    the empty text.
    """
    pipeline = model.pipeline
    encoders = load_encoders(pipeline, mesh=make_mesh(devices=jax.local_devices()[:1]))

    def encode(texts: Sequence[str | None]) -> Entries:
        given = None if t5 is None else np.stack([t5[text or ""] for text in texts]).astype(np.float32)
        said = entries(encode_text(pipeline, encoders, [text or "" for text in texts], t5_states=given))
        if not (model.zeroes_no_text and None in texts):
            return said
        (nothing,) = entries(empty_text(pipeline, encoders))
        return [nothing if text is None else entry for text, entry in zip(texts, said)]

    def entries(said: TextCondition) -> Entries:
        named = {"states": said.states, "pooled": said.pooled}
        arrays = {name: np.asarray(array) for name, array in named.items() if array is not None}
        return [{name: array[place] for name, array in arrays.items()} for place in range(len(said.states))]

    return encode


def halved(entry: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """An entry as the cache keeps it: in float16, as latents are, which moves a number by a 2048th part at most.

    Raises:
      ValueError: a number beyond float16.
    """
    for name, array in entry.items():
        if not np.abs(array).max() <= np.finfo(np.float16).max:
            raise ValueError(f"{name} of a text reach {np.abs(array).max():g}, which the cache's float16 cannot hold")
    return {name: array.astype(np.float16) for name, array in entry.items()}


def condition_of(entry: dict[str, np.ndarray], model: OpenPipeline) -> TextCondition:
    """An entry's condition for whole images of the model's size, leaves [1, ...], as a process keeps it."""
    side = float(model.resolution)
    sizes = np.array([[side, side, 0, 0, side, side]], np.float32) if model.wants_sizes else None
    pooled = None if "pooled" not in entry else jnp.asarray(entry["pooled"])[None]
    return TextCondition(jnp.asarray(entry["states"])[None], pooled, sizes)

"""Which next tokens may be drawn, and how likely: pure functions of logits.

Order: repetition penalty, temperature, top-k, top-p, min-p, then normalisation. Words that are ruled out stand at -inf.
Shapes: logits and log-probabilities [..., V], float32.

>>> import jax.numpy as jnp
>>> logits = jnp.log(jnp.array([0.5, 0.25, 0.15, 0.1]))
>>> print(jnp.exp(filtered_logps(logits, Sampling(top_p=0.7))).round(3))
[0.667 0.333 0.    0.   ]
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from dpo_jax.ops import require_between, require_positive
from dpo_jax.types import Array


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The defaults draw from the model itself.

    Attributes:
      temperature: logits are divided by it; 0 takes the most probable token (the first of equals).
      top_k: keep the k most probable words, and all that equal the last of them; 0 keeps all.
      top_p: keep the most probable words until their mass reaches p; 1 keeps all.
      min_p: keep words of at least this share of the largest probability; 0 keeps all.
      repetition_penalty: logits of words that prompt or completion hold are divided by it if positive, multiplied if
        negative (Keskar et al. 2019, arXiv 1909.05858); 1 changes nothing.

    Raises:
      ValueError: a number out of its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        require_between(0.0, math.inf, temperature=self.temperature, top_k=self.top_k)
        require_between(0.0, 1.0, min_p=self.min_p, top_p=self.top_p)
        require_positive(top_p=self.top_p, repetition_penalty=self.repetition_penalty)


UNFILTERED = Sampling()
GREEDY = Sampling(temperature=0.0)


def penalise_repetition(logits: Array, seen: Array, *, penalty: float) -> Array:
    """Logits of the words in `seen` (bool [..., V]) moved towards the improbable by a penalty above 1."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Array, *, k: int) -> Array:
    """The k largest logits and all that equal the k-th; the rest at -inf."""
    smallest = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][..., -1:]
    return jnp.where(logits < smallest, -jnp.inf, logits)


def keep_top_p(logits: Array, *, p: float) -> Array:
    """Words in order of probability while the mass before them is below p (the first always); the rest at -inf."""
    order = jnp.argsort(-logits, axis=-1, stable=True)
    probs = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), order, axis=-1)
    kept = (jnp.cumsum(probs, axis=-1) - probs < p).at[..., 0].set(True)
    kept = jnp.take_along_axis(kept, jnp.argsort(order, axis=-1), axis=-1)
    return jnp.where(kept, logits, -jnp.inf)


def keep_min_p(logits: Array, *, p: float) -> Array:
    """Words of at least p times the largest probability; the rest at -inf."""
    return jnp.where(logits < jnp.max(logits, axis=-1, keepdims=True) + math.log(p), -jnp.inf, logits)


def filtered_logps(logits: Array, sampling: Sampling, seen: Array | None = None) -> Array:
    """Log-probabilities that tokens are drawn with, float32 [..., V]; at temperature 0 all mass is on one word.

    Args:
      logits: [..., V].
      seen: bool [..., V], words of prompt and completion so far; needed by a repetition penalty.

    Raises:
      ValueError: a repetition penalty without `seen`.
    """
    logits = logits.astype(jnp.float32)
    if sampling.repetition_penalty != 1:
        if seen is None:
            raise ValueError(
                "a repetition penalty needs `seen`, the words of prompt and completion; give bool [..., V]"
            )
        logits = penalise_repetition(logits, seen, penalty=sampling.repetition_penalty)
    if sampling.temperature == 0:
        best = jnp.argmax(logits, axis=-1)[..., None] == jnp.arange(logits.shape[-1])
        return jnp.where(best, 0.0, -jnp.inf)
    logits = logits / sampling.temperature
    if sampling.top_k > 0:
        logits = keep_top_k(logits, k=sampling.top_k)
    if sampling.top_p < 1:
        logits = keep_top_p(logits, p=sampling.top_p)
    if sampling.min_p > 0:
        logits = keep_min_p(logits, p=sampling.min_p)
    return jax.nn.log_softmax(logits, axis=-1)

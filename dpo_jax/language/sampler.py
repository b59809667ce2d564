"""Sampling completions with a key-value cache: one prefill, then a scan over new tokens."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.language.types import Prediction
from dpo_jax.types import Array, PyTree

# (tokens [N, Q], positions [N, Q], cache, start [], mask [N, Q, C]) -> (Prediction, cache)
DecodeFunction = Callable[[Array, Array, PyTree, Array, Array], tuple[Prediction, PyTree]]


class Samples(NamedTuple):
    """Sampled completions.

    Attributes:
      tokens: int32 [N, T], `pad` after the end.
      mask: float32 [N, T], one at sampled tokens, EOS included.
      logps: float32 [N, T] of the sampled tokens under the model itself (temperature 1), zero after it.
    """

    tokens: Array
    mask: Array
    logps: Array


def pad_prompts(prompts: Sequence[np.ndarray], *, pad: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Prompts padded on the left, so that all of them end in the same column.

    Returns:
      tokens int32 [N, P], and lengths int32 [N].
    """
    longest = max(map(len, prompts))
    tokens = np.full((len(prompts), longest), pad, np.int32)
    for row, prompt in zip(tokens, prompts):
        row[longest - len(prompt) :] = prompt
    return tokens, np.array([len(prompt) for prompt in prompts], np.int32)


def sample(
    decode: DecodeFunction,
    cache: PyTree,
    prompts: Array,
    lengths: Array,
    key: Array,
    *,
    new_tokens: int,
    eos: int,
    pad: int = 0,
    temperature: float = 1.0,
) -> Samples:
    """Sample one completion for each prompt; pure, to be jitted by the caller.

    Args:
      decode: the model with its variables filled in.
      cache: empty, with at least P + new_tokens columns.
      prompts: int32 [N, P], padded on the left (`pad_prompts`).
      lengths: int32 [N] of the prompts.
      key: typed PRNG key.
      new_tokens: T, most tokens of a completion; one that has no EOS by then stays without.
      eos: id that ends a completion.
      pad: id that stands after the end.
      temperature: of the sampling; 0 takes the most probable token.

    Raises:
      ValueError: a negative temperature.
    """
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}; give 0 (greedy) or more")
    count, width = prompts.shape
    columns = jax.tree.leaves(cache)[0].shape[2]
    first = width - lengths  # column of each prompt's first token
    column = jnp.arange(columns)

    def positions(at: Array) -> Array:
        return jnp.maximum(at - first[:, None], 0)  # [Q] columns -> [N, Q]

    def seen(at: Array) -> Array:
        return (column >= first[:, None, None]) & (column <= at[:, None])  # [N, Q, C]

    def next_token(prediction: Prediction, key: Array) -> tuple[Array, Array]:
        logps = jax.nn.log_softmax(_logits(prediction))
        scaled = logps if temperature == 0 else logps / temperature + jax.random.gumbel(key, logps.shape)
        token = jnp.argmax(scaled, axis=-1)
        return token, jnp.take_along_axis(logps, token[:, None], axis=-1)[:, 0]

    places = jnp.arange(width)
    prediction, cache = decode(prompts, positions(places), cache, jnp.int32(0), seen(places))

    def step(carry: tuple, number: Array) -> tuple[tuple, tuple[Array, Array, Array]]:
        last, cache, done = carry
        token, logp = next_token(last, jax.random.fold_in(key, number))
        token = jnp.where(done, pad, token).astype(jnp.int32)
        at = (width + number)[None]
        prediction, cache = decode(token[:, None], positions(at), cache, at[0], seen(at))
        return (prediction, cache, done | (token == eos)), (token, ~done, jnp.where(done, 0.0, logp))

    start = (prediction._replace(hidden=prediction.hidden[:, -1:]), cache, jnp.zeros(count, bool))
    _, (tokens, alive, logps) = jax.lax.scan(step, start, jnp.arange(new_tokens))
    return Samples(tokens.T, alive.T.astype(jnp.float32), logps.T)


def _logits(prediction: Prediction) -> Array:
    """Float32 [N, V] of the last column."""
    hidden, head = prediction.hidden[:, -1], prediction.head
    logits = jnp.einsum("nd,vd->nv", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
    if prediction.bias is not None:
        logits = logits + prediction.bias
    return logits if prediction.softcap is None else prediction.softcap * jnp.tanh(logits / prediction.softcap)


def sample_completions(
    apply_fn: Callable,
    variables: PyTree,
    empty_cache: Callable[[int, int], PyTree],
    prompts: Sequence[np.ndarray],
    key: Array,
    *,
    new_tokens: int,
    eos: int,
    temperature: float = 1.0,
    batch_size: int = 256,
) -> list[tuple[np.ndarray, ...]]:
    """Completions of any number of prompts, in batches of one compiled shape.

    Args:
      apply_fn: of the model, with a method `decode`.
      variables: of the model, used in place.
      empty_cache: `(rows, columns)` -> cache.
      prompts: int32 arrays.
      key, new_tokens, eos, temperature: as for `sample`.
      batch_size: sequences at a time.

    Returns:
      (tokens int32 [C], log-probs float32 [C]) of each prompt's completion, EOS included where it came.
    """
    width = max(map(len, prompts))

    @jax.jit
    def run(variables: PyTree, tokens: Array, lengths: Array, key: Array) -> Samples:
        decode = partial(apply_fn, variables, method="decode")
        cache = empty_cache(batch_size, width + new_tokens)
        options = {"new_tokens": new_tokens, "eos": eos, "temperature": temperature}
        return sample(decode, cache, tokens, lengths, key, **options)

    results = []
    for start in range(0, len(prompts), batch_size):
        some = list(prompts[start : start + batch_size])
        full = some + [some[0]] * (batch_size - len(some))
        tokens, lengths = pad_prompts([np.asarray(p) for p in full])
        tokens = np.pad(tokens, ((0, 0), (width - tokens.shape[1], 0)))
        samples = jax.device_get(run(variables, tokens, lengths, jax.random.fold_in(key, start)))
        for ids, mask, logps in list(zip(*samples))[: len(some)]:
            results.append((ids[mask > 0], logps[mask > 0]))
    return results

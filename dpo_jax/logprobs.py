"""Token log-probabilities from hidden states and head, without an array of tokens x vocabulary.

Logits exist for one chunk of tokens at a time. The forward pass keeps two numbers per token, the largest logit and
the log of the sum of exponentials over it; the backward pass computes the chunk's logits again (Wijmans et al. 2024,
"Cut Your Losses in Large-Vocabulary Language Models", arXiv 2411.09009):

    u = h W^T + b;  z = c tanh(u / c);  lse = log sum_v exp z_v;  log p(y) = z_y - lse
    dz_v = g ([v = y] - p_v) + l p_v;  du = dz (1 - (z / c)^2);  dh = du W;  dW = du^T h;  db = sum du

with g, l the cotangents of log p and lse. Log-probabilities stay ordinary arrays, so that every loss can use them.
Under a mesh each device works through its own rows (data, fsdp) and its own part of the vocabulary (model); the loop
over chunks holds no collective, what must be summed over devices is summed once after it (`chunked_logits`).
Reverse mode only: there is no second derivative and no forward mode.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from dpo_jax.chunked_logits import (
    IGNORE,
    Axes,
    Projection,
    Softmax,
    default_chunk_size,
    first_word,
    in_dtype_of_hidden,
    in_own_dtypes,
    layout_of,
    logits_of,
    merge_top,
    pull_back,
    require_shapes,
    scan_tokens,
    shifted_logits,
    silenced,
    sum_over,
    weighted_sum,
)
from dpo_jax.types import Array

STATISTICS = ("entropy", "collision", "lse")


def token_logps(
    hidden: Array,
    head: Array,
    labels: Array,
    *,
    bias: Array | None = None,
    softcap: float | None = None,
    chunk_size: int | None = None,
    statistics: Sequence[str] = (),
    frozen_head: bool = False,
) -> dict[str, Array]:
    """Log-probability of each label, and statistics of the same distribution on request.

    Args:
      hidden: [..., D] states that predict the labels; at least one leading axis. Its dtype is the dtype of the matrix
        products, which accumulate in float32. Under a mesh the first axis is split over data and fsdp if it divides.
      head: [V, D], cast to the dtype of `hidden`; its gradient is summed in float32 and returned in its own dtype.
        Under a mesh V is split over model if it divides.
      labels: int32 [...], word ids in [0, V), or IGNORE: such a place gives zeros and no gradient whatever its state
        holds. Any other value gives nan.
      bias: [V] or None; -inf removes a word, such as a padded row of the head (without a soft-cap).
      softcap: logits become `softcap * tanh(logits / softcap)`.
      chunk_size: most tokens whose logits a device holds at a time; by default about as many as make the logits as
        large as its hidden states, within 256 and 2048.
      statistics: any of `entropy` (nats) and `collision` (log sum p^2), both constants without gradient, and `lse`
        (log of the sum of exponentials of the logits), with gradient.
      frozen_head: give head and bias no gradient and save the work for it, a quarter of the step.

    Returns:
      "logps" and the statistics asked for, each float32 [...].

    Raises:
      ValueError: an unknown statistic, or shapes that do not fit.
    """
    if unknown := set(statistics) - set(STATISTICS):
        raise ValueError(f"unknown statistics {sorted(unknown)}; there are {list(STATISTICS)}")
    require_shapes(hidden, head, bias, labels)
    options = _Options(chunk_size or default_chunk_size(hidden, head), softcap, frozen_head, tuple(statistics))
    return _statistics(options, Projection(hidden, head, bias), labels)


def forward_kl(
    hidden: Array,
    head: Array,
    reference_hidden: Array,
    reference_head: Array,
    labels: Array,
    *,
    bias: Array | None = None,
    softcap: float | None = None,
    reference_bias: Array | None = None,
    reference_softcap: float | None = None,
    chunk_size: int | None = None,
    frozen_head: bool = False,
) -> Array:
    """KL(reference || policy) over the vocabulary at each token, with gradient to the policy only.

    dz_v = g (p_v - q_v) with p the policy and q the reference. Float32 rounding leaves about 1e-6 nats, either sign.

    Args:
      hidden, head, bias, softcap: the policy, as in `token_logps`.
      reference_hidden, reference_head, reference_bias, reference_softcap: the reference; its width may differ, its
        vocabulary and the leading axes may not.
      labels: int32 [...]; only IGNORE matters: such a place gives zero and no gradient.
      chunk_size, frozen_head: as in `token_logps`; two chunks of logits are held at a time.

    Returns:
      float32 [...], nats.

    Raises:
      ValueError: shapes that do not fit.
    """
    options = _Options(
        chunk_size or default_chunk_size(hidden, head), softcap, frozen_head, reference_softcap=reference_softcap
    )
    return _kl(options, hidden, head, bias, reference_hidden, reference_head, reference_bias, labels)


def reverse_kl(
    hidden: Array,
    head: Array,
    reference_hidden: Array,
    reference_head: Array,
    labels: Array,
    *,
    bias: Array | None = None,
    softcap: float | None = None,
    reference_bias: Array | None = None,
    reference_softcap: float | None = None,
    chunk_size: int | None = None,
    frozen_head: bool = False,
) -> Array:
    """KL(policy || reference) over the vocabulary at each token, with gradient to the policy only.

    dz_v = g p_v (log p_v - log q_v - KL). Arguments, result and errors are those of `forward_kl`.
    """
    options = _Options(
        chunk_size or default_chunk_size(hidden, head),
        softcap,
        frozen_head,
        reference_softcap=reference_softcap,
        reverse=True,
    )
    return _kl(options, hidden, head, bias, reference_hidden, reference_head, reference_bias, labels)


def logits_logps(logits: Array, labels: Array) -> Array:
    """Log-probability of each label from logits that a foreign model hands over.

    Args:
      logits: [..., V], any float dtype; the softmax is taken in float32.
      labels: int32 [...], or IGNORE for zero without gradient.

    Returns:
      float32 [...].
    """
    keep = labels != IGNORE
    logits = jnp.where(keep[..., None], logits.astype(jnp.float32), 0.0)
    logps = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(logps, jnp.where(keep, labels, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(keep, picked, 0.0)


@dataclass(frozen=True)
class _Options:
    """What is static: one compiled program per value."""

    chunk_size: int
    softcap: float | None
    frozen_head: bool
    statistics: tuple[str, ...] = ()
    reference_softcap: float | None = None
    reverse: bool = False

    @property
    def of_pull_back(self) -> dict[str, Any]:
        return {"chunk_size": self.chunk_size, "softcap": self.softcap, "frozen_head": self.frozen_head}


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _statistics(options: _Options, model: Projection, labels: Array) -> dict[str, Array]:
    return _statistics_forward(options, model, labels)[0]


def _statistics_forward(options: _Options, model: Projection, labels: Array):
    layout = layout_of(model)
    local = partial(_local_statistics, options, layout.vocabulary, model.head.shape[0])
    run = layout.spread(local, (layout.model, layout.tokens), (layout.tokens, layout.tokens))
    results, softmax = run(in_dtype_of_hidden(model), labels)
    return results, (model, labels, softmax)


def _local_statistics(
    options: _Options, vocabulary: Axes, words: int, model: Projection, labels: Array
) -> tuple[dict[str, Array], Softmax]:
    first = first_word(model, vocabulary)

    def chunk(_, tokens):
        labels, hidden = tokens
        logits = logits_of(model._replace(hidden=silenced(hidden, labels)), options.softcap)
        top, shifted, weights = shifted_logits(logits)
        local = labels - first
        owned = (local >= 0) & (local < logits.shape[1])
        picked = jnp.take_along_axis(logits, jnp.where(owned, local, 0)[:, None], axis=1)[:, 0]
        sums = {"top": top, "total": jnp.sum(weights, axis=-1), "label": jnp.where(owned, picked, 0.0)}
        if "entropy" in options.statistics:
            sums["shifted"] = weighted_sum(weights, shifted)
        if "collision" in options.statistics:
            sums["squares"] = jnp.sum(jnp.square(weights), axis=-1)
        return None, sums

    _, sums = scan_tokens(chunk, None, labels, model.hidden, chunk_size=options.chunk_size)
    top, below = merge_top(sums["top"], vocabulary)
    scale = jnp.exp(below)
    total = sum_over(sums["total"] * scale, vocabulary)
    softmax = Softmax(top, jnp.log(total))
    logps = (sum_over(sums["label"], vocabulary) - top) - softmax.log_total
    results = {"logps": jnp.where((labels >= 0) & (labels < words), logps, jnp.nan)}
    if "entropy" in options.statistics:
        # H = log S - sum w (z - top) / S, free of the cancellation in lse - sum p z.
        shifted = sum_over(scale * (sums["shifted"] + below * sums["total"]), vocabulary)
        results["entropy"] = softmax.log_total - shifted / total
    if "collision" in options.statistics:
        squares = sum_over(jnp.square(scale) * sums["squares"], vocabulary)
        results["collision"] = jnp.log(squares) - 2 * softmax.log_total
    if "lse" in options.statistics:
        results["lse"] = top + softmax.log_total
    return {name: jnp.where(labels != IGNORE, value, 0.0) for name, value in results.items()}, softmax


def _statistics_backward(options: _Options, residuals, cotangents: dict[str, Array]):
    model, labels, softmax = residuals
    layout = layout_of(model)
    # Entropy and collision are constants: their cotangents are dropped here.
    gradient = cotangents["logps"]
    lse_gradient = cotangents.get("lse", jnp.zeros_like(gradient))

    def local(model: Projection, labels: Array, softmax: Softmax, gradient: Array, lse_gradient: Array):
        first = first_word(model, layout.vocabulary)

        def logits_gradient(logits: Array, labels: Array, top: Array, log_total: Array, g: Array, l: Array) -> Array:
            p = jnp.exp(Softmax(top, log_total).log_p(logits))
            words = jax.lax.broadcasted_iota(labels.dtype, logits.shape, 1)
            is_label = words == (labels - first)[:, None]
            return jnp.where(is_label, g[:, None], 0.0) - (g - l)[:, None] * p

        tokens = (*softmax, gradient, lse_gradient)
        return pull_back(logits_gradient, layout, model, labels, *tokens, **options.of_pull_back)

    inputs = (layout.model, *[layout.tokens] * 4)
    run = layout.spread(local, inputs, tuple(layout.model))
    gradients = run(in_dtype_of_hidden(model), labels, softmax, gradient, lse_gradient)
    return in_own_dtypes(model, gradients), None


_statistics.defvjp(_statistics_forward, _statistics_backward)


def _kl(options: _Options, hidden, head, bias, reference_hidden, reference_head, reference_bias, labels) -> Array:
    require_shapes(hidden, head, bias, labels)
    require_shapes(reference_hidden, reference_head, reference_bias, labels)
    if head.shape[0] != reference_head.shape[0]:
        raise ValueError(f"heads {head.shape} and {reference_head.shape} have different vocabularies")
    reference = Projection(reference_hidden, reference_head, reference_bias)
    return _divergence(options, Projection(hidden, head, bias), reference, labels)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _divergence(options: _Options, policy: Projection, reference: Projection, labels: Array) -> Array:
    return _divergence_forward(options, policy, reference, labels)[0]


def _divergence_forward(options: _Options, policy: Projection, reference: Projection, labels: Array):
    layout = layout_of(policy)
    softcaps = (options.softcap, options.reference_softcap)
    models = (in_dtype_of_hidden(policy), in_dtype_of_hidden(reference))
    order = 1 if options.reverse else -1  # KL(first || second): the policy stands first in the reverse divergence
    local = partial(_local_divergence, options.chunk_size, softcaps[::order], layout.vocabulary)
    run = layout.spread(local, (layout.model, layout.model, layout.tokens), (layout.tokens,) * 3)
    kl, *softmaxes = run(*models[::order], labels)
    return kl, (policy, reference, labels, kl, *softmaxes[::order])


def _local_divergence(
    chunk_size: int,
    softcaps: tuple[float | None, ...],
    vocabulary: Axes,
    first: Projection,
    second: Projection,
    labels: Array,
) -> tuple[Array, Softmax, Softmax]:
    """KL(first || second) [...] and the softmax of both."""

    def chunk(_, tokens):
        labels, *hidden = tokens
        models = [m._replace(hidden=silenced(h, labels)) for m, h in zip((first, second), hidden)]
        tops, shifted, weights = zip(*(shifted_logits(logits_of(m, c)) for m, c in zip(models, softcaps)))
        totals = tuple(jnp.sum(w, axis=-1) for w in weights)
        return None, (tops, totals, weighted_sum(weights[0], shifted[0] - shifted[1]))

    _, (tops, totals, gap) = scan_tokens(chunk, None, labels, first.hidden, second.hidden, chunk_size=chunk_size)
    (top, below), (second_top, second_below) = (merge_top(t, vocabulary) for t in tops)
    # KL = sum p ((z - top) - (z' - top')) - log S + log S', where on this part p = exp(below) w / S.
    mass = totals[0] * jnp.exp(below)
    total = sum_over(mass, vocabulary)
    second_total = sum_over(totals[1] * jnp.exp(second_below), vocabulary)
    gap = sum_over(jnp.exp(below) * gap + mass * (below - second_below), vocabulary)
    softmaxes = Softmax(top, jnp.log(total)), Softmax(second_top, jnp.log(second_total))
    kl = gap / total - (softmaxes[0].log_total - softmaxes[1].log_total)
    return jnp.where(labels != IGNORE, kl, 0.0), *softmaxes


def _divergence_backward(options: _Options, residuals, gradient: Array):
    policy, reference, labels, kl, softmax, other = residuals
    layout = layout_of(policy)

    def local(policy, reference, labels, kl, softmax, other, gradient):
        def logits_gradient(logits, labels, reference_hidden, kl, g, top, log_total, other_top, other_total) -> Array:
            frozen = reference._replace(hidden=silenced(reference_hidden, labels))
            log_p = Softmax(top, log_total).log_p(logits)
            log_q = Softmax(other_top, other_total).log_p(logits_of(frozen, options.reference_softcap))
            p = jnp.exp(log_p)
            if options.reverse:
                return g[:, None] * jnp.where(p > 0, p * (log_p - log_q - kl[:, None]), 0.0)
            return g[:, None] * (p - jnp.exp(log_q))

        tokens = (reference.hidden, kl, gradient, *softmax, *other)
        return pull_back(logits_gradient, layout, policy, labels, *tokens, **options.of_pull_back)

    inputs = (layout.model, layout.model, *[layout.tokens] * 5)
    run = layout.spread(local, inputs, tuple(layout.model))
    arguments = (in_dtype_of_hidden(policy), in_dtype_of_hidden(reference), labels, kl, softmax, other, gradient)
    return in_own_dtypes(policy, run(*arguments)), None, None


_divergence.defvjp(_divergence_forward, _divergence_backward)

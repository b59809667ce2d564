"""Token log-probabilities from hidden states and head, without an array of tokens x vocabulary.

Logits exist for one chunk of tokens at a time. The forward pass keeps two numbers per token, the largest logit and
the log of the sum of exponentials over it; the backward pass computes the chunk's logits again (Wijmans et al. 2024,
"Cut Your Losses in Large-Vocabulary Language Models", arXiv 2411.09009):

    u = h W^T + b;  z = c tanh(u / c);  lse = log sum_v exp z_v;  log p(y) = z_y - lse
    dz_v = g ([v = y] - p_v) + l p_v;  du = dz (1 - (z / c)^2);  dh = du W;  dW = du^T h;  db = sum du

with g, l the cotangents of log p and lse. Log-probabilities stay ordinary arrays, so that every loss can use them.
Under a mesh each device works through its own rows (data, fsdp) and its own part of the vocabulary (model); the loop
over chunks holds no collective, what must be summed over devices is summed once after it.
Reverse mode only: there is no second derivative and no forward mode.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax.sharding import BATCH_AXES, MODEL_AXIS, P, active_mesh, axes_size, fit_spec
from dpo_jax.types import Array, PyTree

IGNORE = -100  # label of a place that holds no token
STATISTICS = ("entropy", "collision", "lse")

# Floor of the largest logit: a shard of the vocabulary whose words are all at -inf must not give inf - inf.
_LOWEST = -1e30

_Axes = str | tuple[str, ...] | None  # of a mesh; None: not split


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
    _require_shapes(hidden, head, bias, labels)
    options = _Options(chunk_size or _chunk_size(hidden, head), softcap, frozen_head, tuple(statistics))
    return _statistics(options, _Model(hidden, head, bias), labels)


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
        chunk_size or _chunk_size(hidden, head), softcap, frozen_head, reference_softcap=reference_softcap
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
        chunk_size or _chunk_size(hidden, head), softcap, frozen_head, reference_softcap=reference_softcap, reverse=True
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


class _Model(NamedTuple):
    """Hidden states [..., D] with the head [V, D] and bias [V] that turn them into logits."""

    hidden: Array
    head: Array
    bias: Array | None


class _Softmax(NamedTuple):
    """Largest logit and log of the sum of exponentials over it, float32 [...].

    Kept apart: their sum would round log p by 1e-3 where logits are near 1e4.
    """

    top: Array
    log_total: Array

    def log_p(self, logits: Array) -> Array:
        return (logits - self.top[:, None]) - self.log_total[:, None]


class _Layout(NamedTuple):
    """How a call lies on the active mesh: the axes that split the rows, and the axis that splits the vocabulary."""

    mesh: jax.sharding.AbstractMesh | None
    rows: _Axes
    vocabulary: _Axes

    def spread(self, function: Callable, inputs: tuple, outputs: tuple | P) -> Callable:
        """The function on each device's own part, under shard_map if there is a mesh."""
        if self.mesh is None:
            return function
        # Without replication checks: carries start from zeros, and what is summed over devices is summed by hand.
        return jax.shard_map(function, mesh=self.mesh, in_specs=inputs, out_specs=outputs, check_vma=False)

    @property
    def tokens(self) -> P:
        return P(self.rows)

    @property
    def model(self) -> _Model:
        return _Model(P(self.rows), P(self.vocabulary), P(self.vocabulary))  # type: ignore[arg-type]


def _layout(model: _Model) -> _Layout:
    mesh = active_mesh()
    if mesh is None:
        return _Layout(None, None, None)
    rows = fit_spec(P(BATCH_AXES), model.hidden.shape, mesh)[0]
    return _Layout(mesh, rows, fit_spec(P(MODEL_AXIS), model.head.shape, mesh)[0])


def _chunk_size(hidden: Array, head: Array) -> int:
    """Tokens in a chunk whose logits take about the memory of a device's hidden states."""
    layout = _layout(_Model(hidden, head, None))
    shards = 1 if layout.mesh is None else axes_size(layout.mesh, layout.rows)
    words = head.shape[0] // (1 if layout.mesh is None else axes_size(layout.mesh, layout.vocabulary))
    balanced = hidden.size // shards // max(words, 1)
    return min(max(1 << max(balanced - 1, 0).bit_length(), 256), 2048)


def _require_shapes(hidden: Array, head: Array, bias: Array | None, labels: Array) -> None:
    if hidden.shape[:-1] != labels.shape or not labels.shape:
        raise ValueError(f"hidden {hidden.shape} must be labels {labels.shape} with one more axis, at least [N, D]")
    if head.ndim != 2 or head.shape[1] != hidden.shape[-1]:
        raise ValueError(f"head {head.shape} must be [V, D] with the D of hidden {hidden.shape}")
    if bias is not None and bias.shape != head.shape[:1]:
        raise ValueError(f"bias {bias.shape} must be [V] with the V of head {head.shape}")


def _in_dtype_of_hidden(model: _Model) -> _Model:
    # Once per call and before the head is gathered over the mesh, not once per chunk.
    return model._replace(head=model.head.astype(model.hidden.dtype))


def _sum(x: Array, axes: _Axes) -> Array:
    return x if axes is None else jax.lax.psum(x, axes)


def _logits(model: _Model, softcap: float | None) -> Array:
    """Float32 [c, v] of a chunk [c, D] under a part of the vocabulary [v, D]."""
    logits = jnp.einsum("cd,vd->cv", model.hidden, model.head, preferred_element_type=jnp.float32)
    if model.bias is not None:
        logits = logits + model.bias.astype(jnp.float32)
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def _scan_tokens(
    step: Callable, carry: PyTree, labels: Array, *tokens: Array, chunk_size: int
) -> tuple[PyTree, PyTree]:
    """`lax.scan` over chunks of equal size; `step(carry, (labels, *tokens))` sees [c], [c, ...] of each array.

    The leading axes are merged, and padded with IGNORE to a multiple of the chunk; results come back without padding.
    """
    shape, count = labels.shape, labels.size
    chunks = max(1, -(-count // chunk_size))
    size = max(1, -(-count // chunks))

    def split(x: Array, fill: int = 0) -> Array:
        x = x.reshape(count, *x.shape[len(shape) :])
        x = jnp.pad(x, [(0, chunks * size - count)] + [(0, 0)] * (x.ndim - 1), constant_values=fill)
        return x.reshape(chunks, size, *x.shape[1:])

    carry, results = jax.lax.scan(step, carry, (split(labels, IGNORE), *map(split, tokens)))

    def merge(x: Array) -> Array:
        return x.reshape(chunks * size, *x.shape[2:])[:count].reshape(*shape, *x.shape[2:])

    return carry, jax.tree.map(merge, results)


def _silence(hidden: Array, labels: Array) -> Array:
    """Zero states where there is no label: a nan there would reach the head's gradient as 0 * nan."""
    return jnp.where((labels != IGNORE)[:, None], hidden, 0)


def _shifted(logits: Array) -> tuple[Array, Array, Array]:
    """Largest logit [c]; logits less it, and their exponentials, [c, v]."""
    top = jnp.maximum(jnp.max(logits, axis=-1), _LOWEST)
    shifted = logits - top[:, None]
    return top, shifted, jnp.exp(shifted)


def _weighted_sum(weights: Array, values: Array) -> Array:
    """Sum over words of weight times value; a word of weight zero adds nothing even if its value is -inf or nan."""
    return jnp.sum(jnp.where(weights > 0, weights * values, 0.0), axis=-1)


def _merge_top(top: Array, vocabulary: _Axes) -> tuple[Array, Array]:
    """Largest logit of all parts of the vocabulary, and the (negative) distance of this part's own to it."""
    whole = top if vocabulary is None else jax.lax.pmax(top, vocabulary)
    return whole, top - whole


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _statistics(options: _Options, model: _Model, labels: Array) -> dict[str, Array]:
    return _statistics_forward(options, model, labels)[0]


def _statistics_forward(options: _Options, model: _Model, labels: Array):
    layout = _layout(model)
    local = partial(_local_statistics, options, layout.vocabulary, model.head.shape[0])
    run = layout.spread(local, (layout.model, layout.tokens), (layout.tokens, layout.tokens))
    results, softmax = run(_in_dtype_of_hidden(model), labels)
    return results, (model, labels, softmax)


def _local_statistics(
    options: _Options, vocabulary: _Axes, words: int, model: _Model, labels: Array
) -> tuple[dict[str, Array], _Softmax]:
    first = _first_word(model, vocabulary)

    def chunk(_, tokens):
        labels, hidden = tokens
        logits = _logits(model._replace(hidden=_silence(hidden, labels)), options.softcap)
        top, shifted, weights = _shifted(logits)
        local = labels - first
        owned = (local >= 0) & (local < logits.shape[1])
        picked = jnp.take_along_axis(logits, jnp.where(owned, local, 0)[:, None], axis=1)[:, 0]
        sums = {"top": top, "total": jnp.sum(weights, axis=-1), "label": jnp.where(owned, picked, 0.0)}
        if "entropy" in options.statistics:
            sums["shifted"] = _weighted_sum(weights, shifted)
        if "collision" in options.statistics:
            sums["squares"] = jnp.sum(jnp.square(weights), axis=-1)
        return None, sums

    _, sums = _scan_tokens(chunk, None, labels, model.hidden, chunk_size=options.chunk_size)
    top, below = _merge_top(sums["top"], vocabulary)
    scale = jnp.exp(below)
    total = _sum(sums["total"] * scale, vocabulary)
    softmax = _Softmax(top, jnp.log(total))
    logps = (_sum(sums["label"], vocabulary) - top) - softmax.log_total
    results = {"logps": jnp.where((labels >= 0) & (labels < words), logps, jnp.nan)}
    if "entropy" in options.statistics:
        # H = log S - sum w (z - top) / S, free of the cancellation in lse - sum p z.
        shifted = _sum(scale * (sums["shifted"] + below * sums["total"]), vocabulary)
        results["entropy"] = softmax.log_total - shifted / total
    if "collision" in options.statistics:
        squares = _sum(jnp.square(scale) * sums["squares"], vocabulary)
        results["collision"] = jnp.log(squares) - 2 * softmax.log_total
    if "lse" in options.statistics:
        results["lse"] = top + softmax.log_total
    return {name: jnp.where(labels != IGNORE, value, 0.0) for name, value in results.items()}, softmax


def _first_word(model: _Model, vocabulary: _Axes) -> Array | int:
    """Id of the first word in this device's part of the vocabulary."""
    return 0 if vocabulary is None else jax.lax.axis_index(vocabulary) * model.head.shape[0]


def _statistics_backward(options: _Options, residuals, cotangents: dict[str, Array]):
    model, labels, softmax = residuals
    layout = _layout(model)
    # Entropy and collision are constants: their cotangents are dropped here.
    gradient = cotangents["logps"]
    lse_gradient = cotangents.get("lse", jnp.zeros_like(gradient))

    def local(model: _Model, labels: Array, softmax: _Softmax, gradient: Array, lse_gradient: Array):
        first = _first_word(model, layout.vocabulary)

        def logits_gradient(logits: Array, labels: Array, top: Array, log_total: Array, g: Array, l: Array) -> Array:
            p = jnp.exp(_Softmax(top, log_total).log_p(logits))
            words = jax.lax.broadcasted_iota(labels.dtype, logits.shape, 1)
            is_label = words == (labels - first)[:, None]
            return jnp.where(is_label, g[:, None], 0.0) - (g - l)[:, None] * p

        return _pull_back(options, layout, logits_gradient, model, labels, *softmax, gradient, lse_gradient)

    inputs = (layout.model, *[layout.tokens] * 4)
    run = layout.spread(local, inputs, tuple(layout.model))
    gradients = run(_in_dtype_of_hidden(model), labels, softmax, gradient, lse_gradient)
    return _as_model(model, gradients), None


_statistics.defvjp(_statistics_forward, _statistics_backward)


def _pull_back(
    options: _Options, layout: _Layout, logits_gradient: Callable, model: _Model, labels: Array, *tokens: Array
) -> tuple[Array, Array | None, Array | None]:
    """Gradients of hidden [..., D], head [v, D] and bias [v] (float32, None if frozen) from the gradient of the logits.

    `logits_gradient(logits [c, v], labels [c], *tokens [c, ...]) -> [c, v]` is called once per chunk.
    """
    dtype = model.hidden.dtype
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (model.head, model.bias))
    # Partial sums over the vocabulary are added up across devices before they are rounded.
    hidden_dtype = dtype if layout.vocabulary is None else jnp.float32

    def chunk(totals, chunked):
        labels, hidden, *rest = chunked
        hidden = _silence(hidden, labels)
        logits = _logits(model._replace(hidden=hidden), options.softcap)
        slope = logits_gradient(logits, labels, *rest)
        if options.softcap is not None:
            slope = slope * (1 - jnp.square(logits / options.softcap))
        slope = jnp.where((labels != IGNORE)[:, None], slope, 0.0)
        rounded = slope.astype(dtype)
        d_hidden = jnp.einsum("cv,vd->cd", rounded, model.head, preferred_element_type=jnp.float32)
        if not options.frozen_head:
            d_head, d_bias = totals
            d_head = d_head + jnp.einsum("cv,cd->vd", rounded, hidden, preferred_element_type=jnp.float32)
            totals = d_head, None if d_bias is None else d_bias + jnp.sum(slope, axis=0)
        return totals, d_hidden.astype(hidden_dtype)

    start = None if options.frozen_head else zeros
    totals, d_hidden = _scan_tokens(chunk, start, labels, model.hidden, *tokens, chunk_size=options.chunk_size)
    d_hidden = _sum(d_hidden, layout.vocabulary).astype(dtype)
    if totals is None:
        return d_hidden, None, None
    return d_hidden, *jax.tree.map(lambda x: _sum(x, layout.rows), totals)


def _as_model(model: _Model, gradients: tuple[Array, Array | None, Array | None]) -> _Model:
    """Gradients in the dtypes of the arguments; zeros where they were not computed."""
    return _Model(*(None if g is None else g.astype(x.dtype) for x, g in zip(model, gradients)))  # type: ignore[union-attr, arg-type]


def _kl(options: _Options, hidden, head, bias, reference_hidden, reference_head, reference_bias, labels) -> Array:
    _require_shapes(hidden, head, bias, labels)
    _require_shapes(reference_hidden, reference_head, reference_bias, labels)
    if head.shape[0] != reference_head.shape[0]:
        raise ValueError(f"heads {head.shape} and {reference_head.shape} have different vocabularies")
    reference = _Model(reference_hidden, reference_head, reference_bias)
    return _divergence(options, _Model(hidden, head, bias), reference, labels)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _divergence(options: _Options, policy: _Model, reference: _Model, labels: Array) -> Array:
    return _divergence_forward(options, policy, reference, labels)[0]


def _divergence_forward(options: _Options, policy: _Model, reference: _Model, labels: Array):
    layout = _layout(policy)
    softcaps = (options.softcap, options.reference_softcap)
    models = (_in_dtype_of_hidden(policy), _in_dtype_of_hidden(reference))
    order = 1 if options.reverse else -1  # KL(first || second): the policy stands first in the reverse divergence
    local = partial(_local_divergence, options.chunk_size, softcaps[::order], layout.vocabulary)
    run = layout.spread(local, (layout.model, layout.model, layout.tokens), (layout.tokens,) * 3)
    kl, *softmaxes = run(*models[::order], labels)
    return kl, (policy, reference, labels, kl, *softmaxes[::order])


def _local_divergence(
    chunk_size: int,
    softcaps: tuple[float | None, ...],
    vocabulary: _Axes,
    first: _Model,
    second: _Model,
    labels: Array,
) -> tuple[Array, _Softmax, _Softmax]:
    """KL(first || second) [...] and the softmax of both."""

    def chunk(_, tokens):
        labels, *hidden = tokens
        models = [m._replace(hidden=_silence(h, labels)) for m, h in zip((first, second), hidden)]
        tops, shifted, weights = zip(*(_shifted(_logits(m, c)) for m, c in zip(models, softcaps)))
        totals = tuple(jnp.sum(w, axis=-1) for w in weights)
        return None, (tops, totals, _weighted_sum(weights[0], shifted[0] - shifted[1]))

    _, (tops, totals, gap) = _scan_tokens(chunk, None, labels, first.hidden, second.hidden, chunk_size=chunk_size)
    (top, below), (second_top, second_below) = (_merge_top(t, vocabulary) for t in tops)
    # KL = sum p ((z - top) - (z' - top')) - log S + log S', where on this part p = exp(below) w / S.
    mass = totals[0] * jnp.exp(below)
    total = _sum(mass, vocabulary)
    second_total = _sum(totals[1] * jnp.exp(second_below), vocabulary)
    gap = _sum(jnp.exp(below) * gap + mass * (below - second_below), vocabulary)
    softmaxes = _Softmax(top, jnp.log(total)), _Softmax(second_top, jnp.log(second_total))
    kl = gap / total - (softmaxes[0].log_total - softmaxes[1].log_total)
    return jnp.where(labels != IGNORE, kl, 0.0), *softmaxes


def _divergence_backward(options: _Options, residuals, gradient: Array):
    policy, reference, labels, kl, softmax, other = residuals
    layout = _layout(policy)

    def local(policy, reference, labels, kl, softmax, other, gradient):
        def logits_gradient(logits, labels, reference_hidden, kl, g, top, log_total, other_top, other_total) -> Array:
            silenced = reference._replace(hidden=_silence(reference_hidden, labels))
            log_p = _Softmax(top, log_total).log_p(logits)
            log_q = _Softmax(other_top, other_total).log_p(_logits(silenced, options.reference_softcap))
            p = jnp.exp(log_p)
            if options.reverse:
                return g[:, None] * jnp.where(p > 0, p * (log_p - log_q - kl[:, None]), 0.0)
            return g[:, None] * (p - jnp.exp(log_q))

        tokens = (reference.hidden, kl, gradient, *softmax, *other)
        return _pull_back(options, layout, logits_gradient, policy, labels, *tokens)

    inputs = (layout.model, layout.model, *[layout.tokens] * 5)
    run = layout.spread(local, inputs, tuple(layout.model))
    arguments = (_in_dtype_of_hidden(policy), _in_dtype_of_hidden(reference), labels, kl, softmax, other, gradient)
    return _as_model(policy, run(*arguments)), None, None


_divergence.defvjp(_divergence_forward, _divergence_backward)

"""Logits of a large vocabulary for one chunk of tokens at a time, forwards and backwards.

Under a mesh each device works through its own rows (data, fsdp) and its own part of the vocabulary (model); the loop
over chunks holds no collective, what must be summed over devices is summed once after it.
Letters: c tokens of a chunk, D width, V words, v words of a device's part.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax.sharding import BATCH_AXES, MODEL_AXIS, P, active_mesh, axes_size, fit_spec
from dpo_jax.types import Array, PyTree

IGNORE = -100  # label of a place that holds no token

# Floor of the largest logit: a shard of the vocabulary whose words are all at -inf must not give inf - inf.
_LOWEST = -1e30

Axes = str | tuple[str, ...] | None  # of a mesh; None: not split


class Projection(NamedTuple):
    """Hidden states [..., D] with the head [V, D] and bias [V] that turn them into logits."""

    hidden: Array
    head: Array
    bias: Array | None


class Softmax(NamedTuple):
    """Largest logit and log of the sum of exponentials over it, float32 [...].

    Kept apart: their sum would round log p by 1e-3 where logits are near 1e4.
    """

    top: Array
    log_total: Array

    def log_p(self, logits: Array) -> Array:
        """Log-probabilities [c, v] of the words whose logits these are."""
        return (logits - self.top[:, None]) - self.log_total[:, None]


class Layout(NamedTuple):
    """How a call lies on the active mesh: the axes that split the rows, and the axis that splits the vocabulary."""

    mesh: jax.sharding.AbstractMesh | None
    rows: Axes
    vocabulary: Axes

    def spread(self, function: Callable, inputs: tuple, outputs: tuple | P) -> Callable:
        """The function on each device's own part, under shard_map if there is a mesh."""
        if self.mesh is None:
            return function
        # Without replication checks: carries start from zeros, and what is summed over devices is summed by hand.
        return jax.shard_map(function, mesh=self.mesh, in_specs=inputs, out_specs=outputs, check_vma=False)

    @property
    def tokens(self) -> P:
        """How arrays with an entry per token are split."""
        return P(self.rows)

    @property
    def model(self) -> Projection:
        """How each part of a projection is split."""
        return Projection(P(self.rows), P(self.vocabulary), P(self.vocabulary))  # type: ignore[arg-type]


def layout_of(model: Projection) -> Layout:
    """The layout under the active mesh, if there is one; axes that do not divide are not split."""
    mesh = active_mesh()
    if mesh is None:
        return Layout(None, None, None)
    rows = fit_spec(P(BATCH_AXES), model.hidden.shape, mesh)[0]
    return Layout(mesh, rows, fit_spec(P(MODEL_AXIS), model.head.shape, mesh)[0])


def default_chunk_size(hidden: Array, head: Array) -> int:
    """Tokens in a chunk whose logits take about the memory of a device's hidden states."""
    layout = layout_of(Projection(hidden, head, None))
    shards = 1 if layout.mesh is None else axes_size(layout.mesh, layout.rows)
    words = head.shape[0] // (1 if layout.mesh is None else axes_size(layout.mesh, layout.vocabulary))
    balanced = hidden.size // shards // max(words, 1)
    return min(max(1 << max(balanced - 1, 0).bit_length(), 256), 2048)


def require_shapes(hidden: Array, head: Array, bias: Array | None, labels: Array) -> None:
    """Hidden states, head, bias and labels belong together.

    Raises:
      ValueError: they do not.
    """
    if hidden.shape[:-1] != labels.shape or not labels.shape:
        raise ValueError(f"hidden {hidden.shape} must be labels {labels.shape} with one more axis, at least [N, D]")
    if head.ndim != 2 or head.shape[1] != hidden.shape[-1]:
        raise ValueError(f"head {head.shape} must be [V, D] with the D of hidden {hidden.shape}")
    if bias is not None and bias.shape != head.shape[:1]:
        raise ValueError(f"bias {bias.shape} must be [V] with the V of head {head.shape}")


def in_dtype_of_hidden(model: Projection) -> Projection:
    """The same with the head in the dtype of the matrix products."""
    # Once per call and before the head is gathered over the mesh, not once per chunk.
    return model._replace(head=model.head.astype(model.hidden.dtype))


def sum_over(x: Array, axes: Axes) -> Array:
    """Sum over the devices along some axes of the mesh."""
    return x if axes is None else jax.lax.psum(x, axes)


def logits_of(model: Projection, softcap: float | None) -> Array:
    """Float32 [c, v] of a chunk [c, D] under a part of the vocabulary [v, D]."""
    logits = jnp.einsum("cd,vd->cv", model.hidden, model.head, preferred_element_type=jnp.float32)
    if model.bias is not None:
        logits = logits + model.bias.astype(jnp.float32)
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def scan_tokens(step: Callable, carry: PyTree, labels: Array, *tokens: Array, chunk_size: int) -> tuple[PyTree, PyTree]:
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


def silenced(hidden: Array, labels: Array) -> Array:
    """Zero states where there is no label: a nan there would reach the head's gradient as 0 * nan."""
    return jnp.where((labels != IGNORE)[:, None], hidden, 0)


def shifted_logits(logits: Array) -> tuple[Array, Array, Array]:
    """Largest logit [c]; logits less it, and their exponentials, [c, v]."""
    top = jnp.maximum(jnp.max(logits, axis=-1), _LOWEST)
    shifted = logits - top[:, None]
    return top, shifted, jnp.exp(shifted)


def weighted_sum(weights: Array, values: Array) -> Array:
    """Sum over words of weight times value; a word of weight zero adds nothing even if its value is -inf or nan."""
    return jnp.sum(jnp.where(weights > 0, weights * values, 0.0), axis=-1)


def merge_top(top: Array, vocabulary: Axes) -> tuple[Array, Array]:
    """Largest logit of all parts of the vocabulary, and the (negative) distance of this part's own to it."""
    whole = top if vocabulary is None else jax.lax.pmax(top, vocabulary)
    return whole, top - whole


def first_word(model: Projection, vocabulary: Axes) -> Array | int:
    """Id of the first word in this device's part of the vocabulary."""
    return 0 if vocabulary is None else jax.lax.axis_index(vocabulary) * model.head.shape[0]


def pull_back(
    logits_gradient: Callable[..., Array],
    layout: Layout,
    model: Projection,
    labels: Array,
    *tokens: Array,
    chunk_size: int,
    softcap: float | None,
    frozen_head: bool,
) -> tuple[Array, Array | None, Array | None]:
    """Gradients of hidden [..., D], head [v, D] and bias [v] from the gradient of the logits, which are made again.

    Args:
      logits_gradient: `(logits [c, v], labels [c], *tokens [c, ...]) -> [c, v]`, called once per chunk.
      layout: of the call.
      model: this device's part, its head in the dtype of the hidden states.
      labels, tokens: [...] and [..., ...], this device's rows.
      chunk_size, softcap: as in the forward pass.
      frozen_head: compute none for head and bias.

    Returns:
      That of the hidden states in their dtype, the others float32, or None if frozen.
    """
    dtype = model.hidden.dtype
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (model.head, model.bias))
    # Partial sums over the vocabulary are added up across devices before they are rounded.
    hidden_dtype = dtype if layout.vocabulary is None else jnp.float32

    def chunk(totals, chunked):
        labels, hidden, *rest = chunked
        hidden = silenced(hidden, labels)
        logits = logits_of(model._replace(hidden=hidden), softcap)
        slope = logits_gradient(logits, labels, *rest)
        if softcap is not None:
            slope = slope * (1 - jnp.square(logits / softcap))
        slope = jnp.where((labels != IGNORE)[:, None], slope, 0.0)
        rounded = slope.astype(dtype)
        d_hidden = jnp.einsum("cv,vd->cd", rounded, model.head, preferred_element_type=jnp.float32)
        if not frozen_head:
            d_head, d_bias = totals
            d_head = d_head + jnp.einsum("cv,cd->vd", rounded, hidden, preferred_element_type=jnp.float32)
            totals = d_head, None if d_bias is None else d_bias + jnp.sum(slope, axis=0)
        return totals, d_hidden.astype(hidden_dtype)

    start = None if frozen_head else zeros
    totals, d_hidden = scan_tokens(chunk, start, labels, model.hidden, *tokens, chunk_size=chunk_size)
    d_hidden = sum_over(d_hidden, layout.vocabulary).astype(dtype)
    if totals is None:
        return d_hidden, None, None
    return d_hidden, *jax.tree.map(lambda x: sum_over(x, layout.rows), totals)


def in_own_dtypes(model: Projection, gradients: tuple[Array, Array | None, Array | None]) -> Projection:
    """Gradients in the dtypes of the arguments; zeros where they were not computed."""
    return Projection(*(None if g is None else g.astype(x.dtype) for x, g in zip(model, gradients)))  # type: ignore[union-attr, arg-type]

"""A mixture of experts in place of the feed-forward part: router, top-k, ragged matrix products, experts on a mesh.

Shazeer et al. 2017, arXiv 1701.06538, with the top-k of a softmax as in Mixtral (arXiv 2401.04088) and Qwen3 (arXiv
2505.09388).
    p = softmax(x W),   y = sum over e in top-k(p) of g_e down_e(activation(gate_e x) * up_e x)
where g_e = p_e, or p_e / (sum of the chosen p). Rows are sorted by expert, and each expert multiplies its own: there is
no capacity and no dropped token, and all shapes are static.

On a mesh whose axis `expert` is larger than 1, a shard gathers the rows of the shards beside it, computes what its own
experts make of them, and gets the sum for its own rows back. That is exact for any routing; the price is memory for the
chosen rows of all these shards, of which a shard multiplies only those that chose its experts.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dpo_jax.language.models.config import DecoderConfig
from dpo_jax.language.models.elements import ACTIVATIONS, normal
from dpo_jax.sharding import BATCH_AXES, EXPERT_AXIS, MODEL_AXIS, P, active_mesh, constrain, fit_spec
from dpo_jax.types import Array


class RouterSums(NamedTuple):
    """What the router of one layer did, summed over the tokens that count; float32.

    Attributes:
      chosen: [E], tokens that have the expert among their k.
      probabilities: [E].
      entropy: [], of each token's probabilities, nats.
    """

    chosen: Array
    probabilities: Array
    entropy: Array


class Router(nnx.Module):
    """A probability for each expert."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.dtype = jnp.dtype(config.dtype)
        self.weight = nnx.Param(normal(rngs.params(), (config.hidden_size, config.experts), config))

    def __call__(self, x: Array) -> Array:
        """[R, L, D] -> float32 log-probabilities [R, L, E]."""
        weight = self.weight[...].astype(self.dtype)
        logits = jnp.einsum("rld,de->rle", x, weight, preferred_element_type=jnp.float32)
        return jax.nn.log_softmax(constrain(logits, BATCH_AXES, None, None), axis=-1)


class Stack(nnx.Module):
    """A kernel for each expert, [E, in, out]."""

    def __init__(self, size_in: int, size_out: int, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.kernels = nnx.Param(normal(rngs.params(), (config.experts, size_in, size_out), config))


class Experts(nnx.Module):
    """The feed-forward part of a layer, of which each token uses k of E."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        inner = config.expert_intermediate_size or config.intermediate_size
        self.chosen, self.renormalize = config.experts_per_token, config.renormalize_experts
        self.activation, self.dtype = config.activation, jnp.dtype(config.dtype)
        self.router = Router(config, rngs=rngs)
        self.gate = Stack(config.hidden_size, inner, config, rngs=rngs)
        self.up = Stack(config.hidden_size, inner, config, rngs=rngs)
        self.down = Stack(inner, config.hidden_size, config, rngs=rngs)

    def __call__(self, x: Array, counted: Array | None = None) -> tuple[Array, RouterSums | None]:
        """[R, L, D] -> [R, L, D].

        Args:
          counted: bool [R, L], tokens that the router's sums are over; None for no sums.
        """
        logps = self.router(x)
        weights, chosen = jax.lax.top_k(jnp.exp(logps), self.chosen)  # [R, L, E] -> [R, L, k]
        if self.renormalize:
            weights /= jnp.sum(weights, axis=-1, keepdims=True)
        kernels = [stack.kernels[...].astype(self.dtype) for stack in (self.gate, self.up, self.down)]
        y = mixture(x, weights.astype(self.dtype), chosen, *kernels, activation=ACTIVATIONS[self.activation])
        return y, None if counted is None else _sums(logps, chosen, counted)


def _sums(logps: Array, chosen: Array, counted: Array) -> RouterSums:
    one = counted[..., None].astype(jnp.float32)  # [R, L, 1]
    probabilities = jnp.exp(logps)
    hits = jnp.sum(chosen[..., None] == jnp.arange(logps.shape[-1]), axis=2)  # [R, L, k, E] -> [R, L, E]
    return RouterSums(
        jnp.sum(hits * one, axis=(0, 1)),
        jnp.sum(probabilities * one, axis=(0, 1)),
        -jnp.sum(probabilities * logps * one),
    )


def mixture(
    x: Array, weights: Array, chosen: Array, gate: Array, up: Array, down: Array, *, activation: Callable
) -> Array:
    """Weighted sum of what the chosen experts make of each token, [R, L, D].

    Args:
      x: [R, L, D].
      weights, chosen: [R, L, k], and int32 [R, L, k] from 0 to E - 1.
      gate, up, down: [E, D, F], [E, D, F], [E, F, D].
    """
    mesh = active_mesh()
    if mesh is None:
        return _apply(x, weights, chosen, gate, up, down, None, activation)
    rows = fit_spec(P(BATCH_AXES), x.shape, mesh)[0]
    expert = fit_spec(P(EXPERT_AXIS), gate.shape, mesh)[0]
    inner = fit_spec(P(MODEL_AXIS), gate.shape[2:], mesh)[0]
    together = expert is not None and rows is not None

    def part(x: Array, weights: Array, chosen: Array, gate: Array, up: Array, down: Array) -> Array:
        if together:
            x, weights, chosen = (jax.lax.all_gather(a, EXPERT_AXIS, tiled=True) for a in (x, weights, chosen))
        first = None if expert is None else jax.lax.axis_index(EXPERT_AXIS) * gate.shape[0]
        y = _apply(x, weights, chosen, gate, up, down, first, activation)
        y = y if inner is None else jax.lax.psum(y, MODEL_AXIS)
        if together:
            return jax.lax.psum_scatter(y, EXPERT_AXIS, tiled=True)
        return y if expert is None else jax.lax.psum(y, EXPERT_AXIS)

    split = (*(P(rows),) * 3, *(P(expert, None, inner),) * 2, P(expert, inner))
    # Without replication checks: what is summed over devices is summed by hand.
    spread = jax.shard_map(part, mesh=mesh, in_specs=split, out_specs=P(rows), check_vma=False)
    return spread(x, weights, chosen, gate, up, down)


def _apply(
    x: Array,
    weights: Array,
    chosen: Array,
    gate: Array,
    up: Array,
    down: Array,
    first: Array | None,
    activation: Callable,
) -> Array:
    """As `mixture`, of the experts from `first` on, as many as there are kernels; of all if it is None."""
    count, k = gate.shape[0], chosen.shape[-1]
    group = chosen.reshape(-1)
    if first is not None:
        group -= first
        group = jnp.where((group >= 0) & (group < count), group, count)  # experts of others go to the end
    order = jnp.argsort(group)
    sizes = jnp.sum(group[:, None] == jnp.arange(count), axis=0, dtype=jnp.int32)
    own = None if first is None else (jnp.arange(group.size) < jnp.sum(sizes))[:, None]

    def product(rows: Array, kernels: Array) -> Array:
        if own is None:
            return jax.lax.ragged_dot(rows, kernels, sizes)
        # Nobody promises what stands behind the groups, neither in the product nor in the gradient of its rows.
        return jnp.where(own, jax.lax.ragged_dot(jnp.where(own, rows, 0), kernels, sizes), 0)

    inverse = jnp.argsort(order)
    rows = _permuted(jnp.repeat(x.reshape(-1, x.shape[-1]), k, axis=0), order, inverse)  # [N, D] -> [N k, D]
    y = product(activation(product(rows, gate)) * product(rows, up), down)
    y = _permuted(y, inverse, order).reshape(*chosen.shape, -1)  # [N k, D] -> [R, L, k, D]
    return jnp.sum(y * weights[..., None], axis=2)


@jax.custom_vjp
def _permuted(rows: Array, order: Array, inverse: Array) -> Array:
    """rows[order]; its gradient is a gather too, where XLA would scatter, for it cannot know a permutation."""
    return rows[order]


def _permuted_forward(rows: Array, order: Array, inverse: Array) -> tuple[Array, Array]:
    return rows[order], inverse


def _permuted_backward(inverse: Array, cotangent: Array) -> tuple[Array, None, None]:
    return cotangent[inverse], None, None


_permuted.defvjp(_permuted_forward, _permuted_backward)

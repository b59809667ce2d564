"""OFS-DPO: two low-rank modules on one base chase each other through a stream of pairs; COFS joins them over domains.

Qi et al. 2024, arXiv 2406.05534, eqs. 3-6 and algorithm 1. Evidence: a public third-party port (objectives, signs,
roles), summaries (modules, combination of domains); how combination weights are found, and the defaults, are rebuilt.
With d(pi) = log pi(y_w) - log pi(y_l), h_X = beta (d(pi_X) - d(pi_ref)) of each module, leader F and chaser S,

    leader   softplus(-h_F) + alpha softplus(-(h_F - h_S))       gradient through F only
    chaser   softplus(-h_S) - alpha softplus(-(h_F - h_S))       gradient through S only

Both gradients raise the module's own margin, and where the modules agree the second term keeps weight alpha beta / 2
when the pairs are fitted and DPO's own weight is gone. Fast and slow is the learning rate, for life; leader and chaser
are roles, which `assign_leader` deals out again every 10-100 steps: the chaser's term is not bounded below, should it
overtake. Give each module its own optimiser and clipping. The slow module is no moving average of the fast one.
A step runs the base (the reference), the fast and the slow module: three forwards, two backwards.
After each domain of a stream the fast module is kept and new ones begin at zero; what is served is base + sum_t w_t
delta_t with weights on the simplex that `fit_combination` finds on a few remembered pairs of each domain.

Shapes: log-probabilities and masks [B, T]; every result [B] float32. Reference and masks are constants.
Reduces to: two independent DPO losses at alpha = 0.

>>> import jax.numpy as jnp
>>> sides = dict(fast_chosen_logps=jnp.array([[-1.0]]), fast_rejected_logps=jnp.array([[-2.0]]),
...              slow_chosen_logps=jnp.array([[-2.0]]), slow_rejected_logps=jnp.array([[-2.0]]),
...              reference_chosen_logps=jnp.array([[-2.0]]), reference_rejected_logps=jnp.array([[-2.0]]),
...              chosen_mask=jnp.ones((1, 1)), rejected_mask=jnp.ones((1, 1)))
>>> both = fast_slow_losses(**sides, beta=1.0, alpha=1.0)  # h_fast = 1, h_slow = 0; log(1 + 1/e) = 0.3133
>>> f"{both.fast.loss[0]:.4f} {both.slow.loss[0]:.4f}"
'0.6265 0.3799'
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax.lora import join_ranks
from dpo_jax.ops import completion_sums, logistic_loss, pair_metrics, require_between, require_positive
from dpo_jax.types import Array, LossOutput, PyTree


class FastSlow(NamedTuple):
    """What each of the two modules minimises.

    Attributes:
      fast, slow: losses of the fast and the slow module; each lets gradient into its own module only, so their sum may
        be differentiated once for both.
    """

    fast: LossOutput
    slow: LossOutput


def fast_slow_losses(
    *,
    fast_chosen_logps: Array,
    fast_rejected_logps: Array,
    slow_chosen_logps: Array,
    slow_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    fast_leads: Array | bool = True,
    beta: float = 0.1,
    alpha: float = 0.1,
) -> FastSlow:
    """The losses of both modules under the current roles, eqs. 3-6.

    Metrics of each: those of pairs, its plain DPO loss `dpo` (for `assign_leader`) and `lead`, its h less the other's.

    Args:
      fast_chosen_logps, fast_rejected_logps, slow_chosen_logps, slow_rejected_logps: [B, T] under the two modules.
      reference_chosen_logps, reference_rejected_logps: [B, T] under the base alone.
      chosen_mask, rejected_mask: [B, T], one at completion tokens.
      fast_leads: bool scalar, may be traced: whether the fast module is the leader.
      beta: strength of the KL constraint to the reference, above 0.
      alpha: weight of the comparison between the modules, at least 0; 0.01 to 0.5 is usual.

    Raises:
      ValueError: beta or alpha out of their range.
    """
    require_positive(beta=beta)
    require_between(0.0, math.inf, alpha=alpha)
    fast, slow = (fast_chosen_logps, fast_rejected_logps), (slow_chosen_logps, slow_rejected_logps)
    reference, masks = (reference_chosen_logps, reference_rejected_logps), (chosen_mask, rejected_mask)
    role = jnp.where(fast_leads, 1.0, -1.0)
    return FastSlow(
        _module(fast, slow, reference, masks, role, beta, alpha),
        _module(slow, fast, reference, masks, -role, beta, alpha),
    )


def assign_leader(fast_total: Array, slow_total: Array) -> Array:
    """Whether the fast module leads: its DPO losses since the last assignment sum to no more than the slow one's.

    Args:
      fast_total, slow_total: float32 scalars, sums or means of the metric `dpo` over the same steps.
    """
    return jnp.asarray(fast_total) <= jnp.asarray(slow_total)


def combined_delta(adapters: Sequence[PyTree], weights: Array | Sequence[float]) -> PyTree:
    """sum_t w_t a_t b_t at each place of the adapters, float32: what to add to the base's kernels.

    Args:
      adapters: trees of one structure whose innermost nodes are {"a": [..., in, r], "b": [..., r, out]}; ranks may
        differ. A scale of an adapter belongs into its weight.
      weights: [len(adapters)].

    Raises:
      ValueError: no adapter, another number of weights, or trees of different structure.
    """
    joined = combine_adapters(adapters, weights)
    return jax.tree.map(lambda pair: jnp.matmul(pair["a"], pair["b"], precision="highest"), joined, is_leaf=_is_factors)


def combine_adapters(adapters: Sequence[PyTree], weights: Array | Sequence[float]) -> PyTree:
    """One adapter whose delta is sum_t w_t a_t b_t exactly: factors concatenated along the rank, float32.

    Averages of the factors themselves would add the cross terms a_s b_t.

    Args:
      adapters: trees of one structure whose innermost nodes are {"a": [..., in, r], "b": [..., r, out]}; ranks may
        differ. A scale of an adapter belongs into its weight.
      weights: [len(adapters)].

    Raises:
      ValueError: no adapter, another number of weights, or trees of different structure.
    """
    weights = jnp.asarray(weights, jnp.float32)
    if not adapters or weights.shape != (len(adapters),):
        raise ValueError(f"{len(adapters)} adapters and weights of shape {weights.shape}; give one weight per adapter")

    def joined(*pairs: Mapping[str, Array]) -> dict[str, Array]:
        a, b = join_ranks([(pair["a"], pair["b"]) for pair in pairs], weights)
        return {"a": a, "b": b}

    return jax.tree.map(joined, *adapters, is_leaf=_is_factors)


def fit_combination(
    memory_loss: Callable[[Array], Array], domains: int, *, steps: int = 100, learning_rate: float = 0.1
) -> Array:
    """Weights on the simplex, float32 [domains], that minimise a smooth loss: projected gradient from equal weights.

    The best weights seen are kept, the single domains among them, so no domain's own module does better alone.

    Args:
      memory_loss: weights float32 [domains] -> scalar, usually the mean over domains of the DPO loss on their memories
        under `combined_delta`; differentiable in JAX.
      domains: number of modules, at least 1.
      steps: gradient steps.
      learning_rate: size of a step, above 0.

    Raises:
      ValueError: domains below 1, or a learning rate that is not above 0.
    """
    if domains < 1:
        raise ValueError(f"domains is {domains}; give the number of modules, at least 1")
    require_positive(learning_rate=learning_rate)
    corners = jnp.eye(domains, dtype=jnp.float32)
    single = jax.lax.map(memory_loss, corners)
    best = (corners[jnp.argmin(single)], jnp.min(single))

    def step(carry: tuple[Array, tuple[Array, Array]], _: None):
        weights, (best, least) = carry
        loss, gradient = jax.value_and_grad(memory_loss)(weights)
        kept = jnp.where(loss < least, weights, best), jnp.minimum(loss, least)
        return (project_to_simplex(weights - learning_rate * gradient), kept), None

    start = jnp.full((domains,), 1.0 / domains, jnp.float32)
    (_, (weights, _)), _ = jax.lax.scan(step, (start, best), None, length=steps)
    return weights


def project_to_simplex(values: Array) -> Array:
    """The closest weights (Euclidean) that are not negative and sum to one, float32 [D]."""
    values = values.astype(jnp.float32)
    ordered = -jnp.sort(-values)
    excess = (jnp.cumsum(ordered) - 1) / jnp.arange(1, values.size + 1)
    threshold = excess[jnp.sum(ordered > excess) - 1]
    return jnp.maximum(values - threshold, 0.0)


def _module(
    own: tuple[Array, Array],
    other: tuple[Array, Array],
    reference: tuple[Array, Array],
    masks: tuple[Array, Array],
    role: Array,
    beta: float,
    alpha: float,
) -> LossOutput:
    """Loss of one module: role 1 is the leader's, -1 the chaser's."""
    chosen, rejected = (completion_sums(*arrays) for arrays in zip(own, reference, masks))
    # The reference cancels between the modules; the other module is a constant, as a reference is.
    ahead, behind = (completion_sums(*arrays) for arrays in zip(own, other, masks))
    lead = beta * (ahead.log_ratio - behind.log_ratio)
    dpo = logistic_loss(beta * (chosen.log_ratio - rejected.log_ratio))
    metrics = pair_metrics(chosen, rejected, beta * chosen.log_ratio, beta * rejected.log_ratio)
    return LossOutput(dpo + role * alpha * logistic_loss(role * lead), {**metrics, "dpo": dpo, "lead": lead})


def _is_factors(node: PyTree) -> bool:
    return isinstance(node, Mapping) and set(node) == {"a", "b"}

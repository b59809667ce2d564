"""ADPO: soft targets over a list, and a policy measured from an anchor whose update rule is free.

Wang 2025, arXiv 2510.18913. Evidence: the paper's abstracts (objective, special cases, curvature), the author's trainer
code (advantages, adaptive temperature, anchors, token penalty, length-normalised Plackett-Luce form); the kernel
targets are reconstructed. With l_i the policy's log-probability of candidate i summed over its tokens, a_i the anchor's
(the reference arrays) and q a target distribution over the list,

    u_i = (l_i - a_i) / tau,   p = softmax(u) over the candidates that are there

    adpo           KL(q || p) + anchor_kl_coef k3
    adpo_rewards   the same with q = softmax(score / reward_temperature)
    adpo_adaptive  the same with tau(x) = max(tau_min, tau (1 - alpha H(q) / log P)), P candidates, a constant
    adpo_pair      - q log sigma(u_w - u_l) - (1 - q) log sigma(u_l - u_w),  q = label_prob
    adpo_plackett_luce   ListMLE of the scores' order on u, with token means of the log ratios in place of sums
    k3             mean over the list's tokens of e^d - d - 1,  d = log anchor - log pi at a token

Shapes: log-probabilities and mask [B, K, T] (pairs: [B, T]) in any float dtype, target_probs and scores [B, K],
label_prob [B]; every result [B] float32. A candidate is there if its mask has a token; targets are renormalised over
those. Reference arrays, masks, targets and temperatures are constants.
Reduces to: DPO with beta = 1 / tau for hard pairs; distillation on the list for a uniform anchor and tau = 1. The
gradient by l is (p - q) / tau, zero where pi is the anchor times q^tau: a larger tau means a sharper optimum.
Anchors: a fixed one is never touched; an on-policy one is the model that wrote the batch, its log-probabilities stored
with it; `ema_anchor` and `kl_triggered_anchor` follow the policy.
Metrics: entropy of the targets, temperature, top-1 agreement of p with q, `win_mass` = softmax(l) at the best target.

>>> import jax.numpy as jnp
>>> lists = dict(policy_logps=jnp.log(jnp.array([[[0.5], [0.25]]])), mask=jnp.ones((1, 2, 1)),
...              reference_logps=jnp.log(jnp.array([[[0.5], [0.5]]])))
>>> output = adpo_loss(**lists, target_probs=jnp.array([[1.0, 0.0]]))  # p = 2/3, 1/3
>>> print(f"{output.loss[0]:.4f} {output.metrics['win_mass'][0]:.4f}")
0.4055 0.6667
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from dpo_jax.ops import (
    MAX_EXPONENT,
    completion_sums,
    logistic_loss,
    masked_mean,
    masked_sum,
    pair_metrics,
    plackett_luce_nll,
    ranks,
    require_between,
    require_positive,
    safe_divide,
)
from dpo_jax.tree import interpolate
from dpo_jax.types import Array, LossOutput, PyTree


def adpo_loss(
    *,
    policy_logps: Array,
    reference_logps: Array,
    mask: Array,
    target_probs: Array,
    tau: float = 1.0,
    anchor_kl_coef: float = 0.0,
) -> LossOutput:
    """KL from a target distribution to the anchored policy over a list; 0 for a list of one candidate.

    Args:
      tau: temperature of the anchored scores, 1/beta of DPO, above 0.
      anchor_kl_coef: weight of the token penalty k3, at least 0; its log ratios stop counting at 80 nats a token.
    """
    require_positive(tau=tau)
    targets = renormalise(target_probs, _there(mask))
    temperature = jnp.full(mask.shape[:1], tau, jnp.float32)
    return _list_output(policy_logps, reference_logps, mask, targets, temperature, anchor_kl_coef)


def adpo_rewards_loss(
    *,
    policy_logps: Array,
    reference_logps: Array,
    mask: Array,
    scores: Array,
    tau: float = 1.0,
    reward_temperature: float = 0.5,
    anchor_kl_coef: float = 0.0,
) -> LossOutput:
    """`adpo_loss` whose targets are softmax(scores / reward_temperature), as in maximum-entropy RL.

    Args:
      tau: temperature of the anchored scores, above 0.
      reward_temperature: temperature of the targets in units of the scores, above 0.
      anchor_kl_coef: weight of the token penalty k3, at least 0; its log ratios stop counting at 80 nats a token.
    """
    require_positive(tau=tau)
    targets = softmax_targets(scores, _there(mask), reward_temperature=reward_temperature)
    temperature = jnp.full(mask.shape[:1], tau, jnp.float32)
    return _list_output(policy_logps, reference_logps, mask, targets, temperature, anchor_kl_coef)


def adpo_adaptive_loss(
    *,
    policy_logps: Array,
    reference_logps: Array,
    mask: Array,
    target_probs: Array,
    tau: float = 0.8,
    alpha: float = 0.5,
    tau_min: float = 0.05,
    anchor_kl_coef: float = 0.0,
) -> LossOutput:
    """`adpo_loss` with a smaller temperature for lists whose targets are uncertain (`adaptive_temperature`).

    Args:
      tau: temperature for a list with a certain target, above 0.
      alpha: share of tau that a uniform target takes away, in [0, 1].
      tau_min: smallest temperature, above 0.
      anchor_kl_coef: weight of the token penalty k3, at least 0; its log ratios stop counting at 80 nats a token.
    """
    there = _there(mask)
    targets = renormalise(target_probs, there)
    temperature = adaptive_temperature(targets, there, tau=tau, alpha=alpha, tau_min=tau_min)
    return _list_output(policy_logps, reference_logps, mask, targets, temperature, anchor_kl_coef)


def adpo_pair_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    label_prob: Array,
    tau: float = 10.0,
) -> LossOutput:
    """Cross-entropy of the anchored pair to a soft label; DPO with beta = 1/tau where label_prob is 1.

    Args:
      tau: temperature of the anchored scores, above 0.
    """
    require_positive(tau=tau)
    chosen = completion_sums(policy_chosen_logps, reference_chosen_logps, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, reference_rejected_logps, rejected_mask)
    chex.assert_equal_shape([chosen.log_ratio, label_prob])
    gap = (chosen.log_ratio - rejected.log_ratio) / tau
    q = jax.lax.stop_gradient(label_prob.astype(jnp.float32))
    loss = q * logistic_loss(gap) + (1 - q) * logistic_loss(-gap)
    return LossOutput(loss, pair_metrics(chosen, rejected, chosen.log_ratio / tau, rejected.log_ratio / tau))


def adpo_plackett_luce_loss(
    *, policy_logps: Array, reference_logps: Array, mask: Array, scores: Array, tau: float = 0.5
) -> LossOutput:
    """Plackett-Luce likelihood of the scores' order on anchored token means (the author's later code).

    Args:
      tau: temperature of the mean log ratios, in nats per token, above 0.
    """
    require_positive(tau=tau)
    sums = completion_sums(policy_logps, reference_logps, mask)
    chex.assert_equal_shape([sums.log_ratio, scores])
    there = _there(mask)
    anchored = safe_divide(sums.log_ratio, sums.length) / tau
    best = _first_best(scores, there)
    agrees = (jnp.argmin(ranks(anchored, there), axis=-1) == best) & (there != 0).any(-1)
    metrics = {"accuracy": agrees.astype(jnp.float32), "win_mass": _mass(sums.logps, there, best)}
    return LossOutput(plackett_luce_nll(anchored, scores, there), metrics)


# Targets: [..., K] scores to distributions over the candidates that are there


def renormalise(target_probs: Array, there: Array) -> Array:
    """Targets over the candidates that are there, float32 [..., K] with sum 1, or all zero if they have no mass.

    Args:
      target_probs: [..., K] shares of at least 0 (a negative one counts as 0); a constant.
      there: [..., K], zero at absent candidates.
    """
    shares = jnp.maximum(jax.lax.stop_gradient(target_probs.astype(jnp.float32)), 0.0)
    return safe_divide(jnp.where(there != 0, shares, 0.0), masked_sum(shares, there)[..., None])


def softmax_targets(scores: Array, there: Array, *, reward_temperature: float = 0.5) -> Array:
    """softmax(scores / reward_temperature) over the candidates that are there, float32 [..., K]; a constant.

    Args:
      scores: [..., K].
      there: [..., K], zero at absent candidates.
      reward_temperature: in units of the scores, above 0.
    """
    require_positive(reward_temperature=reward_temperature)
    scores = jax.lax.stop_gradient(scores.astype(jnp.float32))
    return jnp.where(there != 0, jnp.exp(_log_softmax(scores / reward_temperature, there)), 0.0)


def advantage_targets(scores: Array, there: Array, *, reward_temperature: float = 0.5) -> Array:
    """Softmax of group-normalised advantages, (score - mean) / (standard deviation + 1e-8), float32 [..., K].

    Equal scores give uniform targets, which pull a list's candidates together: drop such prompts or want that.

    Args:
      scores: [..., K].
      there: [..., K], zero at absent candidates.
      reward_temperature: in standard deviations, above 0.
    """
    centred, deviation = _centred(scores, there)
    return softmax_targets(centred / (deviation + 1e-8), there, reward_temperature=reward_temperature)


def kde_targets(scores: Array, there: Array, *, reward_temperature: float = 0.5, bandwidth: float = 1.06) -> Array:
    """Softmax of logit(F(score)), F the list's own Gaussian-kernel distribution function, float32 [..., K].

    Outliers lose their size: F(s_i) = mean_j Phi((s_i - s_j) / h), clipped to [1e-4, 1 - 1e-4].

    Args:
      scores: [..., K].
      there: [..., K], zero at absent candidates.
      reward_temperature: in units of log-odds, above 0.
      bandwidth: h in units of the list's standard deviation times P^(-1/5), P candidates; above 0. Ours: the paper's
        rule is not known.
    """
    require_positive(bandwidth=bandwidth)
    centred, deviation = _centred(scores, there)
    count = masked_sum(jnp.ones_like(centred), there)[..., None]
    width = bandwidth * deviation * jnp.maximum(count, 1.0) ** -0.2  # [..., 1]
    z = safe_divide(centred[..., :, None] - centred[..., None, :], width[..., None])
    others = jnp.broadcast_to((there != 0)[..., None, :], z.shape)
    share = jnp.clip(masked_mean(jax.scipy.stats.norm.cdf(z), others), 1e-4, 1 - 1e-4)
    return softmax_targets(jnp.log(share) - jnp.log1p(-share), there, reward_temperature=reward_temperature)


def adaptive_temperature(
    targets: Array, there: Array, *, tau: float = 0.8, alpha: float = 0.5, tau_min: float = 0.05
) -> Array:
    """max(tau_min, tau (1 - alpha H(q) / log P)) for each list of P candidates, float32 [...]; a constant.

    Args:
      targets: [..., K] distributions over the candidates that are there.
      there: [..., K], zero at absent candidates.
      tau: temperature of a certain target, above 0.
      alpha: share of tau that a uniform target takes away, in [0, 1].
      tau_min: smallest temperature, above 0.
    """
    require_positive(tau=tau, tau_min=tau_min)
    require_between(0.0, 1.0, alpha=alpha)
    targets = jax.lax.stop_gradient(targets.astype(jnp.float32))
    count = masked_sum(jnp.ones_like(targets), there)
    uncertainty = safe_divide(_entropy(targets, there), jnp.log(jnp.maximum(count, 1.0)))
    return jnp.maximum(tau_min, tau * (1 - alpha * uncertainty))


# Anchors: pure functions of trees


class TriggeredAnchor(NamedTuple):
    """An anchor that waits.

    Attributes:
      anchor: parameters.
      kl_sum: float32 scalar, sum of the KLs seen since the anchor was last moved.
      steps: int32 scalar, how many those were.
    """

    anchor: PyTree
    kl_sum: Array
    steps: Array


def ema_anchor(anchor: PyTree, policy: PyTree, *, decay: float = 0.99) -> PyTree:
    """decay * anchor + (1 - decay) * policy, leaf by leaf; once per step.

    Args:
      anchor, policy: parameters; leaves keep the dtype of the anchor.
      decay: in [0, 1]; 1 is a fixed anchor.
    """
    require_between(0.0, 1.0, decay=decay)
    return interpolate(anchor, policy, 1 - decay)


def triggered_anchor(anchor: PyTree) -> TriggeredAnchor:
    """The state of `kl_triggered_anchor` before the first step."""
    return TriggeredAnchor(anchor, jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32))


def kl_triggered_anchor(
    state: TriggeredAnchor, policy: PyTree, kl: Array, *, threshold: float = 0.1
) -> TriggeredAnchor:
    """The anchor becomes the policy once the mean KL since its last move is above a threshold; once per step.

    Args:
      state: from the step before, or `triggered_anchor`.
      policy: parameters, as the anchor's.
      kl: float scalar, the step's KL between policy and anchor in nats.
      threshold: in nats, above 0.
    """
    require_positive(threshold=threshold)
    kl_sum, steps = state.kl_sum + jnp.asarray(kl, jnp.float32), state.steps + 1
    moves = kl_sum > threshold * steps
    anchor = jax.tree.map(lambda old, new: jnp.where(moves, new.astype(old.dtype), old), state.anchor, policy)
    return TriggeredAnchor(anchor, jnp.where(moves, 0.0, kl_sum), jnp.where(moves, 0, steps))


def _list_output(
    policy_logps: Array, reference_logps: Array, mask: Array, targets: Array, tau: Array, anchor_kl_coef: float
) -> LossOutput:
    """KL(targets || softmax(u)) and the token penalty; targets [B, K] sum to one over present candidates, tau [B]."""
    require_between(0.0, float("inf"), anchor_kl_coef=anchor_kl_coef)
    sums = completion_sums(policy_logps, reference_logps, mask)
    chex.assert_equal_shape([sums.log_ratio, targets])
    there = _there(mask)
    anchored = sums.log_ratio / tau[:, None]
    list_kl = masked_sum(targets * (_log_targets(targets, there) - _log_softmax(anchored, there)), there)
    anchor_kl = _token_penalty(policy_logps, reference_logps, mask)
    best = _first_best(targets, there)
    agrees = (jnp.argmin(ranks(anchored, there), axis=-1) == best) & (there != 0).any(-1)
    metrics = {
        "list_kl": list_kl,
        "anchor_kl": anchor_kl,
        "target_entropy": _entropy(targets, there),
        "temperature": tau,
        "accuracy": agrees.astype(jnp.float32),
        "win_mass": _mass(sums.logps, there, best),
    }
    return LossOutput(list_kl + anchor_kl_coef * anchor_kl, metrics)


def _token_penalty(policy_logps: Array, reference_logps: Array, mask: Array) -> Array:
    """k3, the mean over a list's tokens of e^d - d - 1 with d = log anchor - log pi, [B, K, T] -> [B]."""
    # Capped as a whole: with the exponential alone capped, -d would draw the policy further away beyond the cap.
    anchor = jax.lax.stop_gradient(reference_logps.astype(jnp.float32))
    d = jnp.where(mask != 0, jnp.minimum(anchor - policy_logps.astype(jnp.float32), MAX_EXPONENT), 0.0)
    rows = mask.shape[0]
    return masked_mean((jnp.expm1(d) - d).reshape(rows, -1), mask.reshape(rows, -1))


def _there(mask: Array) -> Array:
    """Float32 [B, K]: one for candidates with a token."""
    return (mask != 0).any(-1).astype(jnp.float32)


def _log_softmax(values: Array, there: Array) -> Array:
    """Log-softmax over present candidates, [..., K]; 0 at absent ones."""
    # Masked before exp: an absent score above all others would leave none of the rest.
    values = jnp.where(there != 0, values, jnp.finfo(jnp.float32).min)
    return jnp.where(there != 0, jax.nn.log_softmax(values, axis=-1), 0.0)


def _entropy(targets: Array, there: Array) -> Array:
    """-sum q log q in nats, [..., K] -> [...]."""
    return -masked_sum(targets * _log_targets(targets, there), there)


def _log_targets(targets: Array, there: Array) -> Array:
    """log q, and 0 where q is 0, for which q log q is 0 too."""
    return jnp.log(jnp.where((targets > 0) & (there != 0), targets, 1.0))


def _centred(scores: Array, there: Array) -> tuple[Array, Array]:
    """Scores less their mean, 0 at absent candidates, and their unbiased standard deviation, [..., K] and [..., 1]."""
    scores = jax.lax.stop_gradient(scores.astype(jnp.float32))
    mean = masked_mean(scores, there)[..., None]
    centred = jnp.where(there != 0, scores - mean, 0.0)
    freedom = jnp.maximum(masked_sum(jnp.ones_like(scores), there) - 1, 1.0)
    return centred, jnp.sqrt(masked_sum(jnp.square(centred), there) / freedom)[..., None]


def _first_best(scores: Array, there: Array) -> Array:
    return jnp.argmin(ranks(scores, there), axis=-1)


def _mass(logps: Array, there: Array, best: Array) -> Array:
    """Share that softmax(logps) over present candidates gives to one of them, [B, K] -> [B]; 0 for an empty list."""
    share = jnp.where(there != 0, jnp.exp(_log_softmax(logps, there)), 0.0)
    return jnp.take_along_axis(share, best[..., None], axis=-1)[..., 0]

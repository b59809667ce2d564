"""beta-DPO: one beta per batch, larger when the batch's reward gaps are, and pairs with unusual gaps left out.

Wu et al. 2024, arXiv 2407.08639. Evidence: official code. With A_i = (S_w - S_w^ref) - (S_l - S_l^ref) of each pair, a
constant without beta, and a moving mean m and deviation s of A, both 0 at the start,

    m <- decay m + (1 - decay) mean(A),   s <- decay s + (1 - decay) std(A)          updated first, then used
    keep floor(B (1 - filter_ratio)) pairs, drawn without replacement with weights exp(-((A_i - m) / s)^2 / 2)
    beta_used = max(beta (1 + alpha (mean over kept A - m)), min_beta)
    loss = mean over kept of -log sigma(beta_used A_i)

The paper writes the gap as beta A; its code leaves beta out, and this follows the code: the paper's form is
alpha = 0.6 beta. Since m and s start at 0, the first batches are kept close to a tenth of their mean gap.
Rows of a batch are coupled: microbatches change the selection and beta, and each of them moves m and s.
Shapes: log-probabilities and masks [B, T], results [B] float32; state two float32 scalars. Reference, masks and the
selection are constants.
Reduces to: DPO at alpha = 0 and filter_ratio = 0.

>>> import jax
>>> import jax.numpy as jnp
>>> pair = dict(policy_chosen_logps=jnp.array([[-1.0], [-1.0]]), reference_chosen_logps=jnp.array([[-2.0], [-4.0]]),
...             policy_rejected_logps=jnp.array([[-3.0], [-2.0]]), reference_rejected_logps=jnp.array([[-3.0], [-2.0]]),
...             chosen_mask=jnp.array([[1], [1]]), rejected_mask=jnp.array([[1], [1]]))
>>> output = beta_dpo_loss(**pair, loss_state=beta_dpo_state(), key=jax.random.key(0), alpha=0.5, filter_ratio=0.0)
>>> print(f"{output.state.gap_mean:.2f} {output.metrics['beta_used'][0]:.2f}")  # A = 1, 3; 0.1 (1 + 0.5 (2 - 0.2))
0.20 0.19
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax.ops import (
    batch_mean,
    completion_sums,
    logistic_loss,
    masked_sum,
    pair_metrics,
    present,
    ranks,
    require_between,
    require_positive,
    safe_divide,
)
from dpo_jax.types import Array, LossOutput

STD_FLOOR = 1e-8  # added to the deviation: equal gaps, or a batch of one pair, have none


class BetaDpoState(NamedTuple):
    """Moving mean and standard deviation of the log-ratio margins, float32 scalars."""

    gap_mean: Array
    gap_std: Array


def beta_dpo_state() -> BetaDpoState:
    """The state before the first batch: zeros, as in the official code."""
    return BetaDpoState(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))


def track_gaps(gap: Array, there: Array, state: BetaDpoState, *, decay: float = 0.9) -> BetaDpoState:
    """Moving mean and (unbiased) deviation after a batch; unchanged by a batch without rows.

    Args:
      gap: [B] margins of log ratios, a constant.
      there: [B], zero at empty places.
      state: before the batch.
      decay: share of the old value, in [0, 1].
    """
    require_between(0.0, 1.0, decay=decay)
    gap = jax.lax.stop_gradient(gap.astype(jnp.float32))
    there = (there != 0).astype(jnp.float32)
    count = jnp.sum(there)
    mean = batch_mean(gap, there)
    std = jnp.sqrt(safe_divide(masked_sum(jnp.square(gap - mean), there), jnp.maximum(count - 1, 0.0)))
    moved = BetaDpoState(
        decay * state.gap_mean + (1 - decay) * mean,
        decay * state.gap_std + (1 - decay) * std,
    )
    return jax.tree.map(lambda new, old: jnp.where(count > 0, new, old), moved, state)


def select_pairs(gap: Array, there: Array, state: BetaDpoState, key: Array, *, filter_ratio: float = 0.2) -> Array:
    """Draw pairs without replacement with weights of a normal density in the gap, float32 [B]: one where kept.

    Of n rows that are there floor(n (1 - filter_ratio)) are kept, and at least one. The largest of log weight plus
    Gumbel noise are an exact draw without replacement (Kool et al. 2019, arXiv 1903.06059).

    Args:
      gap: [B] margins of log ratios, a constant.
      there: [B], zero at empty places, which are never kept.
      state: centre and width of the density.
      key: PRNG key.
      filter_ratio: share of rows to leave out, in [0, 1).
    """
    if not 0 <= filter_ratio < 1:
        raise ValueError(f"filter_ratio is {filter_ratio}; give a share in [0, 1)")
    gap = jax.lax.stop_gradient(gap.astype(jnp.float32))
    log_weight = -0.5 * jnp.square((gap - state.gap_mean) / (state.gap_std + STD_FLOOR))
    noise = jax.random.gumbel(key, gap.shape, jnp.float32)
    score = jnp.maximum(log_weight, jnp.finfo(jnp.float32).min / 2) + noise
    # One part in a million more, lest 10 * (1 - 0.9) falls below 1 by rounding.
    kept = jnp.floor(jnp.sum(there != 0) * (1 - filter_ratio) * (1 + 1e-6))
    return ((ranks(score, there) <= jnp.maximum(kept, 1.0)) & (there != 0)).astype(jnp.float32)


def beta_dpo_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    loss_state: BetaDpoState,
    key: Array,
    beta: float = 0.1,
    alpha: float = 0.6,
    filter_ratio: float = 0.2,
    decay: float = 0.9,
    min_beta: float = 1e-3,
) -> LossOutput:
    """DPO with a dynamic beta on a selection of pairs; batch-coupled.

    The loss of a kept pair is scaled by n / n_kept, that of the others is 0: the mean over the n rows that are there is
    the mean over kept ones. Rewards in the metrics use `beta`; `beta_used`, `gap_mean`, `gap_std` are the batch's,
    `kept` is one for kept pairs.

    Args:
      beta: strength of the KL constraint to the reference before it is adapted, above 0.
      alpha: how much beta follows the kept pairs' mean gap, per nat of log-ratio margin, at least 0.
      filter_ratio: share of pairs that are left out, in [0, 1).
      decay: share of the old moving mean and deviation at each batch, in [0, 1].
      min_beta: lower bound of the adapted beta, above 0.
    """
    require_positive(beta=beta, min_beta=min_beta)
    require_between(0.0, float("inf"), alpha=alpha)
    chosen = completion_sums(policy_chosen_logps, reference_chosen_logps, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, reference_rejected_logps, rejected_mask)
    there = present(chosen_mask, rejected_mask)
    margin = chosen.log_ratio - rejected.log_ratio
    gap = jax.lax.stop_gradient(margin)  # no gradient through the selection or beta, as in the official code
    state = track_gaps(gap, there, loss_state, decay=decay)
    kept = select_pairs(gap, there, state, key, filter_ratio=filter_ratio)
    beta_used = jnp.maximum(beta * (1 + alpha * (batch_mean(gap, kept) - state.gap_mean)), min_beta)
    scale = kept * safe_divide(jnp.sum(there), jnp.sum(kept))
    metrics = pair_metrics(chosen, rejected, beta * chosen.log_ratio, beta * rejected.log_ratio)
    metrics["kept"] = kept
    for name, value in (("beta_used", beta_used), ("gap_mean", state.gap_mean), ("gap_std", state.gap_std)):
        metrics[name] = jnp.full_like(gap, value)
    return LossOutput(scale * logistic_loss(beta_used * margin), metrics, state)

"""Other readings of DPO's two log-ratios: EXO, NCA, APO, DiscoPOP, AOT, BCO on pairs, MPO.

EXO arXiv 2402.00856, NCA 2402.05369, DiscoPOP 2406.08414 (Evidence: official code); APO 2408.06266 (Evidence: the
implementation that the authors name); AOT 2406.05882, BCO 2404.04656, MPO 2411.10442 (Evidence: other libraries).
With u, v the log-ratios of the chosen and the rejected answer summed over tokens, a = beta u, b = beta v, x = a - b,

    exo_pair      KL( (sigma(x), sigma(-x)) || (1-e, e) )              reverse KL: seeks a mode, as RL does
    nca_pair      softplus(-a) + softplus(a)/2 + softplus(b)/2         pointwise: the chosen answer stays likely
    apo_zero      sigma(-a) + sigma(b)                                 chosen up, rejected down
    apo_down      sigma(a) + sigma(-x)                                 chosen down, margin up
    discopop      (1-g) softplus(-x) + g e^-x,  g = sigma(x/tau)       found by search; not monotone
    aot           cdpo on sort(S_w - S_l) - sort(reference's S_w - S_l)
    aot_unpaired  cdpo on sort(u) - sort(v)                            first-order stochastic dominance
    bco_pair      softplus(d - a) + softplus(b - d)                    d the reward shift
    mpo           0.8 dpo + 0.2 bco_pair + NLL(y_w)

Shapes: log-probabilities [B, T] in any float dtype, masks [B, T] one at completion tokens; every result [B] float32.
Reference arrays and masks are constants. Options out of their range raise ValueError.
Reduces to: aot and aot_unpaired on one pair, and mpo with weights (1, 0, 0), are dpo; nca_pair is the list form
(`listwise_nca`) at K = 2 with all weight on the chosen answer.
Metrics: those of `ops.pair_metrics`, rewards a and b; `quantile_margin` and `nll` where they exist.

>>> import jax.numpy as jnp
>>> pair = dict(policy_chosen_logps=jnp.array([[-1.0, -2.0]]), reference_chosen_logps=jnp.array([[-2.0, -3.0]]),
...             policy_rejected_logps=jnp.array([[-4.0, -9.0]]), reference_rejected_logps=jnp.array([[-3.0, -9.0]]),
...             chosen_mask=jnp.array([[1, 1]]), rejected_mask=jnp.array([[1, 0]]))
>>> print(f"{bco_pair_loss(**pair, beta=0.5).loss[0]:.4f}")  # a = 1, b = -0.5: softplus(-1) + softplus(-0.5)
0.7873
>>> print(f"{aot_loss(**pair, beta=0.5).loss[0]:.4f}")  # one pair: DPO, softplus(-1.5)
0.2014
"""

import math

import jax
import jax.numpy as jnp

from dpo_jax.ops import (
    CompletionSums,
    completion_sums,
    logistic_loss,
    masked_sum,
    pair_metrics,
    present,
    require_between,
    require_positive,
    smoothed_logistic_loss,
    token_mean_nll,
)
from dpo_jax.types import Array, LossOutput


def exo_pair_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 0.5,
    label_smoothing: float = 1e-3,
) -> LossOutput:
    """EXO on pairs (Ji et al. 2024, arXiv 2402.00856): reverse KL from the policy's preference to a smoothed label.

    The slope is sigma(x) sigma(-x) (x - log((1 - e) / e)): it vanishes at the optimum and for badly wrong pairs.

    Args:
      beta: the paper's beta_pi, scale of the log-ratios, above 0.
      label_smoothing: probability e that the label gives to the rejected answer, in (0, 1/2].
    """
    require_positive(label_smoothing=label_smoothing)
    require_between(0.0, 0.5, label_smoothing=label_smoothing)
    chosen = completion_sums(policy_chosen_logps, reference_chosen_logps, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, reference_rejected_logps, rejected_mask)
    a, b = _rewards(chosen, rejected, beta)
    x = a - b
    loss = jax.nn.sigmoid(x) * (jax.nn.log_sigmoid(x) - math.log1p(-label_smoothing))
    loss += jax.nn.sigmoid(-x) * (jax.nn.log_sigmoid(-x) - math.log(label_smoothing))
    return LossOutput(loss, pair_metrics(chosen, rejected, a, b))


def nca_pair_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 0.01,
) -> LossOutput:
    """NCA on pairs (Chen et al. 2024, arXiv 2402.05369): each answer is told from noise on its own.

    The chosen reward rests at a = log 2 whatever the rejected one does, so the chosen likelihood cannot sink.

    Args:
      beta: scale of the log-ratios, above 0.
    """
    chosen = completion_sums(policy_chosen_logps, reference_chosen_logps, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, reference_rejected_logps, rejected_mask)
    a, b = _rewards(chosen, rejected, beta)
    loss = logistic_loss(a) + 0.5 * (logistic_loss(-a) + logistic_loss(-b))
    return LossOutput(loss, pair_metrics(chosen, rejected, a, b))


def apo_zero_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 0.1,
) -> LossOutput:
    """APO-zero (D'Oosterlinck et al. 2024, arXiv 2408.06266): chosen likelihood up, rejected down, each by itself.

    For data whose chosen answers are better than what the policy writes. In (0, 2); the paper omits the constant 1.

    Args:
      beta: scale of the log-ratios, above 0.
    """
    chosen = completion_sums(policy_chosen_logps, reference_chosen_logps, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, reference_rejected_logps, rejected_mask)
    a, b = _rewards(chosen, rejected, beta)
    return LossOutput(jax.nn.sigmoid(-a) + jax.nn.sigmoid(b), pair_metrics(chosen, rejected, a, b))


def apo_down_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 0.1,
) -> LossOutput:
    """APO-down (arXiv 2408.06266): both likelihoods down, the rejected one faster.

    For data whose chosen answers are worse than what the policy writes; on better answers it destroys the policy.

    Args:
      beta: scale of the log-ratios, above 0.
    """
    chosen = completion_sums(policy_chosen_logps, reference_chosen_logps, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, reference_rejected_logps, rejected_mask)
    a, b = _rewards(chosen, rejected, beta)
    return LossOutput(jax.nn.sigmoid(a) + jax.nn.sigmoid(b - a), pair_metrics(chosen, rejected, a, b))


def discopop_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 0.05,
    tau: float = 0.05,
) -> LossOutput:
    """DiscoPOP, the log-ratio modulated loss (Lu et al. 2024, arXiv 2406.08414), found by a language model's search.

    It slopes upwards between x = -0.119 and x = 0.072 (tau 0.05): a fresh policy is first pushed the wrong way.

    Args:
      beta: scale of the log-ratios, above 0.
      tau: width of the passage from the logistic to the exponential loss in x, in (0, 1].
    """
    require_positive(tau=tau)
    require_between(0.0, 1.0, tau=tau)
    chosen = completion_sums(policy_chosen_logps, reference_chosen_logps, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, reference_rejected_logps, rejected_mask)
    a, b = _rewards(chosen, rejected, beta)
    x = a - b
    # One exponent for g e^-x: at large -x the two factors would be 0 and inf. With tau <= 1 it is at most 0.
    exponential = jnp.exp(jax.nn.log_sigmoid(x / tau) - x)
    loss = jax.nn.sigmoid(-x / tau) * logistic_loss(x) + exponential
    return LossOutput(loss, pair_metrics(chosen, rejected, a, b))


def aot_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 0.01,
    label_smoothing: float = 0.0,
) -> LossOutput:
    """AOT on pairs (Melnyk et al. 2024, arXiv 2406.05882): the policy's margins dominate the reference's, rank by rank.

    This loss is batch-coupled: the k-th smallest margin of the policy meets the k-th smallest of the reference, and
    the row that holds it carries the loss. Microbatches change it. The metric `quantile_margin` is beta times the gap.

    Args:
      beta: scale of the gaps between quantiles, above 0.
      label_smoothing: weight of the reverse order, in [0, 1/2].
    """
    chosen = completion_sums(policy_chosen_logps, reference_chosen_logps, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, reference_rejected_logps, rejected_mask)
    there = present(chosen_mask, rejected_mask)
    policy_margin = chosen.logps - rejected.logps
    reference_margin = jax.lax.stop_gradient(
        masked_sum(reference_chosen_logps, chosen_mask) - masked_sum(reference_rejected_logps, rejected_mask)
    )
    gap = policy_margin - _at_the_same_rank(policy_margin, reference_margin, there)
    return _dominance(chosen, rejected, gap, there, beta, label_smoothing)


def aot_unpaired_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 0.01,
    label_smoothing: float = 0.0,
) -> LossOutput:
    """AOT without pairs (arXiv 2406.05882): the chosen log-ratios dominate the rejected ones, rank by rank.

    Chosen and rejected answers need not share prompts: any other pairing within the batch gives the same loss.
    This loss is batch-coupled: the row whose chosen log-ratio is the k-th smallest carries the loss against the k-th
    smallest rejected one. Microbatches change it. The metric `quantile_margin` is beta times the gap.

    Args:
      beta: scale of the gaps between quantiles, above 0.
      label_smoothing: weight of the reverse order, in [0, 1/2].
    """
    chosen = completion_sums(policy_chosen_logps, reference_chosen_logps, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, reference_rejected_logps, rejected_mask)
    there = present(chosen_mask, rejected_mask)
    gap = chosen.log_ratio - _at_the_same_rank(chosen.log_ratio, rejected.log_ratio, there)
    return _dominance(chosen, rejected, gap, there, beta, label_smoothing)


def bco_pair_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 0.01,
    reward_shift: float = 0.0,
) -> LossOutput:
    """BCO on pairs (Jung et al. 2024, arXiv 2404.04656): a classifier of single answers by their implicit reward.

    Args:
      beta: scale of the log-ratios, above 0.
      reward_shift: the paper's delta, the reward at which an answer is neither good nor bad; a constant.
    """
    chosen = completion_sums(policy_chosen_logps, reference_chosen_logps, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, reference_rejected_logps, rejected_mask)
    a, b = _rewards(chosen, rejected, beta)
    return LossOutput(_binary_classification(a, b, reward_shift), pair_metrics(chosen, rejected, a, b))


def mpo_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 0.1,
    preference_coef: float = 0.8,
    quality_coef: float = 0.2,
    generation_coef: float = 1.0,
    reward_shift: float = 0.0,
) -> LossOutput:
    """Mixed preference optimisation (Wang et al. 2024, arXiv 2411.10442): preference, quality and generation at once.

    This loss is batch-coupled: the NLL is the mean over all chosen tokens of the batch, and microbatches change it.

    Args:
      beta: scale of the log-ratios, above 0.
      preference_coef: weight of the DPO loss, at least 0.
      quality_coef: weight of `bco_pair_loss`, at least 0.
      generation_coef: weight of the chosen answers' NLL per token, at least 0.
      reward_shift: delta of `bco_pair_loss`, a constant.
    """
    require_between(
        0.0,
        math.inf,
        preference_coef=preference_coef,
        quality_coef=quality_coef,
        generation_coef=generation_coef,
    )
    chosen = completion_sums(policy_chosen_logps, reference_chosen_logps, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, reference_rejected_logps, rejected_mask)
    a, b = _rewards(chosen, rejected, beta)
    nll = token_mean_nll(policy_chosen_logps, chosen_mask)
    loss = preference_coef * logistic_loss(a - b) + quality_coef * _binary_classification(a, b, reward_shift)
    return LossOutput(loss + generation_coef * nll, {**pair_metrics(chosen, rejected, a, b), "nll": nll})


def _rewards(chosen: CompletionSums, rejected: CompletionSums, beta: float) -> tuple[Array, Array]:
    """(a, b) = beta (u, v), each [B]."""
    require_positive(beta=beta)
    return beta * chosen.log_ratio, beta * rejected.log_ratio


def _binary_classification(a: Array, b: Array, reward_shift: float) -> Array:
    require_between(-math.inf, math.inf, reward_shift=reward_shift)
    return logistic_loss(a - reward_shift) + logistic_loss(reward_shift - b)


def _at_the_same_rank(own: Array, other: Array, there: Array) -> Array:
    """For each row, the entry of `other` whose rank in `other` is the row's rank in `own`, [B]; gradient flows on.

    Rows that are not there rank behind all others in both, so they meet only each other.
    """
    rank = jnp.argsort(_ascending(own, there))
    return other[_ascending(other, there)[rank]]


def _ascending(values: Array, there: Array) -> Array:
    """Indices of the rows by ascending value [B], absent ones last, ties in the order of the batch."""
    return jnp.argsort(jnp.where(there != 0, jax.lax.stop_gradient(values), jnp.inf), stable=True)


def _dominance(
    chosen: CompletionSums, rejected: CompletionSums, gap: Array, there: Array, beta: float, label_smoothing: float
) -> LossOutput:
    """Smoothed logistic loss of the gaps between quantiles [B], zero at rows that are not there."""
    require_between(0.0, 0.5, label_smoothing=label_smoothing)
    a, b = _rewards(chosen, rejected, beta)
    loss = there * smoothed_logistic_loss(beta * gap, label_smoothing)
    return LossOutput(loss, {**pair_metrics(chosen, rejected, a, b), "quantile_margin": there * beta * gap})

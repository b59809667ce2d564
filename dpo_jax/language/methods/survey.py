"""A Survey of Direct Preference Optimization: its taxonomy, and members of it that need no file of their own.

S. Liu et al. 2025, arXiv 2503.11701. Evidence: the survey's list for the taxonomy; official code for Cal-DPO
(2412.14516) and ODPO (2402.10571), other libraries for DPOP (2402.13228), SLiC-HF (2305.10425) and RRHF (2304.05302),
the papers' formulas for chi-PO (2407.13399), NPO (2404.05868) and Dr. DPO (2407.07880). With S the policy's and u, v
the log-ratios' sums over tokens, m the policy's means over tokens, x = beta (u - v),

    dpop       softplus(-(x - beta lam max(0, -u)))
    cal_dpo    softplus(-(u - v)) + w ((u - 1/(2 beta))^2 + (v + 1/(2 beta))^2)
    odpo       softplus(-(x - alpha log(score_w - score_l)));    odpo_identity without the log
    chi_po     softplus(-clip(beta (e^u + u - e^v - v), -2R, 2R))
    slic       max(0, delta - S_w + S_l) - lam S_w
    rrhf_pair  max(0, m_l - m_w) - lam m_w
    npo        2/beta softplus(beta v)                           unlearning: the rejected answer alone
    dr_dpo     -beta' log mean_batch exp(-dpo/beta')             flipped pairs count less

The links of the survey's GPO entry (2402.05749) are in `gpo`; hinge and logistic are `dpo.hinge_loss` and `dpo_loss`.
Shapes: log-probabilities [B, T] in any float dtype, masks [B, T] one at completion tokens, scores [B]; every result [B]
float32. Reference arrays, scores and masks are constants. Options out of their range raise ValueError.
Reduces to: dpo for dpop with lam = 0 or u >= 0, cal_dpo with w = 0 and beta = 1 in dpo, odpo at score gaps of 1 or
alpha = 0, chi_po where u and v are far below 0, dr_dpo as beta' grows.

>>> import jax.numpy as jnp
>>> pair = dict(policy_chosen_logps=jnp.array([[-1.0, -2.0]]), reference_chosen_logps=jnp.array([[-0.5, -1.5]]),
...             policy_rejected_logps=jnp.array([[-4.0, -9.0]]), reference_rejected_logps=jnp.array([[-3.0, -9.0]]),
...             chosen_mask=jnp.array([[1, 1]]), rejected_mask=jnp.array([[1, 0]]))
>>> print(f"{dpop_loss(**pair, beta=0.5, penalty_coef=2.0).loss[0]:.4f}")  # u = v = -1: x = 0, less 0.5 * 2 * 1
1.3133
>>> groups_of("2405.00675")
('learning framework/self-play',)
"""

import math
from collections.abc import Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp

from dpo_jax.ops import (
    CompletionSums,
    completion_sums,
    logistic_loss,
    pair_metrics,
    present,
    require_between,
    require_positive,
)
from dpo_jax.types import Array, LossOutput

# Where the exponential part of chi-PO's link stops growing: e^20 = 4.9e8, the authors' cap.
MAX_CHI_LOG_RATIO = 20.0

# category -> group -> arXiv ids: several methods share a name (CPO, GRPO, SPO, TPO, D2PO), none shares an id.
TAXONOMY: Mapping[str, Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "data strategy": MappingProxyType(
            {
                "heterogeneity": ("2405.14953", "2405.20304", "2412.20299", "2407.07880"),
                "distinguishability": (
                    *("2402.10571", "2403.07230", "2403.19270", "2404.13846", "2407.08639", "2409.06691"),
                    *("2410.10148", "2501.06645"),
                ),
                "noise": ("2403.00409", "2404.04102"),
                "point-wise feedback": (
                    *("2402.01306", "2404.04656", "2402.05369", "2405.19107", "2406.05882", "2312.02554"),
                    "2412.14516",
                ),
                "pair-wise feedback": ("2305.18290", "2310.12036", "2404.05868", "2409.17431", "2403.03419"),
                "list-wise feedback": (
                    *("2304.05302", "2306.17492", "2402.01878", "2410.04346", "2410.18127", "2402.05369"),
                ),
                "token granularity": ("2404.11999", "2404.12358", "2404.18922", "2410.04350", "2506.14574"),
                "step granularity": ("2406.18629", "2407.00782", "2406.09136", "2410.12854", "2502.14356"),
                "turn granularity": ("2403.02502", "2406.14868", "2501.01821"),
            }
        ),
        "learning framework": MappingProxyType(
            {
                "offline": ("2305.18290", "2401.08417", "2403.07691", "2406.17923"),
                "online": (
                    *("2309.06657", "2312.11456", "2401.10020", "2402.04792", "2405.21046", "2404.19733"),
                    "2406.12168",
                ),
                "active": ("2402.08114",),
                "multi-objective": ("2310.03708", "2402.19085"),
                "self-play": ("2401.01335", "2405.00675", "2312.00886", "2404.03715", "2406.01660"),
            }
        ),
        "constraint mechanism": MappingProxyType(
            {
                "reference-free": ("2401.08417", "2403.07691", "2405.14734", "2502.00883", "2502.14643"),
                "dynamic reference": ("2404.09656", "2504.15843"),
                "divergence": (*("2309.16240", "2402.00856", "2402.05749", "2407.13399", "2404.11999", "2501.18101"),),
                "safety": ("2403.02475", "2404.11049", "2405.12900"),
            }
        ),
        "model property": MappingProxyType(
            {
                "distribution shift": ("2405.19316", "2406.01660"),
                "length bias": ("2403.19159", "2405.14734", "2406.10957", "2409.06411", "2502.14340"),
                "likelihood collapse": ("2402.13228", "2408.06266", "2412.14516", "2502.07599"),
                "alignment tax": ("2405.17931", "2406.04879"),
                "analysis": ("2404.14723", "2406.08414", "2410.04203", "2406.09279"),
            }
        ),
    }
)


def groups_of(arxiv_id: str) -> tuple[str, ...]:
    """Every "category/group" of the survey's taxonomy that lists a paper (host, plain Python).

    Args:
      arxiv_id: such as "2305.18290"; some papers have several groups.

    Raises:
      ValueError: the taxonomy does not list it.
    """
    found = (f"{category}/{group}" for category, groups in TAXONOMY.items() for group in groups)
    found = tuple(name for name in found if arxiv_id in TAXONOMY[name.partition("/")[0]][name.partition("/")[2]])
    if not found:
        raise ValueError(f"the taxonomy lists no paper {arxiv_id!r}; give an arXiv id such as '2305.18290'")
    return found


def dpop_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 0.3,
    penalty_coef: float = 50.0,
) -> LossOutput:
    """DPO-Positive (Pal et al. 2024, arXiv 2402.13228): a chosen answer less likely than under the reference costs.

    The metric `penalty` is what the shortfall takes from the margin, beta penalty_coef max(0, -u).

    Args:
      beta: strength of the KL constraint to the reference, above 0.
      penalty_coef: the paper's lambda, at least 0; 0 is DPO.
    """
    require_between(0.0, math.inf, penalty_coef=penalty_coef)
    chosen = completion_sums(policy_chosen_logps, reference_chosen_logps, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, reference_rejected_logps, rejected_mask)
    penalty = beta * penalty_coef * jax.nn.relu(-chosen.log_ratio)
    loss = logistic_loss(_logits(chosen, rejected, beta) - penalty)
    return LossOutput(loss, {**_metrics(chosen, rejected, beta), "penalty": penalty})


def cal_dpo_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 0.001,
    calibration_coef: float = 0.5,
) -> LossOutput:
    """Cal-DPO (Xiao et al. 2024, arXiv 2412.14516): log-ratios are also drawn to the rewards +-1/2 over beta.

    The logistic term has no beta. Rewards in the metrics are beta times the log-ratios, so their targets are +-1/2.

    Args:
      beta: sets the targets +-1/(2 beta) of the log-ratios, above 0.
      calibration_coef: weight of the squared errors, at least 0; the official code has 1/2, the paper's listing 1.
    """
    require_between(0.0, math.inf, calibration_coef=calibration_coef)
    require_positive(beta=beta)
    chosen = completion_sums(policy_chosen_logps, reference_chosen_logps, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, reference_rejected_logps, rejected_mask)
    u, v, target = chosen.log_ratio, rejected.log_ratio, 1 / (2 * beta)
    calibration = jnp.square(u - target) + jnp.square(v + target)
    metrics = {**_metrics(chosen, rejected, beta), "calibration_error": calibration}
    return LossOutput(logistic_loss(u - v) + calibration_coef * calibration, metrics)


def odpo_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    chosen_score: Array,
    rejected_score: Array,
    beta: float = 0.1,
    alpha: float = 1.0,
) -> LossOutput:
    """DPO with an offset (Amini et al. 2024, arXiv 2402.10571): the margin must exceed alpha log(score gap).

    A pair whose chosen score is not the larger one has loss 0 and no gradient, the limit for a gap that vanishes; the
    metric `scored_above` tells these from the others (1).

    Args:
      beta: strength of the KL constraint to the reference, above 0.
      alpha: weight of the offset, at least 0; 0 is DPO on the pairs with a positive score gap.
    """
    chosen = completion_sums(policy_chosen_logps, reference_chosen_logps, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, reference_rejected_logps, rejected_mask)
    gap = _score_gap(chosen_score, rejected_score, alpha)
    above = gap > 0
    offset = alpha * jnp.log(jnp.where(above, gap, 1.0))
    loss = jnp.where(above, logistic_loss(_logits(chosen, rejected, beta) - offset), 0.0)
    metrics = {**_metrics(chosen, rejected, beta), "offset": offset, "scored_above": above.astype(jnp.float32)}
    return LossOutput(loss, metrics)


def odpo_identity_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    chosen_score: Array,
    rejected_score: Array,
    beta: float = 0.1,
    alpha: float = 1.0,
) -> LossOutput:
    """ODPO with the score gap itself for offset (arXiv 2402.10571): the margin must exceed alpha (score gap).

    Gaps of any sign are allowed. Columns that hold log scores make it the paper's offset by the scores' ratio.

    Args:
      beta: strength of the KL constraint to the reference, above 0.
      alpha: weight of the offset, at least 0; 0 is DPO.
    """
    chosen = completion_sums(policy_chosen_logps, reference_chosen_logps, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, reference_rejected_logps, rejected_mask)
    offset = alpha * _score_gap(chosen_score, rejected_score, alpha)
    loss = logistic_loss(_logits(chosen, rejected, beta) - offset)
    return LossOutput(loss, {**_metrics(chosen, rejected, beta), "offset": offset})


def chi_po_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 0.01,
    reward_bound: float = math.inf,
) -> LossOutput:
    """chi-PO (Huang et al. 2024, arXiv 2407.13399): DPO under a chi-squared plus KL constraint, link z + log z.

    The exponential part of the link stops at a log-ratio of 20, its logarithm goes on. The metric `clipped` is 1 where
    the margin left [-2 reward_bound, 2 reward_bound] and so lost its gradient.

    Args:
      beta: strength of the constraint, above 0; about a tenth of DPO's.
      reward_bound: the paper's R_max, the largest reward that can be meant, above 0; inf never clips.
    """
    require_positive(beta=beta)
    if not reward_bound > 0:
        raise ValueError(f"reward_bound is {reward_bound}; give a number above 0, inf for none")
    chosen = completion_sums(policy_chosen_logps, reference_chosen_logps, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, reference_rejected_logps, rejected_mask)
    a, b = (beta * (jnp.exp(jnp.minimum(r, MAX_CHI_LOG_RATIO)) + r) for r in (chosen.log_ratio, rejected.log_ratio))
    clipped = (jnp.abs(a - b) > 2 * reward_bound).astype(jnp.float32)
    loss = logistic_loss(jnp.clip(a - b, -2 * reward_bound, 2 * reward_bound))
    return LossOutput(loss, {**pair_metrics(chosen, rejected, a, b), "clipped": clipped})


def slic_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    delta: float = 1.0,
    nll_coef: float = 0.1,
) -> LossOutput:
    """SLiC-HF (Zhao et al. 2023, arXiv 2305.10425): hinge on the policy's log-probabilities, held by the chosen NLL.

    Args:
      delta: margin between the log-probabilities of the answers, in nats, at least 0.
      nll_coef: the paper's lambda, weight of the chosen answer's NLL in nats, at least 0.
    """
    require_between(0.0, math.inf, delta=delta, nll_coef=nll_coef)
    chosen = completion_sums(policy_chosen_logps, None, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, None, rejected_mask)
    loss = jax.nn.relu(delta - (chosen.logps - rejected.logps)) - nll_coef * chosen.logps
    return LossOutput(loss, pair_metrics(chosen, rejected, chosen.logps, rejected.logps))


def rrhf_pair_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    nll_coef: float = 1.0,
) -> LossOutput:
    """RRHF on pairs (Yuan et al. 2023, arXiv 2304.05302): ranks by log-probability per token, with the chosen NLL.

    Args:
      nll_coef: weight of the chosen answer's NLL per token, at least 0.
    """
    require_between(0.0, math.inf, nll_coef=nll_coef)
    chosen = completion_sums(policy_chosen_logps, None, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, None, rejected_mask)
    m_w, m_l = chosen.mean_logps, rejected.mean_logps
    return LossOutput(jax.nn.relu(m_l - m_w) - nll_coef * m_w, pair_metrics(chosen, rejected, m_w, m_l))


def npo_loss(
    *,
    policy_rejected_logps: Array,
    reference_rejected_logps: Array,
    rejected_mask: Array,
    beta: float = 0.1,
) -> LossOutput:
    """Negative preference optimisation (Zhang et al. 2024, arXiv 2404.05868): forgets an answer, ever more slowly.

    DPO without a chosen side. Its gradient tends to that of log pi(y), gradient ascent on the NLL, as beta -> 0.

    Args:
      beta: strength of the KL constraint to the reference, above 0.
    """
    require_positive(beta=beta)
    rejected = completion_sums(policy_rejected_logps, reference_rejected_logps, rejected_mask)
    reward = beta * rejected.log_ratio
    metrics = {
        "rejected_reward": reward,
        "rejected_logps": rejected.logps,
        "rejected_log_ratio": rejected.log_ratio,
    }
    return LossOutput((2 / beta) * logistic_loss(-reward), metrics)


def dr_dpo_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 0.1,
    beta_prime: float = 1.0,
) -> LossOutput:
    """Dr. DPO (Wu et al. 2024, arXiv 2407.07880): a soft minimum over the batch, so that flipped pairs count less.

    This loss is batch-coupled: one number for the batch, the same in every row that is there. Microbatches change it.
    The metric `pair_weight`, with mean 1, is each pair's share in the gradient relative to DPO's.

    Args:
      beta: strength of the KL constraint to the reference, above 0.
      beta_prime: temperature of the mean over pairs in nats of the DPO loss, above 0; large is DPO's batch mean.
    """
    require_positive(beta_prime=beta_prime)
    chosen = completion_sums(policy_chosen_logps, reference_chosen_logps, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, reference_rejected_logps, rejected_mask)
    losses = logistic_loss(_logits(chosen, rejected, beta))
    there = present(chosen_mask, rejected_mask)
    count = jnp.maximum(jnp.sum(there), 1.0)
    exponents = jnp.where(there != 0, -losses / beta_prime, jnp.finfo(jnp.float32).min)
    log_sum = jax.nn.logsumexp(exponents)
    loss = jnp.where(there != 0, -beta_prime * (log_sum - jnp.log(count)), 0.0)
    pair_weight = there * count * jnp.exp(exponents - log_sum)
    return LossOutput(loss, {**_metrics(chosen, rejected, beta), "pair_weight": pair_weight})


def _logits(chosen: CompletionSums, rejected: CompletionSums, beta: float) -> Array:
    """x = beta (u - v), [B]."""
    require_positive(beta=beta)
    return beta * (chosen.log_ratio - rejected.log_ratio)


def _metrics(chosen: CompletionSums, rejected: CompletionSums, beta: float) -> dict[str, Array]:
    return pair_metrics(chosen, rejected, beta * chosen.log_ratio, beta * rejected.log_ratio)


def _score_gap(chosen_score: Array, rejected_score: Array, alpha: float) -> Array:
    """score_w - score_l [B], float32, a constant."""
    require_between(0.0, math.inf, alpha=alpha)
    return jax.lax.stop_gradient(chosen_score.astype(jnp.float32) - rejected_score.astype(jnp.float32))

"""ASFT: supervised learning of the chosen answer plus the absolute likelihood of both answers, one by one.

Wang et al. 2024, arXiv 2409.10571. Evidence: restatement with proofs in arXiv 2502.01237 and its authors' code; no
official code was found. With m the mean log-probability over completion tokens and p = e^m,

    align          -log sigma(o(m_w)) - log sigma(-o(m_l)),   o(m) = m - log(1 - p) the log odds
                   = -m_w - log(1 - p_l)
    asft           nll_coef * (-m_w) + align_coef * align
    asft_tempered  softplus(-beta o(m_w)) + softplus(beta o(m_l)), after a separate stage of SFT

Shapes: log-probabilities [B, T] in any float dtype, masks [B, T] one at completion tokens; every result [B] float32.
Reduces to SFT at align_coef = 0; asft_tempered with beta = 1 is align. Align is the binary cross-entropy of p to the
labels 1 and 0: its slopes are -1 in m_w and p_l / (1 - p_l) in m_l, so neither answer feels the other and an unlikely
rejected answer is left alone. Where p_l comes within 1e-6 of 1 that slope is 0. Never below ORPO's penalty:
align = penalty - log(p_w (1 - p_l) + p_l (1 - p_w)).
Metrics: `ops.pair_metrics` with rewards o(m) (tempered: beta * o(m)); `nll`, `align_loss` (align without its weight).

>>> import jax.numpy as jnp
>>> pair = dict(policy_chosen_logps=jnp.log(jnp.array([[0.5, 0.5]])), chosen_mask=jnp.ones((1, 2)),
...             policy_rejected_logps=jnp.log(jnp.array([[0.5, 0.9]])), rejected_mask=jnp.array([[1.0, 0.0]]))
>>> print(f"{asft_loss(**pair).loss[0] / jnp.log(2.0):.4f}")  # -2 log 1/2 - log(1 - 1/2)
3.0000
>>> print(f"{asft_tempered_loss(**pair).loss[0] / jnp.log(2.0):.4f}")  # both odds are 1
2.0000
"""

from dpo_jax.ops import (
    completion_sums,
    log1mexp,
    log_odds,
    logistic_loss,
    pair_metrics,
    require_between,
    require_positive,
)
from dpo_jax.types import Array, LossOutput


def asft_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    align_coef: float = 1.0,
    nll_coef: float = 1.0,
) -> LossOutput:
    """Aligned supervised fine-tuning in one stage, from a base or an instruct model.

    Args:
      align_coef: the paper's lambda, weight of the alignment term, at least 0.
      nll_coef: weight of the chosen answer's NLL per token, at least 0; 0 leaves the alignment term alone.
    """
    require_between(0.0, float("inf"), align_coef=align_coef, nll_coef=nll_coef)
    chosen = completion_sums(policy_chosen_logps, None, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, None, rejected_mask)
    # The log-sigmoids of log odds, simplified: no odds of p_w, and so no limit on its gradient near p_w = 1.
    align = -chosen.mean_logps - log1mexp(rejected.mean_logps)
    metrics = pair_metrics(chosen, rejected, log_odds(chosen.mean_logps), log_odds(rejected.mean_logps))
    metrics |= {"nll": -chosen.mean_logps, "align_loss": align}
    return LossOutput(align_coef * align - nll_coef * chosen.mean_logps, metrics)


def asft_tempered_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 0.1,
) -> LossOutput:
    """The alignment term at a temperature (arXiv 2502.01237), without SFT: the second of two stages.

    Its slope in m_w is -beta sigma(-beta o(m_w)) / (1 - p_w), without the division where p_w is within 1e-6 of 1.

    Args:
      beta: temperature, above 0; 0.001 to 0.5 were best, depending on model and data.
    """
    require_positive(beta=beta)
    chosen = completion_sums(policy_chosen_logps, None, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, None, rejected_mask)
    chosen_reward, rejected_reward = beta * log_odds(chosen.mean_logps), beta * log_odds(rejected.mean_logps)
    align = logistic_loss(chosen_reward) + logistic_loss(-rejected_reward)
    metrics = pair_metrics(chosen, rejected, chosen_reward, rejected_reward)
    return LossOutput(align, {**metrics, "nll": -chosen.mean_logps, "align_loss": align})

"""ORPO: supervised learning of the chosen answer plus a penalty on the odds ratio, in one stage without a reference.

Hong et al. 2024, arXiv 2403.07691. Evidence: official code (penalty, token-mean NLL); the tempered form is that of
arXiv 2502.01237. With m the mean log-probability over completion tokens,

    log odds(m) = m - log(1 - e^m),   z = log odds(m_w) - log odds(m_l)
    orpo             -m_w + penalty_coef * softplus(-beta z)
    orpo_token_mean  NLL over all chosen tokens of the batch in place of -m_w

Shapes: log-probabilities [B, T] in any float dtype, masks [B, T] one at completion tokens; every result [B] float32.
Reduces to SFT at penalty_coef = 0. The penalty is log 2 for equal means, does not change if every token is doubled, and
tends to SimPO's loss (its beta 1, gamma 0) for unlikely answers. Its slopes are -sigma(-z) / (1 - p_w) in m_w and
sigma(-z) / (1 - p_l) in m_l at beta = 1; where p = e^m comes within 1e-6 of 1 the second factor is left out.
The official NLL also counts prompt tokens unless told not to; here it is the completion's. Starts from a base model, so
learning rate and epochs are those of SFT rather than of DPO.
Metrics: `ops.pair_metrics` with rewards beta * log odds; `nll`, `odds_ratio_loss` (the penalty without its weight).

>>> import jax.numpy as jnp
>>> pair = dict(policy_chosen_logps=jnp.log(jnp.array([[0.5, 0.5]])), chosen_mask=jnp.ones((1, 2)),
...             policy_rejected_logps=jnp.log(jnp.array([[0.25, 0.9]])), rejected_mask=jnp.array([[1.0, 0.0]]))
>>> output = orpo_loss(**pair, penalty_coef=1.0)  # odds 1 and 1/3: log 2 - log sigma(log 3) = log 2 + log 4/3
>>> print(f"{output.loss[0]:.4f} {output.metrics['margin'][0]:.4f}")
0.9808 1.0986
"""

from dpo_jax.ops import (
    completion_sums,
    log_odds,
    logistic_loss,
    pair_metrics,
    require_between,
    require_positive,
    token_mean_nll,
)
from dpo_jax.types import Array, LossOutput


def orpo_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    penalty_coef: float = 0.1,
    beta: float = 1.0,
) -> LossOutput:
    """Odds ratio preference optimisation; every chosen answer's NLL is the mean over its own tokens.

    Args:
      penalty_coef: the paper's lambda, weight of the odds-ratio penalty, at least 0; 0.1 to 0.25 in the paper.
      beta: temperature of the penalty, above 0; 1 in the paper, 0.2 to 0.7 after a stage of SFT.
    """
    arrays = (policy_chosen_logps, policy_rejected_logps, chosen_mask, rejected_mask)
    return _penalised(*arrays, None, penalty_coef, beta)


def orpo_token_mean_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    penalty_coef: float = 0.1,
    beta: float = 1.0,
) -> LossOutput:
    """`orpo_loss` with the NLL averaged over all chosen tokens of the batch, as in the official code.

    This loss is batch-coupled: long answers weigh more, and microbatches change the scale of the NLL.

    Args:
      penalty_coef: the paper's lambda, weight of the odds-ratio penalty, at least 0; 0.1 to 0.25 in the paper.
      beta: temperature of the penalty, above 0; 1 in the paper, 0.2 to 0.7 after a stage of SFT.
    """
    arrays = (policy_chosen_logps, policy_rejected_logps, chosen_mask, rejected_mask)
    return _penalised(*arrays, token_mean_nll(policy_chosen_logps, chosen_mask), penalty_coef, beta)


def _penalised(
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    nll: Array | None,
    penalty_coef: float,
    beta: float,
) -> LossOutput:
    """NLL (by default that of each chosen answer's own tokens) plus the penalty."""
    require_positive(beta=beta)
    require_between(0.0, float("inf"), penalty_coef=penalty_coef)
    chosen = completion_sums(policy_chosen_logps, None, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, None, rejected_mask)
    chosen_mean = chosen.mean_logps
    rejected_mean = rejected.mean_logps
    nll = -chosen_mean if nll is None else nll
    chosen_odds, rejected_odds = log_odds(chosen_mean), log_odds(rejected_mean)
    penalty = logistic_loss(beta * (chosen_odds - rejected_odds))
    metrics = pair_metrics(chosen, rejected, beta * chosen_odds, beta * rejected_odds)
    return LossOutput(nll + penalty_coef * penalty, {**metrics, "nll": nll, "odds_ratio_loss": penalty})

"""CPO: DPO with a uniform reference and the chosen answer's likelihood as an anchor, made for translation.

Xu et al. 2024, arXiv 2401.08417; arpo: Xu et al. 2024 (X-ALMA), arXiv 2410.03115. Evidence: official code (first
release for cpo, current head for arpo). With S the sum and m the mean of log-probabilities over completion tokens,

    cpo        softplus(-beta (S_w - S_l))            + nll_coef * NLL
    cpo_hinge  max(0, 1 - beta (S_w - S_l))           + nll_coef * NLL
    cpo_ipo    (m_w - m_l - 1/(2 beta))^2             + nll_coef * NLL
    arpo       softplus(-beta (S_w - k S_l))          + nll_coef * NLL,   k = min(c1 exp(c2 |m_w - m_l|) - 1, 1)
    NLL        cross-entropy averaged over all chosen tokens of the batch

Shapes: log-probabilities [B, T] in any float dtype, masks [B, T] one at completion tokens; every result [B] float32.
All are batch-coupled through the NLL alone: its scale is the mean length of the batch's chosen answers.
Reduces to reference-free DPO at nll_coef = 0; arpo to cpo where k = 1, that is |m_w - m_l| >= ln(2/c1)/c2.
Preferences count sums and the NLL counts tokens, so their ratio moves with length. S_w - S_l is tens to hundreds of
nats: values of beta that suit DPO do not carry over.
Metrics: `ops.pair_metrics` with rewards beta S (cpo_ipo: beta m; arpo: beta S_w and beta k S_l), `nll`.

>>> import jax.numpy as jnp
>>> pair = dict(policy_chosen_logps=jnp.array([[-1.0, -2.0]]), chosen_mask=jnp.array([[1, 1]]),
...             policy_rejected_logps=jnp.array([[-6.0, -9.0]]), rejected_mask=jnp.array([[1, 0]]))
>>> print(f"{cpo_loss(**pair, beta=0.5, nll_coef=0.0).loss[0]:.4f}")  # softplus(-0.5 * 3)
0.2014
>>> print(f"{cpo_hinge_loss(**pair, beta=0.2).loss[0]:.2f}")  # 1 - 0.2 * 3 + 3/2
1.90
"""

import jax
import jax.numpy as jnp

from dpo_jax.ops import (
    MAX_EXPONENT,
    CompletionSums,
    completion_sums,
    logistic_loss,
    pair_metrics,
    require_between,
    require_positive,
    smoothed_logistic_loss,
    token_mean_nll,
)
from dpo_jax.types import Array, LossOutput


def cpo_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 0.1,
    nll_coef: float = 1.0,
    label_smoothing: float = 0.0,
) -> LossOutput:
    """Contrastive preference optimisation (arXiv 2401.08417); batch-coupled through the NLL.

    Args:
      beta: scale of the log-probability margin, above 0.
      nll_coef: weight of the chosen answers' NLL, at least 0 (cpo_alpha in code).
      label_smoothing: probability that a label is flipped, in [0, 1/2] (official code only).
    """
    require_positive(beta=beta)
    require_between(0.0, 0.5, label_smoothing=label_smoothing)
    chosen, rejected = _answers(policy_chosen_logps, policy_rejected_logps, chosen_mask, rejected_mask)
    preference = smoothed_logistic_loss(beta * (chosen.logps - rejected.logps), label_smoothing)
    metrics = pair_metrics(chosen, rejected, beta * chosen.logps, beta * rejected.logps)
    return _with_nll(preference, token_mean_nll(policy_chosen_logps, chosen_mask), nll_coef, metrics)


def cpo_hinge_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 0.1,
    nll_coef: float = 1.0,
) -> LossOutput:
    """CPO with a hinge, as SLiC (arXiv 2305.10425) has it on summed log-probabilities; batch-coupled through the NLL.

    Args:
      beta: scale of the log-probability margin, which stops counting at 1/beta; above 0.
      nll_coef: weight of the chosen answers' NLL, at least 0.
    """
    require_positive(beta=beta)
    chosen, rejected = _answers(policy_chosen_logps, policy_rejected_logps, chosen_mask, rejected_mask)
    preference = jax.nn.relu(1 - beta * (chosen.logps - rejected.logps))
    metrics = pair_metrics(chosen, rejected, beta * chosen.logps, beta * rejected.logps)
    return _with_nll(preference, token_mean_nll(policy_chosen_logps, chosen_mask), nll_coef, metrics)


def cpo_ipo_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 0.1,
    nll_coef: float = 1.0,
) -> LossOutput:
    """CPO with IPO's square (arXiv 2310.12036) on mean log-probabilities; batch-coupled through the NLL.

    Args:
      beta: the margin per token is drawn to 1/(2 beta), above 0.
      nll_coef: weight of the chosen answers' NLL, at least 0.
    """
    require_positive(beta=beta)
    chosen, rejected = _answers(policy_chosen_logps, policy_rejected_logps, chosen_mask, rejected_mask)
    chosen_mean, rejected_mean = chosen.mean_logps, rejected.mean_logps
    preference = jnp.square(chosen_mean - rejected_mean - 1 / (2 * beta))
    metrics = pair_metrics(chosen, rejected, beta * chosen_mean, beta * rejected_mean)
    return _with_nll(preference, token_mean_nll(policy_chosen_logps, chosen_mask), nll_coef, metrics)


def arpo_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 0.1,
    nll_coef: float = 1.0,
    relax_scale: float = 0.9,
    relax_rate: float = 0.4,
) -> LossOutput:
    """Adaptive-rejection preference optimisation (arXiv 2410.03115): a rejected answer like the chosen one is spared.

    The rejected answer counts k times, which grows with the gap of the two means up to 1; for equal means k is c1 - 1,
    negative at the defaults. The gradient flows through k, as in the official code: below the cap it widens the gap of
    the means besides, and jumps where they are equal. The metric `rejection` is k. This loss is batch-coupled through
    the NLL.

    Args:
      beta: scale of the log-probability margin, above 0.
      nll_coef: weight of the chosen answers' NLL, at least 0.
      relax_scale: c1, above 0; k is c1 - 1 for equal means.
      relax_rate: c2, at least 0: how fast k grows with the gap of the means.
    """
    require_positive(beta=beta, relax_scale=relax_scale)
    require_between(0.0, float("inf"), relax_rate=relax_rate)
    chosen, rejected = _answers(policy_chosen_logps, policy_rejected_logps, chosen_mask, rejected_mask)
    difference = chosen.mean_logps - rejected.mean_logps
    # |d| with slope 0 at d = 0, as in the official code; jnp.abs has slope 1 there.
    gap = relax_rate * difference * jnp.sign(difference)
    # Cut before exp: the cap at 1 alone would leave 0 * inf in the backward pass.
    rejection = jnp.minimum(relax_scale * jnp.exp(jnp.minimum(gap, MAX_EXPONENT)) - 1, 1.0)
    chosen_reward, rejected_reward = beta * chosen.logps, beta * rejection * rejected.logps
    preference = logistic_loss(chosen_reward - rejected_reward)
    metrics = {**pair_metrics(chosen, rejected, chosen_reward, rejected_reward), "rejection": rejection}
    return _with_nll(preference, token_mean_nll(policy_chosen_logps, chosen_mask), nll_coef, metrics)


def _answers(
    policy_chosen_logps: Array, policy_rejected_logps: Array, chosen_mask: Array, rejected_mask: Array
) -> tuple[CompletionSums, CompletionSums]:
    chosen = completion_sums(policy_chosen_logps, None, chosen_mask)
    return chosen, completion_sums(policy_rejected_logps, None, rejected_mask)


def _with_nll(preference: Array, nll: Array, nll_coef: float, metrics: dict[str, Array]) -> LossOutput:
    require_between(0.0, float("inf"), nll_coef=nll_coef)
    return LossOutput(preference + nll_coef * nll, {**metrics, "nll": nll})

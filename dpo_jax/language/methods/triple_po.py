"""TPO: imitate a gold answer and prefer a chosen to a rejected one, in a single run without a reference model.

Saeidi et al. 2024, arXiv 2405.16681 (Triple Preference Optimization). Evidence: official code, another library. With S
the sum and M the mean of log pi over the completion's tokens,

    TPO        z = beta (S_w - S_l),           -log sigma(z)
    TPO-L      z = beta (M_w - M_l) - gamma,   -log sigma(z)
    hinge      max(0, 1 - beta (S_w - S_l))
    IPO        (M_w - M_l - 1/(2 beta))^2
    all        + nll_coef * NLL_gold,  NLL_gold the mean over all gold tokens of the batch

With label smoothing e the logistic ones are (1-e) softplus(-z) + e softplus(z). The NLL couples the rows of a batch.
Shapes: log-probabilities and masks [B, T]; results [B] float32. Masks are constants.
Reduces to: at nll_coef = 0 reference-free DPO (TPO) and SimPO with the margin gamma (TPO-L); log 2 at S_w = S_l (TPO),
log(1 + e^gamma) at M_w = M_l (TPO-L).

>>> import jax.numpy as jnp
>>> triple = dict(policy_gold_logps=jnp.array([[-0.5, -1.5]]), gold_mask=jnp.array([[1, 1]]),
...               policy_chosen_logps=jnp.array([[-1.0, -2.0]]), chosen_mask=jnp.array([[1, 1]]),
...               policy_rejected_logps=jnp.array([[-4.0, -9.0]]), rejected_mask=jnp.array([[1, 0]]))
>>> print(f"{triple_po_loss(**triple, beta=0.5).loss[0]:.4f}")  # softplus(-0.5) + 1
1.4741
>>> print(f"{triple_po_hinge_loss(**triple, beta=0.5).loss[0]:.2f}")  # 1 - 0.5 + 1
1.50
>>> print(f"{triple_po_ipo_loss(**triple, beta=0.5).loss[0]:.2f}")  # (2.5 - 1)^2 + 1
3.25
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from dpo_jax.ops import (
    CompletionSums,
    completion_sums,
    masked_sum,
    pair_metrics,
    require_between,
    require_positive,
    smoothed_logistic_loss,
    token_mean_nll,
)
from dpo_jax.types import Array, LossOutput


def triple_po_loss(
    *,
    policy_gold_logps: Array,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    gold_mask: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 0.01,
    nll_coef: float = 1.0,
    label_smoothing: float = 0.0,
) -> LossOutput:
    """TPO: logistic loss on summed log-probabilities plus the gold answer's NLL; batch-coupled by its token mean.

    Args:
      beta: scale of the log-probability margin, above 0.
      nll_coef: the paper's alpha, weight of the gold answer's NLL per token, at least 0.
      label_smoothing: probability that chosen and rejected are swapped, in [0, 1/2].
    """
    require_positive(beta=beta)
    require_between(0.0, 0.5, label_smoothing=label_smoothing)
    chosen, rejected = _sums(policy_chosen_logps, chosen_mask), _sums(policy_rejected_logps, rejected_mask)
    preference = smoothed_logistic_loss(beta * (chosen.logps - rejected.logps), label_smoothing)
    metrics = pair_metrics(chosen, rejected, beta * chosen.logps, beta * rejected.logps)
    return _with_gold(preference, metrics, policy_gold_logps, gold_mask, nll_coef)


def triple_po_length_loss(
    *,
    policy_gold_logps: Array,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    gold_mask: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 0.01,
    gamma: float = 0.5,
    nll_coef: float = 1.0,
    label_smoothing: float = 0.0,
) -> LossOutput:
    """TPO-L: logistic loss on mean log-probabilities with a margin, plus the gold answer's NLL; batch-coupled.

    Args:
      beta: scale of the margin of log-probabilities per token, above 0; 0.01 to 10 in the paper, by model.
      gamma: margin that beta times the gap should exceed, at least 0; 0.3 to 10 in the paper, by model and data.
      nll_coef: the paper's alpha, weight of the gold answer's NLL per token, at least 0.
      label_smoothing: probability that chosen and rejected are swapped, in [0, 1/2].
    """
    require_positive(beta=beta)
    require_between(0.0, float("inf"), gamma=gamma)
    require_between(0.0, 0.5, label_smoothing=label_smoothing)
    chosen, rejected = _sums(policy_chosen_logps, chosen_mask), _sums(policy_rejected_logps, rejected_mask)
    chosen_mean, rejected_mean = chosen.mean_logps, rejected.mean_logps
    preference = smoothed_logistic_loss(beta * (chosen_mean - rejected_mean) - gamma, label_smoothing)
    metrics = pair_metrics(chosen, rejected, beta * chosen_mean, beta * rejected_mean)
    return _with_gold(preference, metrics, policy_gold_logps, gold_mask, nll_coef)


def triple_po_hinge_loss(
    *,
    policy_gold_logps: Array,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    gold_mask: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 0.01,
    nll_coef: float = 1.0,
) -> LossOutput:
    """TPO with a hinge on summed log-probabilities; batch-coupled by the gold answer's NLL.

    Args:
      beta: scale of the log-probability margin, which stops counting at 1/beta; above 0.
      nll_coef: the paper's alpha, weight of the gold answer's NLL per token, at least 0.
    """
    require_positive(beta=beta)
    chosen, rejected = _sums(policy_chosen_logps, chosen_mask), _sums(policy_rejected_logps, rejected_mask)
    preference = jax.nn.relu(1 - beta * (chosen.logps - rejected.logps))
    metrics = pair_metrics(chosen, rejected, beta * chosen.logps, beta * rejected.logps)
    return _with_gold(preference, metrics, policy_gold_logps, gold_mask, nll_coef)


def triple_po_ipo_loss(
    *,
    policy_gold_logps: Array,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    gold_mask: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 0.01,
    nll_coef: float = 1.0,
) -> LossOutput:
    """TPO with IPO's square on mean log-probabilities; batch-coupled by the gold answer's NLL.

    Args:
      beta: IPO's tau; the margin per token is drawn to 1/(2 beta), above 0.
      nll_coef: the paper's alpha, weight of the gold answer's NLL per token, at least 0.
    """
    require_positive(beta=beta)
    chosen, rejected = _sums(policy_chosen_logps, chosen_mask), _sums(policy_rejected_logps, rejected_mask)
    chosen_mean, rejected_mean = chosen.mean_logps, rejected.mean_logps
    preference = jnp.square(chosen_mean - rejected_mean - 1 / (2 * beta))
    metrics = pair_metrics(chosen, rejected, beta * chosen_mean, beta * rejected_mean)
    return _with_gold(preference, metrics, policy_gold_logps, gold_mask, nll_coef)


class Triples(NamedTuple):
    """Indices of the three answers among the K of each prompt, each int32 [N]."""

    gold: Array
    chosen: Array
    rejected: Array


def make_triples(scores: Array, *, chosen_rank: int = 2) -> Triples:
    """Gold is the best answer, chosen that of the given rank, rejected the worst; ties keep the order of the list.

    A chosen and a rejected answer of equal score are no preference: leave such prompts out.

    Args:
      scores: [N, K] of each prompt's answers, finite, larger is better; K at least 3.
      chosen_rank: 2 for the second best (the paper's y2), up to K - 1.

    Raises:
      ValueError: a rank that is not between gold's and rejected's.
    """
    chex.assert_rank(scores, 2)
    count = scores.shape[1]
    if not 2 <= chosen_rank <= count - 1:
        raise ValueError(f"chosen_rank is {chosen_rank} of {count} answers; give one from 2 to {count - 1}")
    order = jnp.argsort(-scores.astype(jnp.float32), axis=-1, stable=True).astype(jnp.int32)
    return Triples(order[:, 0], order[:, chosen_rank - 1], order[:, -1])


def _sums(policy_logps: Array, mask: Array) -> CompletionSums:
    return completion_sums(policy_logps, None, mask)


def _with_gold(
    preference: Array, metrics: dict[str, Array], policy_gold_logps: Array, gold_mask: Array, nll_coef: float
) -> LossOutput:
    require_between(0.0, float("inf"), nll_coef=nll_coef)
    chex.assert_equal_shape([policy_gold_logps, gold_mask])
    nll = token_mean_nll(policy_gold_logps, gold_mask)
    gold_logps = masked_sum(policy_gold_logps, gold_mask)
    metrics = {**metrics, "preference_loss": preference, "nll": nll, "gold_logps": gold_logps}
    return LossOutput(preference + nll_coef * nll, metrics)

"""IPR and BCR: pairs found by duels in place of a scoring model; a budget for how far the chosen answer may fall.

Chen et al. 2024, arXiv 2411.05875. Evidence: abstract (the two ideas and their reasons), reconstructed (every formula
and every default). With log probabilities summed over completion tokens,

    drop = log pi_ref(y_w) - log pi(y_w),   divided by |y_w| if length_normalize
    penalty = max(0, drop - budget)
    bcr_dpo     softplus(-beta (u - v)) + penalty_coef penalty                            u, v the log ratios
    bcr_simpo   softplus(-(beta (log pi(y_w)/|y_w| - log pi(y_l)/|y_l|) - gamma)) + penalty_coef penalty

An SFT term forbids the chosen answer any fall; the budget lets it fall a little, where DPO's margin grows more easily,
and not further. Unlike DPO-Positive the hinge stands outside the sigmoid. Large coefficients make plain gradient steps
chatter around drop = budget.
Shapes: log-probabilities [B, T] in any float dtype, masks [B, T] one at completion tokens; every result [B] float32.
Reduces to: DPO or SimPO at penalty_coef = 0 or an infinite budget, and in value at the reference. No gradient of the
penalty at drop = budget itself.
Metrics: those of the base loss (`ops.pair_metrics`; no reference in SimPO's log ratios), `likelihood_drop`, `penalty`.
IPR (`iterative_pairwise_ranking`): the best of M answers by one sweep of duels, each judged in both orders.

>>> import jax.numpy as jnp
>>> pair = dict(policy_chosen_logps=jnp.array([[-3.0, -4.0]]), reference_chosen_logps=jnp.array([[-2.0, -3.0]]),
...             policy_rejected_logps=jnp.array([[-7.0, -9.0]]), reference_rejected_logps=jnp.array([[-3.0, -9.0]]),
...             chosen_mask=jnp.array([[1, 1]]), rejected_mask=jnp.array([[1, 0]]))
>>> output = bcr_dpo_loss(**pair, beta=0.5, budget=0.5, penalty_coef=0.2)  # u = -2, v = -4: log(1 + 1/e) + 0.2 * 1.5
>>> print(f"{output.loss[0]:.4f} {output.metrics['penalty'][0]:.2f}")
0.6133 1.50
>>> iterative_pairwise_ranking(lambda first, second: 0.9 if first > second else 0.1, count=4)
PairwiseRanking(champion=3, weakest=0, duels=5, inconsistent=0)
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import chex
import jax

from dpo_jax.ops import (
    CompletionSums,
    completion_sums,
    logistic_loss,
    pair_metrics,
    require_between,
    require_positive,
    safe_divide,
)
from dpo_jax.types import Array, LossOutput


def bcr_dpo_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 0.1,
    budget: float = 1.0,
    penalty_coef: float = 0.1,
    length_normalize: bool = False,
) -> LossOutput:
    """DPO with a price on the chosen answer's fall beyond a budget.

    Args:
      beta: strength of the KL constraint to the reference, above 0.
      budget: fall below the reference that costs nothing, at least 0, infinite for DPO; nats per answer, or per token
        with length_normalize.
      penalty_coef: price of each nat beyond the budget, at least 0.
      length_normalize: whether fall and budget are per token of the chosen answer.
    """
    require_positive(beta=beta)
    chosen = completion_sums(policy_chosen_logps, reference_chosen_logps, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, reference_rejected_logps, rejected_mask)
    chosen_reward, rejected_reward = beta * chosen.log_ratio, beta * rejected.log_ratio
    base = logistic_loss(beta * (chosen.log_ratio - rejected.log_ratio))
    metrics = pair_metrics(chosen, rejected, chosen_reward, rejected_reward)
    return _with_penalty(base, metrics, chosen, budget, penalty_coef, length_normalize)


def bcr_simpo_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 2.0,
    gamma: float = 1.0,
    budget: float = 0.1,
    penalty_coef: float = 0.1,
    length_normalize: bool = True,
) -> LossOutput:
    """SimPO with a price on the chosen answer's fall beyond a budget; the reference runs on chosen answers only.

    Args:
      beta: scale of the mean log-probabilities, above 0.
      gamma: target margin between the two rewards, at least 0.
      budget: fall below the reference that costs nothing, at least 0, infinite for SimPO; nats per token, or per answer
        without length_normalize.
      penalty_coef: price of each nat beyond the budget, at least 0.
      length_normalize: whether fall and budget are per token of the chosen answer.
    """
    require_positive(beta=beta)
    require_between(0.0, math.inf, gamma=gamma)
    chosen = completion_sums(policy_chosen_logps, None, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, None, rejected_mask)
    against_reference = completion_sums(policy_chosen_logps, reference_chosen_logps, chosen_mask)
    chosen_reward = beta * chosen.mean_logps
    rejected_reward = beta * rejected.mean_logps
    base = logistic_loss(chosen_reward - rejected_reward - gamma)
    metrics = pair_metrics(chosen, rejected, chosen_reward, rejected_reward)
    return _with_penalty(base, metrics, against_reference, budget, penalty_coef, length_normalize)


def likelihood_drop(
    *, policy_chosen_logps: Array, reference_chosen_logps: Array, chosen_mask: Array, length_normalize: bool = False
) -> Array:
    """How far the chosen answer has fallen below the reference, nats (per token with length_normalize), float32 [B].

    Args:
      policy_chosen_logps: [B, T] log-probability of each completion token.
      reference_chosen_logps: [B, T] the same under the reference, constants.
      chosen_mask: [B, T], one at completion tokens; the drop of an empty answer is 0.
      length_normalize: whether to divide by the number of tokens.
    """
    return _drop(completion_sums(policy_chosen_logps, reference_chosen_logps, chosen_mask), length_normalize)


def budget_penalty(*, drop: Array, budget: float) -> Array:
    """max(0, drop - budget), the shape of `drop`; its gradient is 0 up to drop = budget and 1 beyond.

    Args:
      drop: [B] from `likelihood_drop`.
      budget: fall that costs nothing, at least 0, in the units of the drop; may be infinite.

    Raises:
      ValueError: budget is negative or nan.
    """
    if not budget >= 0:
        raise ValueError(f"budget is {budget}; give a number of nats, at least 0 (infinite for no penalty)")
    return jax.nn.relu(drop - budget)


class PairwiseRanking(NamedTuple):
    """What the duels found among answers 0 .. count - 1.

    Attributes:
      champion: index of the answer to use as chosen.
      weakest: index of the answer to use as rejected.
      duels: comparisons made, 2 count - 3; each asks the judge twice.
      inconsistent: duels in which the judge named another winner after the answers had changed places; a caller may
        discard prompts where there are many.
    """

    champion: int
    weakest: int
    duels: int
    inconsistent: int


def iterative_pairwise_ranking(
    judge: Callable[[int, int], float], *, count: int, order: Sequence[int] | None = None
) -> PairwiseRanking:
    """Best and worst of `count` answers by sweeps of duels: the winner stays and meets the next (host).

    Right in any order if the judge is transitive; on a cycle the champion depends on the order. An additive bias of the
    judge towards the answer shown first cancels; ties keep the answer that was there before.

    Args:
      judge: (first shown, second shown) -> probability in [0, 1] that the first one is better.
      count: number of answers, at least 2.
      order: a permutation of range(count) in which answers meet; as numbered by default.

    Raises:
      ValueError: fewer than two answers, an order that is no permutation, or a judgement outside [0, 1].
    """
    if count < 2:
        raise ValueError(f"count is {count}; a pair needs at least 2 answers")
    order = list(range(count) if order is None else order)
    if sorted(order) != list(range(count)):
        raise ValueError(f"order is {order}; give each of 0 .. {count - 1} once")
    inconsistent = 0

    def lead(incumbent: int, challenger: int) -> float:
        """Twice the debiased probability that the incumbent is better, less one; 0 is a tie."""
        nonlocal inconsistent
        first, second = (_judgement(judge, *pair) for pair in ((incumbent, challenger), (challenger, incumbent)))
        inconsistent += (first - 0.5) * (0.5 - second) < 0
        # Not the mean of `first` and 1 - `second` against 1/2, whose rounding could break a tie.
        return first - second

    champion = order[0]
    for challenger in order[1:]:
        champion = champion if lead(champion, challenger) >= 0 else challenger
    others = [answer for answer in order if answer != champion]
    weakest = others[0]
    for challenger in others[1:]:
        weakest = weakest if lead(weakest, challenger) <= 0 else challenger
    return PairwiseRanking(champion, weakest, 2 * count - 3, inconsistent)


def _judgement(judge: Callable[[int, int], float], first: int, second: int) -> float:
    probability = float(judge(first, second))
    if not 0 <= probability <= 1:
        raise ValueError(
            f"judge({first}, {second}) is {probability}; give the probability that the first one is better"
        )
    return probability


def _drop(chosen: CompletionSums, length_normalize: bool) -> Array:
    return -safe_divide(chosen.log_ratio, chosen.length) if length_normalize else -chosen.log_ratio


def _with_penalty(
    base: Array,
    metrics: dict[str, Array],
    chosen: CompletionSums,
    budget: float,
    penalty_coef: float,
    length_normalize: bool,
) -> LossOutput:
    require_between(0.0, math.inf, penalty_coef=penalty_coef)
    chex.assert_equal_shape([base, chosen.log_ratio])
    drop = _drop(chosen, length_normalize)
    penalty = budget_penalty(drop=drop, budget=budget)
    return LossOutput(base + penalty_coef * penalty, {**metrics, "likelihood_drop": drop, "penalty": penalty})

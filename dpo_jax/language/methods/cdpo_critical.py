"""cDPO on critical tokens: the rejected answer is blamed where right reasoning would not have gone.

Lin et al. 2024, arXiv 2411.19943. Evidence: paper (loss, critical tokens), official code (scores, selection, gamma).
Not the conservative DPO of label smoothing (`cdpo_loss`). Two fine-tuned copies of the start model, one of right (P_p)
and one of wrong solutions (P_n), score each token of the rejected answer once; the scores are a column of the data:

    log s_t = log_softmax_v((1 + c) log P_p(v | s_t) - c log P_n(v | s_t))(y_t)             contrastive estimation
    phi_w = gamma S(log pi - log pi_ref)(y_w),   phi_l = gamma S((1 - s_t) (log pi - log pi_ref))(y_l)
    loss = softplus(-(phi_w - phi_l))                                        S sums over tokens, s_t is a constant

The official code compares chosen token t with rejected token t, each in a sigmoid of its own, and averages over padding
too: that is no function of the two answers, as it changes with padding and alignment, and is left out here.
Shapes: log-probabilities [B, T] in any float dtype, masks [B, T] one at completion tokens; every result [B] float32.
Reduces to: DPO with beta = gamma where s_t = 0; where s_t = 1 a rejected token gets no gradient.
Metrics: those of DPO (`ops.pair_metrics`, rewards phi) and `rejected_weight`, the mean of 1 - s_t.

>>> import jax.numpy as jnp
>>> pair = dict(policy_chosen_logps=jnp.array([[-1.0, -2.0]]), reference_chosen_logps=jnp.array([[-2.0, -3.0]]),
...             policy_rejected_logps=jnp.array([[-5.0, -9.0]]), reference_rejected_logps=jnp.array([[-3.0, -9.0]]),
...             contrastive_rejected_logps=jnp.log(jnp.array([[0.25, 1.0]])),
...             chosen_mask=jnp.array([[1, 1]]), rejected_mask=jnp.array([[1, 1]]))
>>> output = cdpo_critical_loss(**pair, gamma=0.5)  # phi = 0.5 * 2 and 0.5 * 0.75 * -2
>>> print(f"{output.loss[0]:.4f} {output.metrics['margin'][0]:.2f} {output.metrics['rejected_weight'][0]:.3f}")
0.1602 1.75 0.375
>>> critical_token_index([40, 12, 0, 9, 0, 1, 0], num_rollouts=64)
CriticalToken(index=4, strict=True)
"""

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from dpo_jax.ops import completion_sums, logistic_loss, masked_mean, pair_metrics, require_between, require_positive
from dpo_jax.types import Array, LossOutput


def cdpo_critical_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    contrastive_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    gamma: float = 0.1,
) -> LossOutput:
    """DPO in which each rejected token weighs one minus its contrastive score; the chosen side is plain.

    Args:
      contrastive_rejected_logps: [B, T] log s_t of the rejected answer, at most 0, constants.
      gamma: strength of the KL constraint to the reference, above 0: the official code's value, the paper's text has 1.
    """
    require_positive(gamma=gamma)
    # -expm1 keeps the digits of weights next to 0, where almost all tokens are.
    weights = -jnp.expm1(jnp.minimum(contrastive_rejected_logps.astype(jnp.float32), 0.0))
    weights = jax.lax.stop_gradient(weights)
    chosen = completion_sums(policy_chosen_logps, reference_chosen_logps, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, reference_rejected_logps, rejected_mask)
    weighted = completion_sums(policy_rejected_logps, reference_rejected_logps, rejected_mask, weights)
    phi_w, phi_l = gamma * chosen.log_ratio, gamma * weighted.log_ratio
    metrics = {
        **pair_metrics(chosen, rejected, phi_w, phi_l),
        "rejected_weight": masked_mean(weights, rejected_mask),
    }
    return LossOutput(logistic_loss(phi_w - phi_l), metrics)


def contrastive_token_scores(
    *, positive_logits: Array, negative_logits: Array, labels: Array, contrast: float = 1.0
) -> Array:
    """log s_t of each token, float32 [..., T], at most 0: low where right reasoning would not write the token.

    Args:
      positive_logits: [..., T, V] of the model of right solutions, position t predicts token t; -inf rules a word out.
      negative_logits: [..., T, V] of the model of wrong solutions, finite where the other is.
      labels: int [..., T] the tokens; any number at padding.
      contrast: the paper's c, at least 0; 0 leaves the positive model's log-probabilities.
    """
    require_between(0.0, math.inf, contrast=contrast)
    chex.assert_equal_shape([positive_logits, negative_logits])
    log_positive = jax.nn.log_softmax(positive_logits.astype(jnp.float32), axis=-1)
    log_negative = jax.nn.log_softmax(negative_logits.astype(jnp.float32), axis=-1)
    possible = jnp.isfinite(log_positive)
    mixed = (1 + contrast) * log_positive - contrast * jnp.where(possible, log_negative, 0.0)
    words = jnp.clip(labels, 0, positive_logits.shape[-1] - 1)
    return jnp.take_along_axis(jax.nn.log_softmax(mixed, axis=-1), words[..., None], axis=-1)[..., 0]


class CriticalToken(NamedTuple):
    """Where a solution goes wrong for good.

    Attributes:
      index: position of the token, or None if rollouts succeed everywhere.
      strict: whether rollouts stay hopeless after it; if not, it is the last position without any success.
    """

    index: int | None
    strict: bool


def critical_token_index(correct_counts: Sequence[int], *, num_rollouts: int, tolerance: float = 0.05) -> CriticalToken:
    """First token after which no rollout is right, and after whose successors nearly none is (host).

    Args:
      correct_counts: right rollouts out of num_rollouts from the prefix that ends at each token.
      num_rollouts: rollouts per prefix, 64 in the paper.
      tolerance: share of right rollouts that a later prefix must stay below, in (0, 1].

    Raises:
      ValueError: a count outside [0, num_rollouts], no rollouts, or a tolerance out of range.
    """
    require_positive(num_rollouts=num_rollouts, tolerance=tolerance)
    require_between(0.0, 1.0, tolerance=tolerance)
    found: int | None = None
    given_up: int | None = None
    for token, count in enumerate(correct_counts):
        if not 0 <= count <= num_rollouts:
            raise ValueError(f"correct_counts[{token}] is {count}; give a count in [0, {num_rollouts}]")
        if found is None and count == 0:
            found = token
        elif found is not None and count >= tolerance * num_rollouts:
            found, given_up = None, found
    return CriticalToken(given_up, False) if found is None else CriticalToken(found, True)


def pass_at_k(*, num_samples: int, num_correct: int, k: int) -> float:
    """Probability that k of the samples, drawn without replacement, hold a right one: 1 - C(n-c, k) / C(n, k) (host).

    Raises:
      ValueError: not 0 <= num_correct <= num_samples, or k outside [1, num_samples].
    """
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"num_correct is {num_correct}; give a count in [0, {num_samples}]")
    if not 1 <= k <= num_samples:
        raise ValueError(f"k is {k}; give a number of draws in [1, {num_samples}]")
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


class TrajectorySelection(NamedTuple):
    """Indices of one problem's solutions to learn from.

    Attributes:
      positive: for the positive model, none or one.
      negative: for the negative model.
      pair: (chosen, rejected) for the preference stage, or None if all solutions are right or all wrong.
    """

    positive: tuple[int, ...]
    negative: tuple[int, ...]
    pair: tuple[int, int] | None


def select_trajectories(
    answers: Sequence[Hashable], correct: Sequence[bool], *, top_p: float = 0.5
) -> TrajectorySelection:
    """Solutions of the most frequent answers of one problem, right and wrong (host).

    Wrong answers are walked by falling frequency while those taken cover less than a share top_p of the wrong
    solutions; after the first, answers that occur once are passed over. An answer is represented by its first
    solution, ties in frequency go to the answer seen first, and solutions without an answer count nowhere.

    Args:
      answers: the extracted final answer of each solution; None if there is none.
      correct: whether each is right; equal answers must be judged alike.
      top_p: share of the wrong solutions that the negative set stands for, in [0, 1].

    Raises:
      ValueError: lengths differ, an answer is judged both ways, or top_p out of range.
    """
    require_between(0.0, 1.0, top_p=top_p)
    if len(answers) != len(correct):
        raise ValueError(f"{len(answers)} answers but {len(correct)} judgements; give one for each")
    groups: dict[Hashable, list[int]] = {}
    for place, answer in enumerate(answers):
        if answer is not None:
            groups.setdefault(answer, []).append(place)
    for answer, places in groups.items():
        if len({bool(correct[place]) for place in places}) > 1:
            raise ValueError(f"answer {answer!r} is judged both right and wrong; judge equal answers alike")
    ordered = sorted(groups.values(), key=len, reverse=True)  # stable: ties stay in order of appearance
    right = [places for places in ordered if correct[places[0]]]
    wrong = [places for places in ordered if not correct[places[0]]]
    budget = math.ceil(top_p * sum(map(len, wrong)) - 1e-9)  # 0.07 * 100 is 7.000000000000001
    negative: list[int] = []
    for places in wrong:
        if budget > 0 and (not negative or len(places) > 1):
            negative.append(places[0])
            budget -= len(places)
    pair = (right[0][0], wrong[0][0]) if right and wrong else None
    return TrajectorySelection(tuple(places[0] for places in right[:1]), tuple(negative), pair)

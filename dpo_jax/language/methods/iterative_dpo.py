"""Iterative DPO: rounds of sampling from the current policy, scoring, pairing and DPO on the pairs.

Recipe of Pang et al. 2024, arXiv 2404.19733, Yuan et al. 2024, arXiv 2401.10020, and Dong et al. 2024, arXiv
2405.07863. Evidence: official SPPO code (best against worst); the rest is common practice, rebuilt. A round is

    sample n answers per prompt; score; `best_vs_worst` (or another rule); `preference_rows`;
    reference log-probabilities of the pairs once, as columns; train `dpo_loss` (`rpo_loss` with its NLL term for
    verified answers) with a fresh optimiser; evaluate, and stop when the validation score drops.

Which policy is the reference differs from paper to paper, and the result with it: with exact steps the policy after
round t is pi_0 exp(s_t r / beta), s_t = `reference_gains`:

    previous round's policy (weight 1)   s_t = t: no bound on the KL divergence from the start
    initial policy (weight 0)            s_t = 1 from the first round on
    geometric mixture of both (weight w) s_{t+1} = 1 + w s_t, up to 1 / (1 - w): `mixture_log_probs` for one
                                         distribution, `dpo_jax.tree.interpolate` for parameters

Selections: an answer that is not valid (unfinished, empty, not parsed) has no part; a prompt needs two valid ones;
among equals the first counts; a pair is kept only if its score gap is above `min_margin`, so ties never are. Scores are
first reduced by `length_penalised` where answers grow from round to round.

Shapes: scores, valid, lengths [P, n] of P prompts with n answers; results [P].

>>> import jax.numpy as jnp
>>> pairs = best_vs_worst(jnp.array([[0.1, 0.9, 0.5], [1.0, 1.0, 1.0]]), jnp.ones((2, 3)))
>>> pairs.chosen.tolist(), pairs.rejected.tolist(), pairs.keep.tolist()
([1, 0], [0, 0], [1.0, 0.0])
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.ops import masked_count, masked_mean, require_between
from dpo_jax.types import Array


class Selection(NamedTuple):
    """A pair of answers per prompt.

    Attributes:
      chosen, rejected: int32 [P], indices among the prompt's answers.
      keep: float32 [P], zero where the prompt gives no pair; the indices mean nothing there.
    """

    chosen: Array
    rejected: Array
    keep: Array


def length_penalised(scores: Array, lengths: Array, *, length_penalty: float) -> Array:
    """score - length_penalty * length, float32, of the shape of the scores.

    Args:
      scores, lengths: [..., n]; lengths in tokens.
      length_penalty: price of a token in units of score, at least 0.
    """
    require_between(0.0, math.inf, length_penalty=length_penalty)
    chex.assert_equal_shape([scores, lengths])
    return scores.astype(jnp.float32) - length_penalty * lengths.astype(jnp.float32)


def best_vs_worst(scores: Array, valid: Array, *, min_margin: float = 0.0) -> Selection:
    """The answers with the largest and the smallest score.

    With a verifier's scores in {0, 1} this keeps the prompts that have both a right and a wrong answer.

    Args:
      scores: [P, n]; those of answers that are not valid are not read.
      valid: [P, n], not zero at answers that may be taken.
      min_margin: smallest gap of scores, not enough itself; at least 0.
    """
    scores, valid = _checked(scores, valid)
    chosen = jnp.argmax(jnp.where(valid, scores, -jnp.inf), axis=-1)
    rejected = jnp.argmin(jnp.where(valid, scores, jnp.inf), axis=-1)
    return _select(scores, valid, chosen, rejected, min_margin)


def best_vs_low(scores: Array, valid: Array, *, deviations: float = 2.0, min_margin: float = 0.0) -> Selection:
    """The best answer against the one closest to mean - deviations * standard deviation of the prompt's scores.

    The worst of many samples is often broken text; a merely bad one teaches more (population deviation, the best answer
    takes no part in the search).

    Args:
      scores: [P, n]; those of answers that are not valid are not read.
      valid: [P, n], not zero at answers that may be taken.
      deviations: distance below the mean in standard deviations.
      min_margin: smallest gap of scores, not enough itself; at least 0.
    """
    scores, valid = _checked(scores, valid)
    chosen = jnp.argmax(jnp.where(valid, scores, -jnp.inf), axis=-1)
    mean = masked_mean(scores, valid)[:, None]
    target = mean - deviations * jnp.sqrt(masked_mean(jnp.square(scores - mean), valid))[:, None]
    others = valid & (jnp.arange(scores.shape[-1]) != chosen[:, None])
    rejected = jnp.argmin(jnp.where(others, jnp.abs(scores - target), jnp.inf), axis=-1)
    return _select(scores, valid, chosen, rejected, min_margin)


def first_pair(scores: Array, valid: Array, *, min_margin: float = 0.0) -> Selection:
    """The first two valid answers, the better one chosen: an unbiased pair of samples.

    Args:
      scores: [P, n]; those of answers that are not valid are not read.
      valid: [P, n], not zero at answers that may be taken.
      min_margin: smallest gap of scores, not enough itself; at least 0.
    """
    _, valid = _checked(scores, valid)
    first_two = valid & (jnp.cumsum(valid, axis=-1) <= 2)
    return best_vs_worst(scores, first_two, min_margin=min_margin)


def preference_rows(samples: Sequence[Mapping[str, Any]], selection: Selection, *, round: int) -> list[dict[str, Any]]:
    """Pairs of texts for the next round of training, without prompts that give none or whose two texts agree. Host.

    Args:
      samples: P mappings with `prompt` and `completions` (n texts), and `scores` (n numbers).
      selection: indices into the completions, [P].
      round: number of the round, kept as a column.

    Returns:
      rows with the keys prompt, chosen, rejected, chosen_score, rejected_score and round.

    Raises:
      ValueError: another number of samples than of selections, or a sample without the same number of scores and texts.
    """
    if len(samples) != len(selection.keep):
        raise ValueError(f"{len(samples)} samples and a selection for {len(selection.keep)}; give one each")
    rows = []
    indices = zip(*(np.asarray(field) for field in selection))
    for number, (sample, (chosen, rejected, keep)) in enumerate(zip(samples, indices)):
        texts, scores = sample["completions"], sample["scores"]
        if len(texts) != len(scores):
            raise ValueError(f"sample {number} has {len(texts)} completions and {len(scores)} scores; give one each")
        if keep and texts[chosen] != texts[rejected]:
            pair = {"chosen": texts[chosen], "rejected": texts[rejected]}
            gap = {"chosen_score": float(scores[chosen]), "rejected_score": float(scores[rejected])}
            rows.append({"prompt": sample["prompt"], **pair, **gap, "round": round})
    return rows


def mixture_log_probs(initial_logps: Array, policy_logps: Array, *, weight: float) -> Array:
    """The reference pi_0^(1 - w) pi_t^w / Z over all outcomes, float32 [..., Y].

    Args:
      initial_logps, policy_logps: [..., Y] log-probabilities or logits.
      weight: w in [0, 1]; 0 is the initial policy, 1 the previous round's.
    """
    require_between(0.0, 1.0, weight=weight)
    chex.assert_equal_shape([initial_logps, policy_logps])
    initial, policy = (jax.nn.log_softmax(logps.astype(jnp.float32)) for logps in (initial_logps, policy_logps))
    # Either end by itself: 0 * -inf is nan for outcomes that have no probability.
    if weight in (0.0, 1.0):
        return policy if weight else initial
    return jax.nn.log_softmax((1 - weight) * initial + weight * policy)


def reference_gains(rounds: int, *, weight: float) -> np.ndarray:
    """s_t for t = 0 ... rounds, float64 [rounds + 1]: exact steps lead to pi_0 exp(s_t r / beta) after round t.

    s_{t+1} = 1 + w s_t: t at w = 1, 1 at w = 0. Host.

    Args:
      rounds: number of rounds, at least 0.
      weight: w in [0, 1], share of the previous round's policy in the reference (geometric mixture).
    """
    require_between(0.0, 1.0, weight=weight)
    if rounds < 0:
        raise ValueError(f"rounds is {rounds}; give a number of at least 0")
    return np.concatenate([[0.0], np.cumsum(np.float64(weight) ** np.arange(rounds))])


def _checked(scores: Array, valid: Array) -> tuple[Array, Array]:
    chex.assert_equal_shape([scores, valid])
    chex.assert_rank(scores, 2)
    valid = valid != 0
    return jnp.where(valid, scores.astype(jnp.float32), 0.0), valid


def _select(scores: Array, valid: Array, chosen: Array, rejected: Array, min_margin: float) -> Selection:
    require_between(0.0, math.inf, min_margin=min_margin)
    best, low = (jnp.take_along_axis(scores, index[:, None], axis=-1)[:, 0] for index in (chosen, rejected))
    keep = (masked_count(valid) >= 2) & (best - low > min_margin)
    return Selection(chosen.astype(jnp.int32), rejected.astype(jnp.int32), keep.astype(jnp.float32))

"""Listwise preference losses: Plackett-Luce DPO and the LiPO family, learning to rank on implicit rewards.

Plackett-Luce DPO: Rafailov et al. 2023, arXiv 2305.18290, appendix A.3. LiPO: Liu et al. 2024, arXiv 2402.01878.
Evidence: the papers' text; no training code is released. With s_i = beta S(log pi(y_i) - log pi_ref(y_i)), S the sum
over completion tokens, and psi_i the score of item i,

    plackett_luce   sum_k (logsumexp_{j >= k} s_(j) - s_(k)),      (k) the k-th best item by psi
    pair_logistic   sum_{psi_i > psi_j} softplus(-(s_i - s_j))
    pair_hinge      sum_{psi_i > psi_j} max(0, 1 - (s_i - s_j))
    lambda          sum_{psi_i > psi_j} D_ij softplus(-(s_i - s_j)),
                    D_ij = |2^psi_i - 2^psi_j| |1/ln(1 + rank_i) - 1/ln(1 + rank_j)|, ranks by s, a constant
    list_softmax    - sum_i psi_i / sum(psi) log softmax(s)_i
    point_mse       sum_i (psi_i - s_i)^2
    point_sigmoid   - sum_i (psi_i log sigma(s_i) + (1 - psi_i) log sigma(-s_i))

A list's loss is a sum over its items or pairs. Tied scores: Plackett-Luce keeps the order of the list, pairs drop them.
Shapes: log-probabilities and mask [B, K, T] in any float dtype, scores [B, K]; every result [B] float32. An item is
there if its mask has a token. Reference arrays, masks, scores, ranks and weights are constants.
Reduces to, at K = 2: DPO for plackett_luce and pair_logistic, for lambda times |2^psi_1 - 2^psi_2| (1/ln 2 - 1/ln 3).
Metrics: NDCG (gain 2^psi - 1, discount ln(1 + rank)), Kendall's tau, top-1 accuracy and the best item's reward and gap.

>>> import jax.numpy as jnp
>>> ratios = jnp.log(jnp.array([[[3.0], [2.0], [1.0]]]))  # [1, 3, 1]: pi / pi_ref is 3, 2 and 1
>>> lists = dict(policy_logps=ratios - 2, reference_logps=jnp.full((1, 3, 1), -2.0), mask=jnp.ones((1, 3, 1)),
...              scores=jnp.array([[1.0, 0.5, 0.0]]))
>>> output = plackett_luce_loss(**lists, beta=1.0)  # 3/6 * 2/3 * 1/1 = 1/3
>>> print(f"{output.loss[0]:.4f} {output.metrics['kendall_tau'][0]:.1f}")
1.0986 1.0
>>> print(f"{pair_logistic_loss(**lists, beta=1.0).loss[0]:.4f}")  # log(5/3 * 4/3 * 3/2)
1.2040
"""

import chex
import jax
import jax.numpy as jnp

from dpo_jax.ops import (
    completion_sums,
    lambda_weights,
    logistic_loss,
    masked_mean,
    masked_sum,
    plackett_luce_nll,
    ranks,
    require_positive,
    safe_divide,
    strict_pairs,
)
from dpo_jax.types import Array, LossOutput


def plackett_luce_loss(
    *, policy_logps: Array, reference_logps: Array, mask: Array, scores: Array, beta: float = 0.05
) -> LossOutput:
    """DPO on full rankings (arXiv 2305.18290; the list MLE of LiPO): likelihood of the order of the scores.

    Args:
      beta: strength of the KL constraint to the reference, above 0.
    """
    s, labels, there = _rank_inputs(policy_logps, reference_logps, mask, scores, beta)
    return LossOutput(plackett_luce_nll(s, labels, there), list_metrics(s, labels, there))


def pair_logistic_loss(
    *, policy_logps: Array, reference_logps: Array, mask: Array, scores: Array, beta: float = 0.05
) -> LossOutput:
    """DPO summed over all pairs of a list with different scores (LiPO's pair-logistic).

    Args:
      beta: strength of the KL constraint to the reference, above 0.
    """
    s, labels, there = _rank_inputs(policy_logps, reference_logps, mask, scores, beta)
    loss = _sum_pairs(strict_pairs(labels, there) * logistic_loss(_differences(s)))
    return LossOutput(loss, list_metrics(s, labels, there))


def pair_hinge_loss(
    *, policy_logps: Array, reference_logps: Array, mask: Array, scores: Array, beta: float = 0.05
) -> LossOutput:
    """Hinge (SLiC) summed over all pairs of a list with different scores (LiPO's pair-hinge).

    Args:
      beta: scale of the log-ratio margins, which stop counting at 1/beta; above 0.
    """
    s, labels, there = _rank_inputs(policy_logps, reference_logps, mask, scores, beta)
    loss = _sum_pairs(strict_pairs(labels, there) * jax.nn.relu(1 - _differences(s)))
    return LossOutput(loss, list_metrics(s, labels, there))


def lambda_loss(
    *, policy_logps: Array, reference_logps: Array, mask: Array, scores: Array, beta: float = 0.05
) -> LossOutput:
    """LiPO-lambda: each pair counts by how much exchanging its places would cost in DCG.

    Args:
      beta: strength of the KL constraint to the reference, above 0.
    """
    s, labels, there = _rank_inputs(policy_logps, reference_logps, mask, scores, beta)
    weights = strict_pairs(labels, there) * lambda_weights(labels, s, there)
    return LossOutput(_sum_pairs(weights * logistic_loss(_differences(s))), list_metrics(s, labels, there))


def list_softmax_loss(
    *, policy_logps: Array, reference_logps: Array, mask: Array, scores: Array, beta: float = 0.05
) -> LossOutput:
    """Cross-entropy of softmax(s) to the scores divided by their sum (LiPO's softmax); scores at least 0.

    A negative score counts as 0; a list without a positive one has loss 0.

    Args:
      beta: strength of the KL constraint to the reference, above 0.
    """
    s, labels, there = _rank_inputs(policy_logps, reference_logps, mask, scores, beta)
    gains = jax.nn.relu(labels)  # with a negative sum the loss would teach the reverse
    shares = safe_divide(gains, masked_sum(gains, there)[:, None])  # [B, K]
    logits = jnp.where(there != 0, s, jnp.finfo(jnp.float32).min)
    loss = -masked_sum(shares * jnp.where(there != 0, jax.nn.log_softmax(logits, axis=-1), 0.0), there)
    return LossOutput(loss, list_metrics(s, labels, there))


def point_mse_loss(
    *, policy_logps: Array, reference_logps: Array, mask: Array, scores: Array, beta: float = 0.05
) -> LossOutput:
    """Squared distance of each implicit reward to its score, summed over the list (LiPO's pointwise MSE).

    Args:
      beta: implicit reward per nat of log ratio, above 0.
    """
    s, labels, there = _rank_inputs(policy_logps, reference_logps, mask, scores, beta)
    return LossOutput(masked_sum(jnp.square(labels - s), there), list_metrics(s, labels, there))


def point_sigmoid_loss(
    *, policy_logps: Array, reference_logps: Array, mask: Array, scores: Array, beta: float = 0.05
) -> LossOutput:
    """Cross-entropy of sigma(s) to each score, summed over the list (LiPO's pointwise sigmoid); scores in [0, 1].

    Args:
      beta: strength of the KL constraint to the reference, above 0.
    """
    s, labels, there = _rank_inputs(policy_logps, reference_logps, mask, scores, beta)
    loss = masked_sum(labels * logistic_loss(s) + (1 - labels) * logistic_loss(-s), there)
    return LossOutput(loss, list_metrics(s, labels, there))


# Rewards, labels, metrics


def implicit_rewards(policy_logps: Array, reference_logps: Array, mask: Array, *, beta: float) -> Array:
    """beta log pi(y|x) / pi_ref(y|x), float32 [..., K]; 0 for absent items.

    Args:
      policy_logps, reference_logps: [..., K, T]; no gradient flows into the reference.
      mask: [..., K, T], one at completion tokens.
      beta: reward per nat, above 0.
    """
    require_positive(beta=beta)
    return beta * completion_sums(policy_logps, reference_logps, mask).log_ratio


def labels_from_win_matrix(win_probs: Array, there: Array) -> Array:
    """Score of each item: the mean probability that it beats an item of its list (LiPO), float32 [..., K].

    The own entry counts 1/2 whatever the diagonal holds; absent items get 0. Ranks give the matrix of 0 and 1.

    Args:
      win_probs: [..., K, K], entry [k, i] the probability that item k is better than item i.
      there: [..., K], zero at absent items.
    """
    chex.assert_equal_shape_prefix([win_probs, there], there.ndim)
    own = jnp.eye(win_probs.shape[-1], dtype=bool)
    wins = jnp.where(own, 0.5, win_probs.astype(jnp.float32))
    beaten = jnp.broadcast_to((there != 0)[..., None, :], wins.shape)
    return jnp.where(there != 0, masked_mean(wins, beaten), 0.0)


def ndcg(rewards: Array, scores: Array, there: Array) -> Array:
    """Normalised discounted cumulative gain of the order of the rewards, float32 [...]; 0 where no item has gain.

    Gain 2^score - 1 for scores at least 0, discount ln(1 + rank); the base of the logarithm cancels.

    Args:
      rewards, scores: [..., K].
      there: [..., K], zero at absent items.
    """
    gain = jnp.exp2(_constant(scores)) - 1

    def cumulative(by: Array) -> Array:
        return masked_sum(gain / jnp.log1p(ranks(by, there)), there)

    return safe_divide(cumulative(rewards), cumulative(scores))


def kendall_tau(rewards: Array, scores: Array, there: Array) -> Array:
    """(concordant - discordant) / pairs, over pairs of different scores, float32 [...]; 0 where there are none.

    Args:
      rewards, scores: [..., K]; equal rewards count 0.
      there: [..., K], zero at absent items.
    """
    pairs = strict_pairs(scores, there)
    return safe_divide(_sum_pairs(pairs * jnp.sign(_differences(_constant(rewards)))), _sum_pairs(pairs))


def top1_accuracy(rewards: Array, scores: Array, there: Array) -> Array:
    """One where the item of the largest reward has the largest score, float32 [...]; 0 for an empty list.

    Args:
      rewards, scores: [..., K]; of equal rewards the first counts.
      there: [..., K], zero at absent items.
    """
    scores = jnp.where(there != 0, _constant(scores), -jnp.inf)
    picked = jnp.take_along_axis(scores, jnp.argmin(ranks(rewards, there), axis=-1)[..., None], axis=-1)[..., 0]
    return ((picked == jnp.max(scores, axis=-1)) & (there != 0).any(-1)).astype(jnp.float32)


def list_metrics(rewards: Array, scores: Array, there: Array) -> dict[str, Array]:
    """The metrics that every loss over lists reports, each float32 [...].

    Args:
      rewards: [..., K] implicit rewards, 0 at absent items.
      scores: [..., K].
      there: [..., K], zero at absent items.
    """
    best = jnp.argmin(ranks(scores, there), axis=-1)[..., None]
    best_reward = jnp.take_along_axis(rewards, best, axis=-1)[..., 0]
    return {
        "best_reward": best_reward,
        "margin": best_reward - masked_mean(rewards, there),
        "ndcg": ndcg(rewards, scores, there),
        "kendall_tau": kendall_tau(rewards, scores, there),
        "top1_accuracy": top1_accuracy(rewards, scores, there),
    }


def _rank_inputs(
    policy_logps: Array, reference_logps: Array, mask: Array, scores: Array, beta: float
) -> tuple[Array, Array, Array]:
    """Implicit rewards, scores as constants and which items are there, each float32 [B, K], zero at absent items."""
    rewards = implicit_rewards(policy_logps, reference_logps, mask, beta=beta)
    chex.assert_equal_shape([rewards, scores])
    there = (mask != 0).any(-1)
    return rewards, jnp.where(there, _constant(scores), 0.0), there.astype(jnp.float32)


def _constant(values: Array) -> Array:
    return jax.lax.stop_gradient(values.astype(jnp.float32))


def _differences(values: Array) -> Array:
    """s_i - s_j, [..., K] -> [..., K, K]."""
    return values[..., :, None] - values[..., None, :]


def _sum_pairs(values: Array) -> Array:
    return jnp.sum(values, axis=(-2, -1))

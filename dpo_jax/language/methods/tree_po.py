"""TPO: preference trees, ranked as lists, with each step of a pair weighted by how alike the two steps are.

Liao, Chu and Wang 2024, arXiv 2410.12854. Evidence: LiPO's text for the ranking part, official code for the weights
1 + cos, mean-pooled hidden states, the merging of late steps and the data; the formula that joins them is
reconstructed. The released loss is not followed: it grows when the order gets better. With r_{n,t} the log ratio of
token t of response n, v_n its score, and steps merged from the shortest response's last one on,

    rho_{n,k} = sum_{t in step k of n} r_{n,t},      s_n = beta sum_k rho_{n,k}
    W_{ij,k}  = 1 + cos(e_{i,k}, e_{j,k}), and 0 where either step is empty;  e_{n,k} the mean hidden state of a step
    RM_{ij}   = beta sum_k W_{ij,k} (rho_{i,k} - rho_{j,k})
    tree_po   = sum_{v_i > v_j} D_ij softplus(-RM_{ij}),   D_ij = |2^v_i - 2^v_j| |1/ln(1 + rank_i) - 1/ln(1 + rank_j)|
    tree_po_plain   the same with W = 1: needs no hidden states

Shapes: log-probabilities, mask and step_ids [B, K, T], scores [B, K] in [0, 1], the column step_similarity [B, K, K, S]
the cosines, S the largest number of steps; every result [B] float32. An item is there if its mask has a token. Tokens
with step id -1 count for nothing. Reference arrays, masks, scores, similarities, ranks and weights are constants.
Reduces to: LiPO's lambda loss without the weights; DPO times |2^v_1 - 2^v_2| (1/ln 2 - 1/ln 3) at K = 2; the plain loss
at 2 beta if all steps are alike. What two responses share cancels, whatever its weight.
Metrics: the best item's reward and its margin over the mean, share of pairs in the right order, of merged tokens.

>>> import jax.numpy as jnp
>>> lists = dict(policy_logps=jnp.array([[[-1.0, -1.0], [-1.0, -3.0]]]), reference_logps=jnp.full((1, 2, 2), -2.0),
...              mask=jnp.ones((1, 2, 2)), step_ids=jnp.array([[[0, 1], [0, 1]]]), scores=jnp.array([[1.0, 0.0]]))
>>> alike = jnp.ones((1, 2, 2, 2)).at[..., 1].set(0.5)  # the first step is shared, the second one resembles
>>> print(f"{tree_po_loss(**lists, step_similarity=alike).loss[0]:.4f}")  # RM = 0.5 * 1.5 * 2, D = 0.5325
0.1072
>>> print(f"{tree_po_plain_loss(**lists).loss[0]:.4f}")  # RM = 0.5 * 2
0.1668
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.ops import (
    cosine_similarity,
    lambda_weights,
    logistic_loss,
    masked_mean,
    masked_sum,
    ranks,
    require_positive,
    safe_divide,
    strict_pairs,
)
from dpo_jax.types import Array, LossOutput


def tree_po_loss(
    *,
    policy_logps: Array,
    reference_logps: Array,
    mask: Array,
    step_ids: Array,
    scores: Array,
    step_similarity: Array,
    beta: float = 0.5,
) -> LossOutput:
    """Lambda loss on the branches of a tree, each step of a pair weighted by 1 + the cosine of the two steps.

    Args:
      beta: strength of the KL constraint to the reference, above 0.
    """
    require_positive(beta=beta)
    num_steps = step_similarity.shape[-1]
    chex.assert_shape(step_similarity, (*scores.shape, scores.shape[-1], num_steps))
    aligned = align_steps(step_ids, mask, num_steps=num_steps)
    rho = step_sums(_log_ratios(policy_logps, reference_logps, mask), aligned, num_steps=num_steps)  # [B, K, S]
    sizes = step_sums(jnp.ones(mask.shape, jnp.float32), aligned, num_steps=num_steps)
    pair_rewards = step_pair_rewards(rho, step_similarity_weights(step_similarity, sizes), beta=beta)
    merged, inside = (aligned != step_ids) & (aligned >= 0), aligned >= 0
    merged_share = safe_divide(jnp.sum(merged, axis=(1, 2)), jnp.sum(inside, axis=(1, 2))).astype(jnp.float32)
    return _lambda_output(beta * jnp.sum(rho, axis=-1), pair_rewards, scores, mask, {"merged_share": merged_share})


def tree_po_plain_loss(
    *, policy_logps: Array, reference_logps: Array, mask: Array, step_ids: Array, scores: Array, beta: float = 0.5
) -> LossOutput:
    """`tree_po_loss` without the adaptive weights: LiPO's lambda loss over the tokens of all steps.

    Args:
      beta: strength of the KL constraint to the reference, above 0.
    """
    require_positive(beta=beta)
    inside = mask * (step_ids >= 0)
    rewards = beta * masked_sum(_log_ratios(policy_logps, reference_logps, mask), inside)  # [B, K]
    return _lambda_output(rewards, rewards[:, :, None] - rewards[:, None, :], scores, mask, {})


# Steps


def align_steps(step_ids: Array, mask: Array, *, num_steps: int) -> Array:
    """Step ids that all responses of a list have: later steps merge into the last common one, int32 [..., K, T].

    That is the last step of the response with the fewest, and at most num_steps - 1. Behind the mask ids are -1.

    Args:
      step_ids: int [..., K, T] step of each token from 0, -1 outside.
      mask: [..., K, T], one at completion tokens; responses without a step are left out of the minimum.
      num_steps: most steps to keep, at least 1.
    """
    require_positive(num_steps=num_steps)
    step_ids = jnp.where(mask != 0, step_ids, -1).astype(jnp.int32)
    count = jnp.max(step_ids, axis=-1) + 1  # [..., K]
    fewest = jnp.min(jnp.where(count > 0, count, num_steps), axis=-1)[..., None, None]
    return jnp.minimum(step_ids, jnp.minimum(fewest, num_steps) - 1)


def step_sums(values: Array, step_ids: Array, *, num_steps: int) -> Array:
    """Sum of the values over each step's tokens, float32 [..., S]; values outside of all steps are not read.

    Args:
      values: [..., T].
      step_ids: int [..., T], -1 outside.
      num_steps: S; tokens of later steps are left out.
    """
    values = jnp.where(step_ids >= 0, values.astype(jnp.float32), 0.0)
    steps = jnp.expand_dims(jnp.arange(num_steps), tuple(range(step_ids.ndim)))
    # A sum of selected values, not a product with one-hot rows: that would run in low precision on some devices.
    return jnp.sum(jnp.where(step_ids[..., None] == steps, values[..., None], 0.0), axis=-2)  # [..., T, S] -> [..., S]


def step_means(values: Array, step_ids: Array, *, num_steps: int) -> Array:
    """Mean of vectors over each step's tokens, float32 [..., S, H]; zero for an empty step.

    Args:
      values: [..., T, H], such as last-layer hidden states.
      step_ids: int [..., T], -1 outside.
      num_steps: S.
    """
    values = jnp.where((step_ids >= 0)[..., None], values.astype(jnp.float32), 0.0)
    member = jax.nn.one_hot(step_ids, num_steps, dtype=jnp.float32)  # [..., T, S]
    totals = jnp.einsum("...ts,...th->...sh", member, values, precision=jax.lax.Precision.HIGHEST)
    return safe_divide(totals, jnp.sum(member, axis=-2)[..., None])


def step_similarity(hidden: Array, step_ids: Array, *, num_steps: int) -> Array:
    """Cosine of the mean hidden states of step k of responses i and j, float32 [..., K, K, S]: the loss's column.

    Args:
      hidden: [..., K, T, H] hidden states at completion tokens; those of the frozen reference keep the column fixed.
      step_ids: int [..., K, T] from `align_steps`, with the same num_steps.
      num_steps: S.
    """
    means = step_means(hidden, step_ids, num_steps=num_steps)  # [..., K, S, H]
    return cosine_similarity(means[..., :, None, :, :], means[..., None, :, :, :])


def step_similarity_weights(similarity: Array, step_sizes: Array) -> Array:
    """W = 1 + cosine in [0, 2], and 0 where either step has no token, float32 [..., K, K, S]; a constant.

    Args:
      similarity: [..., K, K, S] cosines; what stands at empty steps is not read.
      step_sizes: [..., K, S] number of tokens.
    """
    there = step_sizes > 0
    both = there[..., :, None, :] & there[..., None, :, :]
    return jax.lax.stop_gradient(jnp.where(both, 1 + similarity.astype(jnp.float32), 0.0))


def step_pair_rewards(step_log_ratios: Array, weights: Array, *, beta: float) -> Array:
    """RM_ij = beta sum_k W_ijk (rho_ik - rho_jk), float32 [..., K, K]; antisymmetric if the weights are symmetric.

    Args:
      step_log_ratios: [..., K, S].
      weights: [..., K, K, S].
      beta: reward per nat, above 0.
    """
    gaps = step_log_ratios[..., :, None, :] - step_log_ratios[..., None, :, :]
    return beta * jnp.sum(weights * gaps, axis=-1)


# Host: trees and judges


class TreeResponses(NamedTuple):
    """The responses of a tree, one for each leaf from left to right.

    Attributes:
      completions: token ids.
      step_ids: step of each token, from 0.
      scores: of the leaves.
    """

    completions: list[list[int]]
    step_ids: list[list[int]]
    scores: list[float]


def split_tree(branches: Sequence[Mapping[str, Any]]) -> TreeResponses:
    """Root-to-leaf paths of a tree of steps; host.

    Args:
      branches: what may follow the prompt, each `{"tokens": ids of one step, "children": [such nodes]}`, a leaf with
        `"score"` in place of the children.

    Raises:
      ValueError: a node without tokens, with children and a score, or with neither; says where.
    """
    found = TreeResponses([], [], [])

    def walk(node: Mapping[str, Any], tokens: list[int], step_ids: list[int], path: str) -> None:
        children, own = node.get("children", ()), list(node.get("tokens", ()))
        if not own:
            raise ValueError(f"node {path} has no tokens; a step needs at least one")
        if bool(children) == ("score" in node):
            raise ValueError(f"node {path} should have either children or a score, it has the keys {sorted(node)}")
        depth = path.count(".")
        tokens, step_ids = [*tokens, *own], [*step_ids, *[depth] * len(own)]
        for number, child in enumerate(children):
            walk(child, tokens, step_ids, f"{path}.{number}")
        if not children:
            found.completions.append(tokens)
            found.step_ids.append(step_ids)
            found.scores.append(float(node["score"]))

    for number, branch in enumerate(branches):
        walk(branch, [], [], str(number))
    return found


def unit_scores(scores: Sequence[float], *, low: float = -100.0, high: float = 100.0) -> np.ndarray:
    """A judge's scores on [low, high] as float32 on [0, 1], which the gains 2^v expect; host. The scaling is ours.

    Args:
      scores: K numbers; those outside of the range are clipped.
      low, high: ends of the judge's scale.

    Raises:
      ValueError: low is not below high.
    """
    if not low < high:
        raise ValueError(f"low is {low} and high is {high}; give a scale whose low end is below its high end")
    return np.clip((np.asarray(scores, np.float32) - low) / (high - low), 0.0, 1.0)


def _log_ratios(policy_logps: Array, reference_logps: Array, mask: Array) -> Array:
    """log pi - log pi_ref per token, float32 [B, K, T]; 0 behind the mask, constant in the reference."""
    chex.assert_equal_shape([policy_logps, reference_logps, mask])
    reference = jax.lax.stop_gradient(reference_logps.astype(jnp.float32))
    return jnp.where(mask != 0, policy_logps.astype(jnp.float32) - reference, 0.0)


def _lambda_output(
    rewards: Array, pair_rewards: Array, scores: Array, mask: Array, metrics: dict[str, Array]
) -> LossOutput:
    """sum_{v_i > v_j} D_ij softplus(-RM_ij) from rewards [B, K], by which items rank, and RM [B, K, K]."""
    chex.assert_equal_shape([rewards, scores])
    there = (mask != 0).any(-1).astype(jnp.float32)
    pairs = strict_pairs(scores, there)
    loss = jnp.sum(pairs * lambda_weights(scores, rewards, there) * logistic_loss(pair_rewards), axis=(-2, -1))
    best = jnp.take_along_axis(rewards, jnp.argmin(ranks(scores, there), axis=-1)[:, None], axis=-1)[:, 0]
    ordered = pairs * (rewards[:, :, None] > rewards[:, None, :])
    return LossOutput(
        loss,
        {
            "best_reward": best,
            "margin": best - masked_mean(rewards, there),
            "pair_accuracy": safe_divide(jnp.sum(ordered, axis=(-2, -1)), jnp.sum(pairs, axis=(-2, -1))),
            **metrics,
        },
    )

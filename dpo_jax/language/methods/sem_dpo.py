"""Sem-DPO: DPO on rewritten prompts, each pair weighted by how far the winning rewrite strays from the user's meaning.

Mohamed et al. 2025, arXiv 2507.20133. Evidence: the weight from the abstract and public descriptions; alpha, beta and
training settings are reconstructed. With e a frozen text embedding, x the user's prompt, y_w the winning rewrite,

    d = 1 - cos(e(x), e(y_w)) in [0, 2],   W = exp(-alpha d)
    loss = -W log sigma(beta ((S_w - S_w^ref) - (S_l - S_l^ref)))

d is made once and kept as a column; the losing rewrite's embedding plays no part. The sum of the weights is not
normalised. The share of all weight on pairs with d >= r is at most exp(-alpha r) / mean(W).
Shapes: log-probabilities and masks [B, T], distances and results [B] float32. Reference, masks, distances: constants.
Reduces to: DPO at alpha = 0 and at d = 0; W log 2 at the reference.

>>> import jax.numpy as jnp
>>> pair = dict(policy_chosen_logps=jnp.array([[-1.0, -2.0]]), reference_chosen_logps=jnp.array([[-2.0, -3.0]]),
...             policy_rejected_logps=jnp.array([[-4.0, -9.0]]), reference_rejected_logps=jnp.array([[-3.0, -9.0]]),
...             chosen_mask=jnp.array([[1, 1]]), rejected_mask=jnp.array([[1, 0]]))
>>> distance = semantic_distance(jnp.array([[3.0, 0.0]]), jnp.array([[0.0, 0.2]]))
>>> output = sem_dpo_loss(**pair, semantic_distance=distance, beta=0.5)  # d = 1, x = 1.5
>>> print(f"{output.metrics['pair_weight'][0]:.4f} {output.loss[0]:.4f}")
0.3679 0.0741
"""

import chex
import jax
import jax.numpy as jnp

from dpo_jax.ops import (
    completion_sums,
    cosine_similarity,
    logistic_loss,
    pair_metrics,
    require_between,
    require_positive,
)
from dpo_jax.types import Array, LossOutput


def semantic_distance(prompt_embedding: Array, chosen_embedding: Array) -> Array:
    """Cosine distance d = 1 - cos of two embeddings, float32 [...] in [0, 2]; 1 if one of them is zero.

    Args:
      prompt_embedding: [..., D] of the user's prompt, any float dtype (computed in float32).
      chosen_embedding: [..., D] of the winning rewrite.
    """
    chex.assert_equal_shape([prompt_embedding, chosen_embedding])
    return jnp.clip(1 - cosine_similarity(prompt_embedding, chosen_embedding), 0.0, 2.0)


def semantic_weights(distance: Array, *, alpha: float = 1.0) -> Array:
    """Weights W = exp(-alpha d) of pairs, float32 [...] in [exp(-2 alpha), 1]; constants.

    Args:
      distance: [...] cosine distances in [0, 2].
      alpha: how much a far rewrite loses, at least 0. Distances of CLIP text embeddings stay below 0.4 or so: 5 to 10
        is then needed to matter.
    """
    require_between(0.0, float("inf"), alpha=alpha)
    return jnp.exp(-alpha * jax.lax.stop_gradient(distance.astype(jnp.float32)))


def sem_dpo_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    semantic_distance: Array,
    beta: float = 0.1,
    alpha: float = 1.0,
) -> LossOutput:
    """DPO times exp(-alpha d) of the column `semantic_distance` [B]; metrics add `pair_weight`, `semantic_distance`.

    Args:
      beta: strength of the KL constraint to the reference, above 0.
      alpha: how much a winning rewrite loses by its distance from the prompt, at least 0; 0 is DPO.
    """
    require_positive(beta=beta)
    chosen = completion_sums(policy_chosen_logps, reference_chosen_logps, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, reference_rejected_logps, rejected_mask)
    chex.assert_equal_shape([chosen.logps, semantic_distance])
    weight = semantic_weights(semantic_distance, alpha=alpha)
    loss = weight * logistic_loss(beta * (chosen.log_ratio - rejected.log_ratio))
    metrics = pair_metrics(chosen, rejected, beta * chosen.log_ratio, beta * rejected.log_ratio)
    distance = jax.lax.stop_gradient(semantic_distance.astype(jnp.float32))
    return LossOutput(loss, {**metrics, "pair_weight": weight, "semantic_distance": distance})

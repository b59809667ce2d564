"""Lists of K scored answers: InfoNCA, NCA and EXO from explicit rewards.

InfoNCA and NCA: Chen et al. 2024, arXiv 2402.05369; EXO: Ji et al. 2024, arXiv 2402.00856. Evidence: official code.
With u_k the log-ratio of answer k summed over its tokens, s_k = beta u_k, p = softmax(s) and the target
q = softmax(scores / reward_temperature), both over the K answers that are there,

    infonca      -sum_k q_k log p_k                                     cross-entropy to the target
    nca          sum_k q_k softplus(-s_k) + 1/K sum_k softplus(s_k)     each answer against noise, absolute
    exo_reward   sum_k p_k (log p_k - log q_k) = KL(p || q)             reverse KL: seeks a mode

Shapes: log-probabilities and mask [B, K, T], scores [B, K]; every result [B] float32. An absent answer has an all-zero
mask and counts nowhere, its score is not read; a row with no answer has loss 0. Reference, scores and masks are
constants. Options out of their range raise ValueError.
Reduces to: at K = 2 and a small reward_temperature (q one-hot) infonca is dpo and nca is nca_pair.
Metrics: `accuracy` of the pairs with unequal scores that the rewards order alike, `best_reward` (mean reward of the
answers with the highest score), `mean_reward`, `best_log_ratio`, `mean_log_ratio`.

>>> import jax.numpy as jnp
>>> lists = dict(policy_logps=jnp.array([[[-1.0, -2.0], [-4.0, -9.0]]]), mask=jnp.array([[[1, 1], [1, 0]]]),
...              reference_logps=jnp.array([[[-2.0, -3.0], [-3.0, -9.0]]]), scores=jnp.array([[9.0, 3.0]]))
>>> print(f"{infonca_loss(**lists, beta=0.5, reward_temperature=0.01).loss[0]:.4f}")  # s = 1, -0.5: softplus(-1.5)
0.2014
"""

import jax
import jax.numpy as jnp

from dpo_jax.ops import completion_sums, logistic_loss, masked_mean, require_positive, strict_pairs
from dpo_jax.types import Array, LossOutput


def infonca_loss(
    *,
    policy_logps: Array,
    reference_logps: Array,
    mask: Array,
    scores: Array,
    beta: float = 0.01,
    reward_temperature: float = 1.0,
) -> LossOutput:
    """InfoNCA (arXiv 2402.05369): cross-entropy from the target of the scores to the policy's choice among K answers.

    Args:
      beta: scale of the log-ratios, above 0.
      reward_temperature: scores are divided by it before the softmax, above 0; the scale of the scores is the data's.
    """
    log_ratio, s, there = _rewards(policy_logps, reference_logps, mask, beta)
    q = jnp.exp(_target(scores, there, reward_temperature)) * there
    return LossOutput(-jnp.sum(q * _log_softmax(s, there), axis=-1), _metrics(log_ratio, s, scores, there))


def nca_loss(
    *,
    policy_logps: Array,
    reference_logps: Array,
    mask: Array,
    scores: Array,
    beta: float = 0.01,
    reward_temperature: float = 1.0,
) -> LossOutput:
    """NCA (arXiv 2402.05369): K answers told from noise one by one, so likelihoods do not sink together.

    Args:
      beta: scale of the log-ratios, above 0.
      reward_temperature: scores are divided by it before the softmax, above 0; the scale of the scores is the data's.
    """
    log_ratio, s, there = _rewards(policy_logps, reference_logps, mask, beta)
    q = jnp.exp(_target(scores, there, reward_temperature)) * there
    loss = jnp.sum(q * logistic_loss(s), axis=-1) + masked_mean(logistic_loss(-s), there)
    return LossOutput(loss, _metrics(log_ratio, s, scores, there))


def exo_reward_loss(
    *,
    policy_logps: Array,
    reference_logps: Array,
    mask: Array,
    scores: Array,
    beta: float = 0.5,
    reward_temperature: float = 0.5,
) -> LossOutput:
    """EXO from rewards (arXiv 2402.00856): reverse KL from the policy's choice among K answers to the scores' target.

    Args:
      beta: the paper's beta_pi, scale of the log-ratios, above 0.
      reward_temperature: the paper's beta_r, scores are divided by it before the softmax, above 0.
    """
    log_ratio, s, there = _rewards(policy_logps, reference_logps, mask, beta)
    log_p = _log_softmax(s, there)
    loss = jnp.sum(jnp.exp(log_p) * there * (log_p - _target(scores, there, reward_temperature)), axis=-1)
    return LossOutput(loss, _metrics(log_ratio, s, scores, there))


def _rewards(policy_logps: Array, reference_logps: Array, mask: Array, beta: float) -> tuple[Array, Array, Array]:
    """Log-ratios, implicit rewards s = beta u and which answers are there, each [B, K]."""
    require_positive(beta=beta)
    log_ratio = completion_sums(policy_logps, reference_logps, mask).log_ratio  # [B, K, T] -> [B, K]
    return log_ratio, beta * log_ratio, (mask != 0).any(-1).astype(jnp.float32)


def _target(scores: Array, there: Array, reward_temperature: float) -> Array:
    """log q [B, K], a constant."""
    require_positive(reward_temperature=reward_temperature)
    return jax.lax.stop_gradient(_log_softmax(scores.astype(jnp.float32) / reward_temperature, there))


def _log_softmax(values: Array, there: Array) -> Array:
    """log softmax over the answers that are there [B, K]; 0 at absent ones."""
    low = jnp.finfo(jnp.float32).min
    return jnp.where(there != 0, jax.nn.log_softmax(jnp.where(there != 0, values, low), axis=-1), 0.0)


def _metrics(log_ratio: Array, rewards: Array, scores: Array, there: Array) -> dict[str, Array]:
    pairs = strict_pairs(scores, there)
    ordered = (rewards[:, :, None] > rewards[:, None, :]).astype(jnp.float32)
    best = there * (jnp.sum(pairs, axis=-2) == 0)  # nothing is above it
    return {
        "accuracy": masked_mean(ordered.reshape(len(ordered), -1), pairs.reshape(len(pairs), -1)),
        "best_reward": masked_mean(rewards, best),
        "mean_reward": masked_mean(rewards, there),
        "best_log_ratio": masked_mean(log_ratio, best),
        "mean_log_ratio": masked_mean(log_ratio, there),
    }

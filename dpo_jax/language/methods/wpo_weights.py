"""WPO: each pair counts as much as the policy itself would write it, so that stored pairs act like fresh ones.

Zhou et al. 2024, arXiv 2406.11827. Evidence: official code (sampled alignment, loss), reconstructed (greedy alignment).
With S the sum over completion tokens and a_t a constant of the policy's own distribution at position t,

    a_t = log sum_v pi(v | s_t)^2   (sampled alignment: the collision statistic)   or   max_v log pi(v | s_t)   (greedy)
    l(y) = S(log pi(y_t) - a_t) / |y|
    w = min(1, exp(l(y_w) + l(y_l)))                                             no gradient flows through it
    loss = w softplus(-beta (u - v)),   u = S(log pi(y_w) - log pi_ref(y_w)),  v likewise for y_l

Shapes: log-probabilities and statistics [B, T] in any float dtype, masks [B, T] one at completion tokens; every result
[B] float32. The weights are those of the policy at this step and are not normalised: long answers that the policy would
not write make them small, and with them the learning rate; watch the metric `pair_weight`.
Reduces to: DPO under a uniform policy, and wherever the cap binds (argmax text under sampled alignment).
The weight multiplies any other loss over pairs as well: `sequence_log_weight`, then `pair_weight`.
Metrics: those of DPO (`ops.pair_metrics`) and `pair_weight`.

>>> import jax.numpy as jnp
>>> half = jnp.log(jnp.array([[0.5]]))
>>> output = wpo_loss(policy_chosen_logps=half, policy_rejected_logps=half, reference_chosen_logps=half,
...                   reference_rejected_logps=half, policy_chosen_collision=half, policy_rejected_collision=half / 2,
...                   chosen_mask=jnp.ones((1, 1)), rejected_mask=jnp.ones((1, 1)))
>>> print(f"{output.metrics['pair_weight'][0]**2:.4f} {output.loss[0]**2 / jnp.log(2.0)**2:.4f}")  # w = 0.5 / 0.5^(1/2)
0.5000 0.5000
"""

import chex
import jax
import jax.numpy as jnp

from dpo_jax.ops import completion_sums, logistic_loss, masked_mean, pair_metrics, require_positive
from dpo_jax.types import Array, LossOutput


def wpo_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    policy_chosen_collision: Array,
    policy_rejected_collision: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 0.01,
) -> LossOutput:
    """DPO times the pair's weight under the current policy, with sampled alignment.

    Args:
      policy_chosen_collision: [B, T] log sum_v pi(v | s_t)^2, a constant.
      policy_rejected_collision: [B, T] the same at the rejected answer's positions.
      beta: strength of the KL constraint to the reference, above 0.
    """
    require_positive(beta=beta)
    chosen = completion_sums(policy_chosen_logps, reference_chosen_logps, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, reference_rejected_logps, rejected_mask)
    weight = pair_weight(
        chosen_log_weight=sequence_log_weight(
            policy_logps=policy_chosen_logps, alignment=policy_chosen_collision, mask=chosen_mask
        ),
        rejected_log_weight=sequence_log_weight(
            policy_logps=policy_rejected_logps, alignment=policy_rejected_collision, mask=rejected_mask
        ),
    )
    chosen_reward, rejected_reward = beta * chosen.log_ratio, beta * rejected.log_ratio
    loss = weight * logistic_loss(beta * (chosen.log_ratio - rejected.log_ratio))
    metrics = pair_metrics(chosen, rejected, chosen_reward, rejected_reward)
    return LossOutput(loss, {**metrics, "pair_weight": weight})


def sequence_log_weight(*, policy_logps: Array, alignment: Array, mask: Array) -> Array:
    """l(y) in nats per token: mean over tokens of log pi(y_t) - a_t, float32 [...]; 0 for an empty completion.

    Args:
      policy_logps: [..., T] log-probability of each completion token.
      alignment: [..., T] what the log-probability is compared with: the collision statistic, `sampled_alignment`,
        `greedy_alignment`, or zeros for none.
      mask: [..., T], one at completion tokens (the prompt's tokens would only dilute the mean).
    """
    chex.assert_equal_shape([policy_logps, alignment, mask])
    return masked_mean(policy_logps.astype(jnp.float32) - alignment.astype(jnp.float32), mask)


def pair_weight(*, chosen_log_weight: Array, rejected_log_weight: Array) -> Array:
    """w = min(1, exp(l(y_w) + l(y_l))), float32 of the same shape, a constant for the gradient."""
    chex.assert_equal_shape([chosen_log_weight, rejected_log_weight])
    # The weight imitates sampling from the policy; the paper lets no gradient through it.
    return jax.lax.stop_gradient(jnp.exp(jnp.minimum(chosen_log_weight + rejected_log_weight, 0.0)))


def sampled_alignment(*, policy_logits: Array) -> Array:
    """a_t = log sum_v pi(v)^2 of logits [..., V], float32 [...]: what `policy_chosen_collision` and the like hold.

    exp(log pi(y_t) - a_t) has expectation 1 over y_t drawn from pi.
    """
    # The sum of squared probabilities itself would underflow.
    return jax.nn.logsumexp(2 * jax.nn.log_softmax(policy_logits.astype(jnp.float32), axis=-1), axis=-1)


def greedy_alignment(*, policy_logits: Array) -> Array:
    """a_t = max_v log pi(v) of logits [..., V], float32 [...]: log weights are at most 0, and 0 for argmax text.

    Never below `sampled_alignment`, since sum_v pi(v)^2 <= max_v pi(v).
    """
    return jnp.max(jax.nn.log_softmax(policy_logits.astype(jnp.float32), axis=-1), axis=-1)

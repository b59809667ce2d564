"""TDPO: DPO in the token-level decision process, where the divergence from the reference is counted at every prefix.

Zeng et al. 2024, arXiv 2404.11999. Evidence: official code (both losses, logged rewards), paper (derivation, settings).
With S the sum over completion tokens, the log ratio and the sequential forward KL of a completion are

    M(y) = S(log pi(y_t) - log pi_ref(y_t)),   K(y) = S(KL_t) >= 0,   KL_t = KL(pi_ref(. | s_t) || pi(. | s_t))

    tdpo1   softplus(-beta (M(y_w) - M(y_l) - (K(y_l) - K(y_w))))
    tdpo2   softplus(-beta (M(y_w) - M(y_l) - alpha (K(y_l) - stop_gradient(K(y_w)))))

The direction is reference first, the opposite of RLHF's penalty. M + K sums the log ratios of the answer's tokens after
centring them under the reference at each prefix; beta (M + K) is the reward that both losses report.
Shapes: log-probabilities and divergences [B, T] in any float dtype, masks [B, T] one at completion tokens; every result
[B] float32. The divergences carry the policy's gradient; `token_kl` makes them from logits.
Reduces to: DPO at alpha = 0 (tdpo2); tdpo2 at alpha = 1 has the value of tdpo1, but no KL gradient on the chosen side.
Metrics: those of DPO (`ops.pair_metrics`) with rewards beta (M + K), and `chosen_kl`, `rejected_kl`, the sums K, nats.
The official settings leave tdpo2 switched off unless overridden; its notes advise tdpo2 for large learning rates.

>>> import jax.numpy as jnp
>>> pair = dict(policy_chosen_logps=jnp.array([[-1.0, -2.0]]), reference_chosen_logps=jnp.array([[-2.0, -3.0]]),
...             policy_rejected_logps=jnp.array([[-4.0, -9.0]]), reference_rejected_logps=jnp.array([[-3.0, -9.0]]),
...             chosen_kl=jnp.array([[0.25, 0.75]]), rejected_kl=jnp.array([[2.0, 0.0]]),
...             chosen_mask=jnp.array([[1, 1]]), rejected_mask=jnp.array([[1, 0]]))
>>> output = tdpo1_loss(**pair, beta=1.0)  # M = 2 and -1, K = 1 and 2: log(1 + e^-2)
>>> print(f"{output.loss[0]:.4f} {output.metrics['margin'][0]:.2f} {tdpo2_loss(**pair, beta=0.5).loss[0]:.4f}")
0.1269 2.00 0.2519
"""

import jax

from dpo_jax.ops import (
    completion_sums,
    kl_divergence,
    logistic_loss,
    masked_sum,
    pair_metrics,
    require_between,
    require_positive,
)
from dpo_jax.types import Array, LossOutput


def tdpo1_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    chosen_kl: Array,
    rejected_kl: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 0.1,
) -> LossOutput:
    """TDPO1: the whole difference of sequential KLs counts, and both sides carry its gradient.

    Args:
      chosen_kl: [B, T] KL(pi_ref || pi) in nats at the chosen answer's positions, with the policy's gradient.
      rejected_kl: [B, T] the same at the rejected answer's positions.
      beta: strength of the KL constraint to the reference, above 0.
    """
    require_positive(beta=beta)
    chosen = completion_sums(policy_chosen_logps, reference_chosen_logps, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, reference_rejected_logps, rejected_mask)
    k_chosen, k_rejected = masked_sum(chosen_kl, chosen_mask), masked_sum(rejected_kl, rejected_mask)
    z = chosen.log_ratio - rejected.log_ratio - (k_rejected - k_chosen)
    rewards = beta * (chosen.log_ratio + k_chosen), beta * (rejected.log_ratio + k_rejected)
    metrics = {**pair_metrics(chosen, rejected, *rewards), "chosen_kl": k_chosen, "rejected_kl": k_rejected}
    return LossOutput(logistic_loss(beta * z), metrics)


def tdpo2_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    chosen_kl: Array,
    rejected_kl: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 0.1,
    alpha: float = 0.5,
) -> LossOutput:
    """TDPO2: a share alpha of the difference of sequential KLs counts, without gradient on the chosen side.

    Args:
      chosen_kl: [B, T] KL(pi_ref || pi) in nats at the chosen answer's positions, taken as a constant.
      rejected_kl: [B, T] the same at the rejected answer's positions, with the policy's gradient.
      beta: strength of the KL constraint to the reference, above 0.
      alpha: weight of the difference of sequential KLs, at least 0; 0 is DPO.
    """
    require_positive(beta=beta)
    require_between(0.0, float("inf"), alpha=alpha)
    chosen = completion_sums(policy_chosen_logps, reference_chosen_logps, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, reference_rejected_logps, rejected_mask)
    # The paper stops this gradient: it would push the policy away from the reference at the chosen answer's prefixes.
    k_chosen = jax.lax.stop_gradient(masked_sum(chosen_kl, chosen_mask))
    k_rejected = masked_sum(rejected_kl, rejected_mask)
    z = chosen.log_ratio - rejected.log_ratio - alpha * (k_rejected - k_chosen)
    rewards = beta * (chosen.log_ratio + k_chosen), beta * (rejected.log_ratio + k_rejected)
    metrics = {**pair_metrics(chosen, rejected, *rewards), "chosen_kl": k_chosen, "rejected_kl": k_rejected}
    return LossOutput(logistic_loss(beta * z), metrics)


def token_kl(*, policy_logits: Array, reference_logits: Array) -> Array:
    """KL(pi_ref || pi) in nats at each position, float32 [...], with gradient to the policy only.

    It holds both distributions whole: for small vocabularies and checks; training asks for the statistic by name.

    Args:
      policy_logits: [..., V], any float dtype; a constant added to all of a position changes nothing.
      reference_logits: [..., V], constants; -inf for words that the reference rules out, which then count nothing.
    """
    return kl_divergence(jax.lax.stop_gradient(reference_logits), policy_logits)


def sequential_kl(*, policy_logits: Array, reference_logits: Array, mask: Array) -> Array:
    """K(y), the sum of `token_kl` over a completion's tokens, float32 [B].

    Args:
      policy_logits: [B, T, V], position t predicts token t.
      reference_logits: [B, T, V], constants.
      mask: [B, T], one at completion tokens.
    """
    return masked_sum(token_kl(policy_logits=policy_logits, reference_logits=reference_logits), mask)

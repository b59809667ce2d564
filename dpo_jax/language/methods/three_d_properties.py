"""3D-Properties: why DPO can lose the chosen answer too, how to watch it, and Flex-DPO against it.

Yan et al. 2024, arXiv 2406.07327. Evidence: paper and public reviews (gradients, separate betas, SFT term),
reconstructed (normalisation of the SFT term). With u, v the log ratios of chosen and rejected answer to the reference,

    z = beta_plus u - beta_minus v,                      beta_minus <= beta_plus
    flex_dpo   softplus(-z) - sft_coef log pi(y_w) / |y_w|

The three D's of DPO (beta_plus = beta_minus = beta), by its gradients in probability space, r = e^-z:

    dL/dpi_w = -beta r / (1 + r) / pi_w,   dL/dpi_l = beta r / (1 + r) / pi_l,   their ratio is -pi_w / pi_l
    drastic drop of pi_l; degradation: as pi_l -> 0 (beta < 1) the first vanishes and the second grows without bound;
    dispersion: what leaves pi_l goes to whatever shares no features with it, often to answers that nobody has seen

By logits the ratio of the two gradients is only -beta_minus / beta_plus: with separate tables per answer DPO never
lowers the chosen one, with shared features it does. Static betas; the best beta_minus reported is just below beta_plus.
Shapes: log-probabilities [B, T] in any float dtype, masks [B, T] one at completion tokens; every result [B] float32.
Reduces to: DPO at beta_minus = beta_plus and sft_coef = 0; no gradient reaches the rejected side at beta_minus = 0.
Metrics: those of DPO (`ops.pair_metrics`, rewards beta_plus u and beta_minus v), `coefficient` sigma(-z) and `nll`.

>>> import jax.numpy as jnp
>>> pair = dict(policy_chosen_logps=jnp.array([[-1.0, -2.0]]), reference_chosen_logps=jnp.array([[-2.0, -3.0]]),
...             policy_rejected_logps=jnp.array([[-4.0, -9.0]]), reference_rejected_logps=jnp.array([[-3.0, -9.0]]),
...             chosen_mask=jnp.array([[1, 1]]), rejected_mask=jnp.array([[1, 0]]))
>>> output = flex_dpo_loss(**pair, beta_plus=0.5, beta_minus=0.25, sft_coef=0.1)  # u = 2, v = -1, nll = 1.5
>>> print(f"{output.loss[0]:.4f} {output.metrics['margin'][0]:.2f} {output.metrics['coefficient'][0]:.4f}")
0.4019 1.25 0.2227
"""

import jax
import jax.numpy as jnp

from dpo_jax.ops import (
    completion_sums,
    logistic_loss,
    masked_mean,
    pair_metrics,
    present,
    require_between,
    require_positive,
)
from dpo_jax.types import Array, LossOutput


def flex_dpo_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta_plus: float = 0.1,
    beta_minus: float = 0.08,
    sft_coef: float = 0.0,
) -> LossOutput:
    """Flex-DPO: a weaker hand on the rejected answer than on the chosen one, and an SFT term if asked for.

    Args:
      beta_plus: scale of the chosen answer's log ratio, above 0.
      beta_minus: scale of the rejected answer's log ratio, at least 0; the paper keeps it at or below beta_plus.
      sft_coef: weight of the mean NLL over the chosen answer's own tokens, at least 0.
    """
    require_positive(beta_plus=beta_plus)
    require_between(0.0, float("inf"), beta_minus=beta_minus, sft_coef=sft_coef)
    chosen = completion_sums(policy_chosen_logps, reference_chosen_logps, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, reference_rejected_logps, rejected_mask)
    chosen_reward, rejected_reward = beta_plus * chosen.log_ratio, beta_minus * rejected.log_ratio
    z = chosen_reward - rejected_reward
    nll = -chosen.mean_logps
    metrics = {
        **pair_metrics(chosen, rejected, chosen_reward, rejected_reward),
        "coefficient": jax.nn.sigmoid(-z),
        "nll": nll,
    }
    return LossOutput(logistic_loss(z) + sft_coef * nll, metrics)


def dpo_dynamics(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 0.1,
) -> dict[str, Array]:
    """How hard DPO pulls at each side of a pair (corollaries 1 and 2), as logarithms that hold for long answers too.

    Args:
      policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps: [B, T].
      chosen_mask, rejected_mask: [B, T], one at completion tokens.
      beta: strength of the KL constraint of the DPO run, above 0.

    Returns:
      Float32 [B] each: `coefficient` sigma(-z) (both logit gradients are +-beta times it), `chosen_log_ratio` and
      `rejected_log_ratio`, `chosen_log_gradient` log |dL/dpi_w|, `rejected_log_gradient` log |dL/dpi_l|, and
      `log_gradient_ratio`, the second less the first, which is log pi_w - log pi_l whatever beta is.
    """
    require_positive(beta=beta)
    chosen = completion_sums(policy_chosen_logps, reference_chosen_logps, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, reference_rejected_logps, rejected_mask)
    # r / (1 + r) is sigma(-z): r itself leaves float32 for long answers.
    z = beta * (chosen.log_ratio - rejected.log_ratio)
    log_pull = jnp.log(jnp.float32(beta)) + jax.nn.log_sigmoid(-z)
    return {
        "coefficient": jax.nn.sigmoid(-z),
        "chosen_log_ratio": chosen.log_ratio,
        "rejected_log_ratio": rejected.log_ratio,
        "chosen_log_gradient": log_pull - chosen.logps,
        "rejected_log_gradient": log_pull - rejected.logps,
        "log_gradient_ratio": chosen.logps - rejected.logps,
    }


def unseen_drift(*, policy_logps: Array, reference_logps: Array, mask: Array) -> Array:
    """Mean log ratio to the reference of held-out answers to each prompt, nats, float32 [B]: dispersion if it rises.

    Args:
      policy_logps, reference_logps: [B, K, T] log-probabilities of K answers that are in no pair.
      mask: [B, K, T], one at completion tokens; absent answers have none. 0 for a prompt without any.
    """
    log_ratio = completion_sums(policy_logps, reference_logps, mask).log_ratio  # [B, K, T] -> [B, K]
    there = present(mask.reshape(-1, mask.shape[-1])).reshape(log_ratio.shape)
    return masked_mean(log_ratio, there)

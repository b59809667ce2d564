"""GPO: offline preference losses as convex links of one margin.

Tang et al. 2024, arXiv 2402.05749. Evidence: the paper's formulas. With u, v the log-ratios of the chosen and the
rejected answer summed over tokens and x = beta (u - v), the links are

    gpo_exponential    e^-x
    gpo_squared_hinge  max(0, 1 - x)^2
    gpo_savage         sigma(-x)^2                bounded by 1, not convex: badly wrong pairs are given up
    gpo_squared        (1 - x)^2

Its logistic link is `dpo.dpo_loss` and its hinge `dpo.hinge_loss`.
Shapes: log-probabilities [B, T] in any float dtype, masks [B, T] one at completion tokens; every result [B] float32.
Reference arrays and masks are constants; a beta out of its range raises ValueError.
Reduces to: gpo_squared with beta is beta^2 ipo_sum with beta/2; gpo_squared_hinge is hinge^2.
Metrics: those of `ops.pair_metrics`, rewards beta u and beta v.

>>> import jax.numpy as jnp
>>> pair = dict(policy_chosen_logps=jnp.array([[-1.0, -2.0]]), reference_chosen_logps=jnp.array([[-2.0, -3.0]]),
...             policy_rejected_logps=jnp.array([[-4.0, -9.0]]), reference_rejected_logps=jnp.array([[-3.0, -9.0]]),
...             chosen_mask=jnp.array([[1, 1]]), rejected_mask=jnp.array([[1, 0]]))
>>> print(f"{gpo_squared_loss(**pair, beta=0.5).loss[0]:.2f} {gpo_squared_hinge_loss(**pair, beta=0.5).loss[0]:.2f}")
0.25 0.00
"""

import jax
import jax.numpy as jnp

from dpo_jax.ops import MAX_EXPONENT, completion_sums, pair_metrics, require_positive
from dpo_jax.types import Array, LossOutput


def gpo_exponential_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 0.1,
) -> LossOutput:
    """GPO with the exponential link (arXiv 2402.05749, table 1): wrong pairs weigh exponentially more.

    Exponents stop at 80 (no gradient beyond); the metric `clipped` is 1 where they did.

    Args:
      beta: scale of the log-ratio margin, above 0.
    """
    require_positive(beta=beta)
    chosen = completion_sums(policy_chosen_logps, reference_chosen_logps, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, reference_rejected_logps, rejected_mask)
    x = beta * (chosen.log_ratio - rejected.log_ratio)
    metrics = pair_metrics(chosen, rejected, beta * chosen.log_ratio, beta * rejected.log_ratio)
    clipped = (-x > MAX_EXPONENT).astype(jnp.float32)
    return LossOutput(jnp.exp(jnp.minimum(-x, MAX_EXPONENT)), {**metrics, "clipped": clipped})


def gpo_squared_hinge_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 0.1,
) -> LossOutput:
    """GPO with the squared hinge, or truncated quadratic, link (arXiv 2402.05749, table 1).

    Args:
      beta: scale of the log-ratio margin, above 0.
    """
    require_positive(beta=beta)
    chosen = completion_sums(policy_chosen_logps, reference_chosen_logps, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, reference_rejected_logps, rejected_mask)
    x = beta * (chosen.log_ratio - rejected.log_ratio)
    metrics = pair_metrics(chosen, rejected, beta * chosen.log_ratio, beta * rejected.log_ratio)
    return LossOutput(jnp.square(jax.nn.relu(1 - x)), metrics)


def gpo_savage_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 0.1,
) -> LossOutput:
    """GPO with the Savage link (arXiv 2402.05749, table 1): at most 1, flat for badly wrong pairs.

    Args:
      beta: scale of the log-ratio margin, above 0.
    """
    require_positive(beta=beta)
    chosen = completion_sums(policy_chosen_logps, reference_chosen_logps, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, reference_rejected_logps, rejected_mask)
    x = beta * (chosen.log_ratio - rejected.log_ratio)
    metrics = pair_metrics(chosen, rejected, beta * chosen.log_ratio, beta * rejected.log_ratio)
    return LossOutput(jnp.square(jax.nn.sigmoid(-x)), metrics)


def gpo_squared_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    reference_chosen_logps: Array,
    reference_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 0.1,
) -> LossOutput:
    """GPO with the squared link, which is IPO up to scale (arXiv 2402.05749, table 1).

    Args:
      beta: scale of the log-ratio margin, above 0.
    """
    require_positive(beta=beta)
    chosen = completion_sums(policy_chosen_logps, reference_chosen_logps, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, reference_rejected_logps, rejected_mask)
    x = beta * (chosen.log_ratio - rejected.log_ratio)
    metrics = pair_metrics(chosen, rejected, beta * chosen.log_ratio, beta * rejected.log_ratio)
    return LossOutput(jnp.square(1 - x), metrics)

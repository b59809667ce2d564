"""SimPO, AlphaPO, SimPER: the mean log-probability as reward, without a reference model.

Meng et al. 2024, arXiv 2405.14734 (simpo). Gupta et al. 2025, arXiv 2501.03884 (alphapo). Xiao et al. 2025, arXiv
2502.00883 (simper). Evidence: official code (simpo, simper); another library and a restatement (alphapo).
With m the mean log-probability over completion tokens,

    simpo        softplus(-(beta (m_w - m_l) - gamma))
    simpo_hinge  max(0, 1 - (beta (m_w - m_l) - gamma))
    alphapo      softplus(-(beta (R(m_w) - R(m_l)) - gamma)),   R(m) = (1 - exp(-alpha m)) / alpha
    simper       exp(m_l) - exp(m_w)

Shapes: log-probabilities [B, T] in any float dtype, masks [B, T] one at completion tokens, EOS among them; every result
[B] float32. gamma stands inside the sigmoid; the official option gamma_beta_ratio is gamma / beta.
Doubling every token changes none of them. alphapo tends to simpo as alpha -> 0; dR/dm = exp(-alpha m) gives unlikely
answers more gradient for alpha > 0 and less for alpha < 0. simper lies in (-1, 1) and leaves unlikely answers alone.
No term holds the policy at its start: watch the KL, and keep learning rates near 5e-7.

    Published (beta, gamma, learning rate): Mistral-Base 2, 1.6, 3e-7; Mistral-Instruct 2.5, 0.25, 5e-7;
    Llama-3-Base 2, 1, 6e-7; Llama-3-Instruct 2.5, 1.375, 1e-6 (v0.2: 10, 3, 1e-6); Gemma-2-9B-it 10, 5, 8e-7.

Metrics: `ops.pair_metrics` with rewards beta m, beta R(m) or exp(m), and `order_agreement`: one where reward and
summed log-probability put the two answers in the same order.

>>> import jax.numpy as jnp
>>> pair = dict(policy_chosen_logps=jnp.array([[-1.0, -2.0]]), chosen_mask=jnp.array([[1, 1]]),
...             policy_rejected_logps=jnp.array([[-2.5, -9.0]]), rejected_mask=jnp.array([[1, 0]]))
>>> output = simpo_loss(**pair, beta=2.0, gamma=0.5)  # m = -1.5, -2.5: 2 * 1 - 0.5 = 1.5
>>> print(f"{output.loss[0]:.4f} {output.metrics['margin'][0]:.2f}")
0.2014 2.00
>>> print(f"{simper_loss(**pair).loss[0]:.4f}")  # e^-2.5 - e^-1.5
-0.1410
"""

import math

import jax
import jax.numpy as jnp

from dpo_jax.ops import (
    MAX_EXPONENT,
    CompletionSums,
    completion_sums,
    logistic_loss,
    pair_metrics,
    require_between,
    require_positive,
    smoothed_logistic_loss,
)
from dpo_jax.types import Array, LossOutput


def simpo_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 2.0,
    gamma: float = 1.0,
    label_smoothing: float = 0.0,
) -> LossOutput:
    """Simple preference optimisation (arXiv 2405.14734).

    Args:
      beta: scale of the mean log-probability, above 0.
      gamma: margin that the reward gap shall exceed, at least 0; beta times the official gamma_beta_ratio.
      label_smoothing: probability that a label is flipped, in [0, 1/2] (official code only).
    """
    _check_options(beta, gamma)
    require_between(0.0, 0.5, label_smoothing=label_smoothing)
    chosen = completion_sums(policy_chosen_logps, None, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, None, rejected_mask)
    loss = smoothed_logistic_loss(beta * (chosen.mean_logps - rejected.mean_logps) - gamma, label_smoothing)
    return LossOutput(loss, _metrics(chosen, rejected, beta * chosen.mean_logps, beta * rejected.mean_logps))


def simpo_hinge_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 2.0,
    gamma: float = 1.0,
) -> LossOutput:
    """SimPO with a hinge in place of the logistic loss (official code only).

    Args:
      beta: scale of the mean log-probability, above 0.
      gamma: margin, at least 0; the reward gap stops counting at 1 + gamma.
    """
    _check_options(beta, gamma)
    chosen = completion_sums(policy_chosen_logps, None, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, None, rejected_mask)
    loss = jax.nn.relu(1 - (beta * (chosen.mean_logps - rejected.mean_logps) - gamma))
    return LossOutput(loss, _metrics(chosen, rejected, beta * chosen.mean_logps, beta * rejected.mean_logps))


def alphapo_loss(
    *,
    policy_chosen_logps: Array,
    policy_rejected_logps: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    beta: float = 2.5,
    gamma: float = 0.1,
    alpha: float = 0.25,
) -> LossOutput:
    """AlphaPO (arXiv 2501.03884): SimPO whose reward is bent, to control how far likelihoods are displaced.

    Exponents -alpha m stop at 80 (no gradient beyond); the metric `clipped` is the fraction of the pair's two that did.

    Args:
      beta: scale of the reward, above 0.
      gamma: margin that the reward gap shall exceed, at least 0.
      alpha: bend of the reward, of either sign; its limit 0 is `simpo_loss`.
    """
    _check_options(beta, gamma)
    if alpha == 0 or not math.isfinite(alpha):
        raise ValueError(f"alpha is {alpha}; give a finite number other than 0: simpo_loss is the limit 0")
    chosen = completion_sums(policy_chosen_logps, None, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, None, rejected_mask)

    def reward(mean: Array) -> tuple[Array, Array]:
        exponent = -alpha * mean
        # expm1 keeps the digits of m that exp(-alpha m) loses next to 1.
        value = -jnp.expm1(jnp.minimum(exponent, MAX_EXPONENT)) / alpha
        return beta * value, (exponent > MAX_EXPONENT).astype(jnp.float32)

    chosen_reward, chosen_clipped = reward(chosen.mean_logps)
    rejected_reward, rejected_clipped = reward(rejected.mean_logps)
    metrics = _metrics(chosen, rejected, chosen_reward, rejected_reward)
    metrics |= {"clipped": (chosen_clipped + rejected_clipped) / 2}
    return LossOutput(logistic_loss(chosen_reward - rejected_reward - gamma), metrics)


def simper_loss(
    *, policy_chosen_logps: Array, policy_rejected_logps: Array, chosen_mask: Array, rejected_mask: Array
) -> LossOutput:
    """SimPER (arXiv 2502.00883): inverse perplexity of the rejected answer less that of the chosen one, no options."""
    chosen = completion_sums(policy_chosen_logps, None, chosen_mask)
    rejected = completion_sums(policy_rejected_logps, None, rejected_mask)
    chosen_reward, rejected_reward = jnp.exp(chosen.mean_logps), jnp.exp(rejected.mean_logps)
    return LossOutput(rejected_reward - chosen_reward, _metrics(chosen, rejected, chosen_reward, rejected_reward))


def _check_options(beta: float, gamma: float) -> None:
    require_positive(beta=beta)
    require_between(0.0, float("inf"), gamma=gamma)


def _metrics(
    chosen: CompletionSums, rejected: CompletionSums, chosen_reward: Array, rejected_reward: Array
) -> dict[str, Array]:
    agree = jnp.sign(chosen_reward - rejected_reward) == jnp.sign(chosen.logps - rejected.logps)
    metrics = pair_metrics(chosen, rejected, chosen_reward, rejected_reward)
    return {**metrics, "order_agreement": agree.astype(jnp.float32)}

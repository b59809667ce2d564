"""SPO: at every step a small pool of next states from one state, and a preference model that knows the noise level.

Liang et al. 2024, "Aesthetic Post-Training Diffusion Models from Generic Preferences with Step-by-step Preference
Optimization", arXiv 2406.04314 (CVPR 2025). Evidence: confirmed from the official code. With x_w and x_l the best and
the worst of K next states of x_t, log-probabilities divided by the number of elements, and eps the ratio's clip,

    d_k  = clip( log p_theta(x_k | x_t) - log p_ref(x_k | x_t),  log(1 - eps), log(1 + eps) ),   k = w, l
    spo  = -log sigmoid( beta (d_w - d_l) )

    spm  = KL( l || softmax(s_0, s_1) ),   s = exp(scale) cos(image, text),   l = (1, 0), (0, 1) or (0.5, 0.5) for a tie

Unclipped, the gradient in the predicted mean is -(1 - sigmoid(z)) beta (x_w - x_l) / (std^2 elements): from loser to
winner, wherever the mean is. `spo_rollout` makes the pairs, which count if tanh((s_w - s_l) / 2) > threshold, and goes
on from a random candidate; `pools.pair_rows` makes rows of them, of weight 0 where a pair does not count.
Reduces to: D3PO with preference 1 on trajectories one step long that start in one state.

>>> import jax.numpy as jnp
>>> step = jnp.zeros((1, 1))
>>> out = spo_loss(policy_chosen_step_logps=step + 0.05, policy_rejected_step_logps=step - 0.05,
...                reference_chosen_step_logps=step, reference_rejected_step_logps=step)
>>> round(float(out.loss[0]), 4), round(float(out.metrics["margin"][0]), 4)
(0.3133, 1.0)
>>> preference_divergence(jnp.array([[2.0, 2.0]]), jnp.array([[0.5, 0.5]]))
Array([0.], dtype=float32)
"""

import chex
import jax
import jax.numpy as jnp

from dpo_jax.diffusion.ops import clipped_log_ratio, gain_metrics
from dpo_jax.diffusion.pools import Follow, PoolSample, Score, follow_random, pool_rollout
from dpo_jax.diffusion.types import Parameterisation, Predict, Step
from dpo_jax.ops import cosine_similarity, logistic_loss, require_positive
from dpo_jax.types import Array, LossOutput, PyTree


def spo_loss(
    *,
    policy_chosen_step_logps: Array,
    policy_rejected_step_logps: Array,
    reference_chosen_step_logps: Array,
    reference_rejected_step_logps: Array,
    beta: float = 10.0,
    ratio_clip: float = 0.1,
) -> LossOutput:
    """The loss of SPO, a mean over the steps of a row (rows of `pools.pair_rows` have one).

    Args:
      policy_chosen_step_logps, policy_rejected_step_logps: [B, S] of the better and the worse candidate, each divided
        by the number of elements.
      reference_chosen_step_logps, reference_rejected_step_logps: [B, S] the same of the reference; constants.
      beta: strength of the tie to the reference.
      ratio_clip: eps, half the width of the trusted interval of ratios; inf trusts all.

    Returns:
      loss and metrics float32 [B]; rewards are beta times the steps' mean clipped log-ratio.

    Raises:
      ValueError: beta or ratio_clip not positive.
    """
    require_positive(beta=beta)
    chosen = clipped_log_ratio(policy_chosen_step_logps, reference_chosen_step_logps, ratio_clip)
    rejected = clipped_log_ratio(policy_rejected_step_logps, reference_rejected_step_logps, ratio_clip)
    loss = jnp.mean(logistic_loss(beta * (chosen.value - rejected.value)), axis=-1)
    metrics = gain_metrics(beta * jnp.mean(chosen.value, axis=-1), beta * jnp.mean(rejected.value, axis=-1))
    clip_share = 0.5 * jnp.mean(chosen.clipped + rejected.clipped, axis=-1)
    return LossOutput(loss, metrics | {"clip_share": clip_share})


def spo_rollout(
    predict: Predict,
    latents: Array,
    steps: Step,
    condition: PyTree = None,
    *,
    parameterisation: Parameterisation,
    score: Score,
    key: Array,
    candidates: int = 4,
    start: int = 4,
    threshold: float = 0.3,
    follow: Follow = follow_random,
) -> PoolSample:
    """Sample with pools and keep the pair of each step, see `pools.pool_rollout`.

    Args:
      predict, latents, steps, condition, parameterisation, score, key: as there.
      candidates: K; 4 for SD 1.5, 2 for SDXL.
      start: ordinary steps before the first pool, 4 of 20.
      threshold: 0.3 for SD 1.5, 0.4 for SDXL.
      follow: which candidate comes next; `follow_best` is the paper's worse variant.
    """
    return pool_rollout(
        predict, latents, steps, condition, parameterisation=parameterisation, score=score, key=key,
        candidates=candidates, start=start, threshold=threshold, follow=follow,
    )  # fmt: skip


def preference_divergence(scores: Array, preferred_share: Array) -> Array:
    """What the step-aware preference model is trained by, float32 [B]: zero where the scores say what the label says.

    Args:
      scores: [B, 2] of the two images of a pair, see `feature_scores`.
      preferred_share: [B, 2] the label: (1, 0), (0, 1), or (0.5, 0.5) for a tie; a constant. A row's weight in the
        mean is 1 / (comparisons of its prompt), so that prompts weigh alike.
    """
    chex.assert_equal_shape([scores, preferred_share])
    share = jax.lax.stop_gradient(preferred_share.astype(jnp.float32))
    logps = jax.nn.log_softmax(scores.astype(jnp.float32), axis=-1)
    return jnp.sum(jax.scipy.special.xlogy(share, share) - share * logps, axis=-1)


def feature_scores(image_features: Array, text_features: Array, log_scale: Array | float) -> Array:
    """exp(log_scale) times the cosine of image and text features [..., D], float32 [...]."""
    return jnp.exp(jnp.asarray(log_scale, jnp.float32)) * cosine_similarity(image_features, text_features)

"""Diffusion-KTO: images labelled liked or disliked, each judged against what the policy gains over the reference.

Li et al. 2024, "Aligning Diffusion Models by Optimizing Human Utility", arXiv 2404.04465 (NeurIPS 2024). Evidence:
loss, utilities, reference points, sampling and labels confirmed from the official code.

    g    = L_ref - L_theta,   L = mean squared error of the prediction (each image has its own noise and timestep)
    q    = max(0, mean of g over the batch), a constant
    x    = s beta (g - q),   s = 1 liked, -1 disliked;   loss = w(label) (1 - U(x))

    diffusion_kto             U = sigma(x)
    diffusion_kto_averse      U = log sigma(x)
    diffusion_kto_seeking     U = -log sigma(-x)
    diffusion_kto_signed      U = -s log sigma(-s x): seeking for liked images, averse for disliked ones
    diffusion_kto_exponential U = s exp(s x / 100) - 1
    diffusion_kto_balanced    U = sigma(x), q = the mean of the two labels' means of g, not clamped
    diffusion_kto_mismatched  U = sigma(x), q = the mean of g of the images under other rows' prompts, not clamped

beta is not halved. At policy = reference the first is half of each weight. q is a statistic of the batch: give many
rows; each microbatch estimates its own.

>>> import jax.numpy as jnp
>>> error = jnp.array([0.5, 0.5])
>>> out = diffusion_kto_loss(policy_image_error=error, reference_image_error=jnp.array([0.503, 0.499]),
...                          labels=jnp.array([1, 0]), weight=jnp.ones(2))  # g = 0.003, -0.001; q = 0.001
>>> print([f"{x:.4f}" for x in out.loss])  # both are sigma(-2)
['0.1192', '0.1192']
"""

from collections.abc import Mapping, Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.diffusion.errors import Inputs, noised_inputs
from dpo_jax.diffusion.ops import error_gain
from dpo_jax.diffusion.process import Process
from dpo_jax.ops import MAX_EXPONENT, batch_mean, logistic_loss, require_between, require_positive
from dpo_jax.types import Array, LossOutput, PyTree


def diffusion_kto_loss(
    *,
    policy_image_error: Array,
    reference_image_error: Array,
    labels: Array,
    weight: Array,
    beta: float = 1000.0,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> LossOutput:
    """Diffusion-KTO with the sigmoid utility; batch-coupled through the reference point q.

    Args:
      beta: how fast the utility saturates with the gain in mean squared error.
      desirable_weight: weight of liked images, at least 0.
      undesirable_weight: weight of disliked images, at least 0.
    """
    g = error_gain(policy_image_error, reference_image_error)
    x = _signed(g, _batch_point(g, weight), labels, beta)
    return _output(jax.nn.sigmoid(-x), x, g, labels, desirable_weight, undesirable_weight)


def diffusion_kto_averse_loss(
    *,
    policy_image_error: Array,
    reference_image_error: Array,
    labels: Array,
    weight: Array,
    beta: float = 1000.0,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> LossOutput:
    """Diffusion-KTO with the loss-averse utility log sigma(x); batch-coupled through the reference point q.

    Args:
      beta: scale of the gain in mean squared error.
      desirable_weight: weight of liked images, at least 0.
      undesirable_weight: weight of disliked images, at least 0.
    """
    g = error_gain(policy_image_error, reference_image_error)
    x = _signed(g, _batch_point(g, weight), labels, beta)
    return _output(1 + logistic_loss(x), x, g, labels, desirable_weight, undesirable_weight)


def diffusion_kto_seeking_loss(
    *,
    policy_image_error: Array,
    reference_image_error: Array,
    labels: Array,
    weight: Array,
    beta: float = 1000.0,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> LossOutput:
    """Diffusion-KTO with the risk-seeking utility -log sigma(-x), without a bound; batch-coupled through q.

    Args:
      beta: scale of the gain in mean squared error.
      desirable_weight: weight of liked images, at least 0.
      undesirable_weight: weight of disliked images, at least 0.
    """
    g = error_gain(policy_image_error, reference_image_error)
    x = _signed(g, _batch_point(g, weight), labels, beta)
    return _output(1 - logistic_loss(-x), x, g, labels, desirable_weight, undesirable_weight)


def diffusion_kto_signed_loss(
    *,
    policy_image_error: Array,
    reference_image_error: Array,
    labels: Array,
    weight: Array,
    beta: float = 1000.0,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> LossOutput:
    """Diffusion-KTO, risk-seeking for liked images and loss-averse for disliked ones; batch-coupled through q.

    Args:
      beta: scale of the gain in mean squared error.
      desirable_weight: weight of liked images, at least 0.
      undesirable_weight: weight of disliked images, at least 0.
    """
    g = error_gain(policy_image_error, reference_image_error)
    x, sign = _signed(g, _batch_point(g, weight), labels, beta), _sign(labels)
    return _output(1 - sign * logistic_loss(-sign * x), x, g, labels, desirable_weight, undesirable_weight)


def diffusion_kto_exponential_loss(
    *,
    policy_image_error: Array,
    reference_image_error: Array,
    labels: Array,
    weight: Array,
    beta: float = 1000.0,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> LossOutput:
    """Diffusion-KTO with the exponential risk-seeking utility; batch-coupled through the reference point q.

    Beyond an exponent of 80 there is no gradient.

    Args:
      beta: scale of the gain in mean squared error; the exponent is a hundredth of it.
      desirable_weight: weight of liked images, at least 0.
      undesirable_weight: weight of disliked images, at least 0.
    """
    g = error_gain(policy_image_error, reference_image_error)
    x, sign = _signed(g, _batch_point(g, weight), labels, beta), _sign(labels)
    utility = sign * jnp.exp(jnp.minimum(sign * x / 100, MAX_EXPONENT)) - 1
    return _output(1 - utility, x, g, labels, desirable_weight, undesirable_weight)


def diffusion_kto_balanced_loss(
    *,
    policy_image_error: Array,
    reference_image_error: Array,
    labels: Array,
    weight: Array,
    beta: float = 1000.0,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> LossOutput:
    """Diffusion-KTO whose reference point gives both labels the same say; batch-coupled through it.

    A label without rows counts as a mean of 0.

    Args:
      beta: how fast the utility saturates with the gain in mean squared error.
      desirable_weight: weight of liked images, at least 0.
      undesirable_weight: weight of disliked images, at least 0.
    """
    g = error_gain(policy_image_error, reference_image_error)
    liked = (labels > 0).astype(jnp.float32)
    point = (batch_mean(g, weight * liked) + batch_mean(g, weight * (1 - liked))) / 2
    x = _signed(g, jax.lax.stop_gradient(point), labels, beta)
    return _output(jax.nn.sigmoid(-x), x, g, labels, desirable_weight, undesirable_weight)


def diffusion_kto_mismatched_loss(
    *,
    policy_image_error: Array,
    reference_image_error: Array,
    policy_mismatched_error: Array,
    reference_mismatched_error: Array,
    labels: Array,
    weight: Array,
    beta: float = 1000.0,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> LossOutput:
    """Diffusion-KTO whose reference point comes from other rows' prompts; batch-coupled through it.

    Args:
      beta: how fast the utility saturates with the gain in mean squared error.
      desirable_weight: weight of liked images, at least 0.
      undesirable_weight: weight of disliked images, at least 0.
    """
    g = error_gain(policy_image_error, reference_image_error)
    other = error_gain(policy_mismatched_error, reference_mismatched_error)
    x = _signed(g, jax.lax.stop_gradient(batch_mean(other, weight)), labels, beta)
    return _output(jax.nn.sigmoid(-x), x, g, labels, desirable_weight, undesirable_weight)


def diffusion_kto_mismatched_inputs(
    *, clean: Array, noise: Array, times: Array, condition: PyTree, process: Process, images: int
) -> Inputs:
    """One noisy image under both prompts: a latent that is drawn from a posterior is drawn once."""
    first = jnp.repeat(clean.reshape(-1, images, *clean.shape[1:])[:, 0], images, axis=0)
    return noised_inputs(clean=first, noise=noise, times=times, condition=condition, process=process)


def win_labels(pairs: Sequence[Mapping[str, object]], *, both: int | None = 1) -> dict[object, int]:
    """Labels of images from the pairs that they stand in; host. Image -> 1 liked, 0 disliked.

    Args:
      pairs: mappings whose `chosen` and `rejected` name images (hashable).
      both: label of images that won one pair and lost another: 1 (the paper), 0, or None to leave them out.
    """
    won = dict.fromkeys(pair["chosen"] for pair in pairs)
    lost = dict.fromkeys(pair["rejected"] for pair in pairs)
    labels = {image: 1 for image in won if image not in lost} | {image: 0 for image in lost if image not in won}
    return labels if both is None else labels | {image: both for image in won if image in lost}


def sampling_weights(labels: Sequence[int] | np.ndarray, *, positive_ratio: float = 0.5) -> np.ndarray:
    """Probability of drawing each row, with replacement, so that a share of the draws is liked; host, float64 [N].

    Args:
      labels: 1 liked, 0 disliked; both occur.
      positive_ratio: that share, in [0, 1]; 0.8 in the official launcher.

    Raises:
      ValueError: a label without rows.
    """
    require_between(0.0, 1.0, positive_ratio=positive_ratio)
    liked = np.asarray(labels) > 0
    require_positive(liked=int(liked.sum()), disliked=int((~liked).sum()))
    return np.where(liked, positive_ratio / liked.sum(), (1 - positive_ratio) / (~liked).sum())


def _sign(labels: Array) -> Array:
    return jnp.where(labels > 0, 1.0, -1.0)


def _batch_point(g: Array, weight: Array) -> Array:
    """First the mean over the batch, then the clamp; the paper lets no gradient through it."""
    return jax.lax.stop_gradient(jnp.maximum(batch_mean(g, weight), 0.0))


def _signed(g: Array, point: Array, labels: Array, beta: float) -> Array:
    require_positive(beta=beta)
    chex.assert_equal_shape([g, labels])
    return _sign(labels) * beta * (g - point)


def _output(
    loss: Array, x: Array, g: Array, labels: Array, desirable_weight: float, undesirable_weight: float
) -> LossOutput:
    require_between(0.0, float("inf"), desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
    metrics = {"gain": g, "value": x, "accuracy": (x > 0).astype(jnp.float32)}
    loss = jnp.where(labels > 0, desirable_weight, undesirable_weight) * loss
    return LossOutput(loss, jax.lax.stop_gradient(metrics))

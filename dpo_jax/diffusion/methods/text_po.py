"""Text preference optimisation: for one image its caption is preferred to a slightly wrong one; no pairs of images.

"Free Lunch Alignment of Text-to-Image Diffusion Models without Preference Image Pairs", 2025, arXiv 2509.25771.
Evidence: data and form of both objectives from summaries and reviews; scale of beta and the reference point are those
of the parents, Diffusion-DPO and Diffusion-KTO (reconstructed).

    L(c) = mean squared error of the prediction at ONE noisy image under caption c, g(c) = L_ref(c) - L_theta(c)
    tdpo   -log sigma((beta / 2) (g(matched) - g(wrong)))
    tkto   [w_D sigma(-beta (g(matched) - q)) + w_U sigma(beta (g(wrong) - q))] / 2
           q = max(0, mean of g over all captions of the batch), a constant

The row is `mismatched`: the image under its caption, then under an edited one. Both see the same noise, so the noise
nearly cancels and margins are small: a large beta means early steps that push the wrong caption away without bound
(smaller values than for pairs of images; watch the metric `mismatched_gain`). Captions that are equal, or a model
that does not listen, give log 2 and exactly no gradient.

>>> import jax.numpy as jnp
>>> error = jnp.array([0.5])
>>> arrays = dict(policy_image_error=error, reference_image_error=error + 0.25,
...               policy_mismatched_error=error, reference_mismatched_error=error)
>>> round(float(tdpo_loss(**arrays, beta=8.0).loss[0]), 4)  # -log sigma(1)
0.3133
>>> edit_caption("a red circle", (("red", "blue"),), random=np.random.default_rng(0))
'a blue circle'
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.diffusion.errors import Inputs, noised_inputs
from dpo_jax.diffusion.ops import Gains, pair_gains, scaled_gain_metrics
from dpo_jax.diffusion.process import Process
from dpo_jax.ops import batch_mean, logistic_loss, require_between, require_positive
from dpo_jax.types import Array, LossOutput, PyTree


def tdpo_loss(
    *,
    policy_image_error: Array,
    policy_mismatched_error: Array,
    reference_image_error: Array,
    reference_mismatched_error: Array,
    beta: float = 2000.0,
) -> LossOutput:
    """Diffusion-DPO between two captions of one image.

    Args:
      beta: as in Diffusion-DPO; here smaller values are the gentle ones.
    """
    require_positive(beta=beta)
    gains = pair_gains(policy_image_error, policy_mismatched_error, reference_image_error, reference_mismatched_error)
    return LossOutput(logistic_loss(0.5 * beta * gains.margin), _metrics(gains, 0.5 * beta))


def tkto_loss(
    *,
    policy_image_error: Array,
    policy_mismatched_error: Array,
    reference_image_error: Array,
    reference_mismatched_error: Array,
    weight: Array,
    beta: float = 1000.0,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> LossOutput:
    """Diffusion-KTO with right captions liked and wrong ones disliked; batch-coupled through the reference point.

    A row's value is the mean of its two losses.

    Args:
      beta: how fast the utility saturates with the gain in mean squared error.
      desirable_weight: weight of right captions, at least 0.
      undesirable_weight: weight of wrong captions, at least 0; 0 leaves Diffusion-KTO of liked images, halved.
    """
    require_positive(beta=beta)
    require_between(0.0, float("inf"), desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
    gains = pair_gains(policy_image_error, policy_mismatched_error, reference_image_error, reference_mismatched_error)
    point = jnp.maximum(batch_mean((gains.chosen + gains.rejected) / 2, weight), 0.0)
    point = jax.lax.stop_gradient(point)
    right = desirable_weight * jax.nn.sigmoid(-beta * (gains.chosen - point))
    wrong = undesirable_weight * jax.nn.sigmoid(beta * (gains.rejected - point))
    return LossOutput((right + wrong) / 2, _metrics(gains, beta))


def tdpo_inputs(
    *, clean: Array, noise: Array, times: Array, condition: PyTree, process: Process, images: int
) -> Inputs:
    """One noisy image under all captions of a row: a latent that is drawn from a posterior is drawn once."""
    first = jnp.repeat(clean.reshape(-1, images, *clean.shape[1:])[:, 0], images, axis=0)
    return noised_inputs(clean=first, noise=noise, times=times, condition=condition, process=process)


def tkto_inputs(
    *, clean: Array, noise: Array, times: Array, condition: PyTree, process: Process, images: int
) -> Inputs:
    """The inputs of TDPO."""
    return tdpo_inputs(clean=clean, noise=noise, times=times, condition=condition, process=process, images=images)


def edit_caption(caption: str, groups: Sequence[Sequence[str]], *, random: np.random.Generator) -> str:
    """Replace one word of a caption by another of its group; a rule in place of the paper's language model.

    The paper edits by content, attributes, relations and context: groups of nouns and numbers, of colours, of
    prepositions, of places and times. Host.

    Args:
      groups: words that may stand for each other, lower case; the rest of a word (a comma, capitals) is kept as it is.

    Raises:
      ValueError: no word of the caption is in a group of at least two.
    """
    words = caption.split(" ")
    choices = [
        (place, other)
        for place, word in enumerate(words)
        for group in groups
        if _stem(word) in group
        for other in group
        if other != _stem(word)
    ]
    if not choices:
        raise ValueError(f"no word of {caption!r} is in a group of words; give a group that has one")
    # A word first, then its replacement: words of large groups are not edited more often.
    places = sorted({place for place, _ in choices})
    place = places[random.integers(len(places))]
    others = [other for at, other in choices if at == place]
    words[place] = _in_place_of(words[place], others[random.integers(len(others))])
    return " ".join(words)


def _stem(word: str) -> str:
    return word.strip(".,;:!?\"'()").lower()


def _in_place_of(word: str, other: str) -> str:
    core = word.strip(".,;:!?\"'()")
    return word.replace(core, other.capitalize() if core[:1].isupper() else other, 1)


def _metrics(gains: Gains, scale: float) -> dict[str, Array]:
    mismatched = jax.lax.stop_gradient(gains.rejected)
    return scaled_gain_metrics(gains, scale) | {"mismatched_gain": mismatched}

"""TDPO and TKTO against float64 NumPy written from the formulas, and what follows from one noisy image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from error_arrays import PROCESS, batch_of, denoiser, errors, gains, margin
from numeric import assert_formula, float32, sigmoid, softplus

from dpo_jax.diffusion.methods.diffusion_dpo import diffusion_dpo_loss
from dpo_jax.diffusion.methods.diffusion_kto import diffusion_kto_loss
from dpo_jax.diffusion.methods.text_po import edit_caption, tdpo_inputs, tdpo_loss, tkto_inputs, tkto_loss
from dpo_jax.diffusion.objectives import from_loss
from dpo_jax.diffusion.types import DiffusionBatch

SIDES = ("image", "mismatched")
PARAMS = jnp.array([0.7, 0.2])
GROUPS = (("red", "green", "blue"), ("left", "right"), ("circle", "square"))


def triplets(better=0.0, seed=0):
    arrays = errors(seed, SIDES)
    return {n: v + better * n.startswith("reference") for n, v in arrays.items()}


def one_image(own_conditions=True, spread=None):
    batch = batch_of(own_conditions=own_conditions)
    latents = np.repeat(batch.latents[:, :1], 2, axis=1)
    return DiffusionBatch(latents, batch.condition, batch.weight, {}, spread)


def value_and_slope(loss, batch, inputs, start=PARAMS, reference=PARAMS, **options):
    objective = from_loss(loss, PROCESS, inputs=inputs, **options)

    def total(params):
        return jnp.mean(objective(denoiser(params), denoiser(reference), batch, jax.random.key(1)).loss)

    return jax.value_and_grad(total)(start)


@pytest.mark.parametrize("seed", [0, 1])
def test_tdpo_value_and_gradient(seed):
    assert_formula(tdpo_loss, lambda a: softplus(-3.5 * margin(a, SIDES)), triplets(seed=seed), beta=7.0)


@pytest.mark.parametrize("better", [0.3, -1.0])
def test_tkto_value_and_gradient(better):
    arrays = {**triplets(better), "weight": np.array([1.0, 1, 0, 1, 1])}
    there = arrays["weight"] != 0
    point = max(0.0, np.mean([gains(arrays, side)[there] for side in SIDES]))
    assert (point > 0) == (better > 0)
    options = dict(desirable_weight=1.3, undesirable_weight=0.7)

    def formula(a):
        right, wrong = (gains(a, side) - point for side in SIDES)
        return (1.3 * (1 - sigmoid(3.0 * right)) + 0.7 * (1 - sigmoid(-3.0 * wrong))) / 2

    assert_formula(tkto_loss, formula, arrays, beta=3.0, **options)


def test_equal_captions_or_deaf_models_give_no_gradient():
    equal = one_image(own_conditions=False)
    cases = ((equal, PARAMS, PARAMS + 0.2), (one_image(), jnp.array([0.7, 0.0]), jnp.array([0.9, 0.0])))
    for batch, reference, start in cases:
        value, slope = value_and_slope(tdpo_loss, batch, tdpo_inputs, start, reference, beta=10.0)
        assert value == pytest.approx(np.log(2), rel=1e-6)
        # The two branches of an image have opposite slopes of order one; a deaf model may still learn to listen.
        heard = slope if batch is equal else slope[:1]
        np.testing.assert_allclose(heard, 0.0, atol=1e-6)


def test_captions_that_differ_push_from_the_start():
    value, slope = value_and_slope(tdpo_loss, one_image(), tdpo_inputs, beta=10.0)
    assert value == pytest.approx(np.log(2), rel=1e-6) and np.abs(slope).max() > 1e-2


@pytest.mark.parametrize("inputs", [tdpo_inputs, tkto_inputs])
def test_both_captions_see_one_noisy_image(inputs):
    batch, seen = one_image(spread=np.ones((4, 2, 3, 2), np.float32)), []

    def policy(latents, times, condition):
        seen.append((latents.reshape(4, 2, -1), times.reshape(4, 2)))
        return denoiser(PARAMS)(latents, times, condition)

    loss = tdpo_loss if inputs is tdpo_inputs else tkto_loss
    from_loss(loss, PROCESS, inputs=inputs)(policy, denoiser(PARAMS), batch, jax.random.key(0))
    for array in seen[0]:
        np.testing.assert_array_equal(array[:, 0], array[:, 1])


def test_the_noise_nearly_cancels_between_captions_of_one_image():
    """The margin varies less over draws of the noise than Diffusion-DPO's between two images of one caption."""
    triple = one_image()
    condition = triple.condition[:, :1] + 0.3 * np.stack([0 * triple.condition[:, 0], triple.condition[:, 1]], axis=1)
    subtle = DiffusionBatch(triple.latents, condition, triple.weight, {})
    moved = PARAMS + jnp.array([0.1, 0.1])

    def spread(loss, batch, **options):
        objective = from_loss(loss, PROCESS, beta=10.0, **options)
        many = jax.tree.map(lambda leaf: np.tile(leaf, (100, *[1] * (leaf.ndim - 1))), batch)  # draws of each row
        margins = objective(denoiser(moved), denoiser(PARAMS), many, jax.random.key(0)).metrics["margin"]
        return np.var(margins.reshape(100, -1), axis=0).mean()

    assert spread(tdpo_loss, subtle, inputs=tdpo_inputs) < 0.5 * spread(diffusion_dpo_loss, batch_of())


def test_tdpo_is_diffusion_dpo_with_the_image_twice():
    arrays = triplets()
    pair = {n.replace("image", "chosen").replace("mismatched", "rejected"): v for n, v in arrays.items()}
    np.testing.assert_array_equal(
        tdpo_loss(**float32(arrays), beta=6.0).loss, diffusion_dpo_loss(**float32(pair), beta=6.0).loss
    )


def test_tkto_is_diffusion_kto_of_all_captions():
    arrays = triplets(0.3)
    rows = {
        f"{model}_image_error": np.concatenate([arrays[f"{model}_{side}_error"] for side in SIDES])
        for model in ("policy", "reference")
    }
    both = diffusion_kto_loss(
        **float32({**rows, "labels": np.repeat([1, 0], 5), "weight": np.ones(10)}), beta=4.0, desirable_weight=1.2
    )
    own = tkto_loss(**float32({**arrays, "weight": np.ones(5)}), beta=4.0, desirable_weight=1.2)
    np.testing.assert_allclose(own.loss, np.asarray(both.loss).reshape(2, 5).mean(0), rtol=1e-5)
    liked = tkto_loss(**float32({**arrays, "weight": np.ones(5)}), beta=4.0, undesirable_weight=0.0)
    np.testing.assert_allclose(2 * liked.loss, both.loss[:5] / 1.2, rtol=1e-5)


# Captions


def test_edits_change_one_word_to_another_of_its_group():
    caption, random = "A red circle, left of a green square.", np.random.default_rng(0)
    edits = {edit_caption(caption, GROUPS, random=random) for _ in range(200)}
    words = caption.split(" ")
    for edit in edits:
        changed = [(a, b) for a, b in zip(words, edit.split(" "), strict=True) if a != b]
        assert len(changed) == 1
        one, other = (word.strip(",.") for word in changed[0])
        assert any(one in group and other in group for group in GROUPS)
    assert len(edits) == 2 + 1 + 1 + 2 + 1  # red, circle, left, green, square
    assert "A red square, left of a green square." in edits


def test_edits_keep_capitals_and_refuse_captions_without_a_word():
    random = np.random.default_rng(0)
    assert edit_caption("(Left) of it", GROUPS, random=random) == "(Right) of it"
    with pytest.raises(ValueError, match="no word of 'a cat'"):
        edit_caption("a cat", GROUPS, random=random)

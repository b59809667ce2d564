"""Scores, preferences and PickScore's loss as functions of arrays; pixels as the towers see them."""

import doctest
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formula_weights import chirp
from PIL import Image

from dpo_jax.diffusion.rewards import pixels, scores

rng = np.random.default_rng(0)
IMAGES, TEXT = rng.normal(size=(3, 4, 8)), rng.normal(size=(3, 1, 8))


def test_doctest():
    assert doctest.testmod(scores).failed == 0


# Scores


def cosine():
    return np.sum(IMAGES * TEXT, -1) / np.linalg.norm(IMAGES, axis=-1) / np.linalg.norm(TEXT, axis=-1)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_scores_are_cosines_whatever_the_lengths(scale):
    given = jnp.asarray(IMAGES * scale, jnp.float32), jnp.asarray(TEXT / scale, jnp.float32)
    close = {"rtol": 1e-5, "atol": 1e-6}
    np.testing.assert_allclose(scores.hps_score(*given), cosine(), **close)
    np.testing.assert_allclose(scores.clip_score(*given), cosine(), **close)
    np.testing.assert_allclose(scores.clipped_clip_score(*given), 2.5 * np.maximum(cosine(), 0), **close)
    np.testing.assert_allclose(scores.pickscore(*given, np.log(100.0)), 100 * cosine(), rtol=1e-5, atol=1e-4)


def test_probabilities_know_no_common_shift():
    given = jnp.asarray(cosine() * 100, jnp.float32)
    found = scores.pickscore_probabilities(given)
    np.testing.assert_allclose(found.sum(-1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(scores.pickscore_probabilities(given + 7), found, rtol=1e-4, atol=1e-6)


def test_the_head_collapses_to_one_vector():
    sizes = (8, 16, 6, 5, 4, 1)
    layers = [(rng.normal(size=(o, i)).astype(np.float32), rng.normal(size=o)) for i, o in itertools.pairwise(sizes)]
    value = IMAGES / np.linalg.norm(IMAGES, axis=-1, keepdims=True)
    for matrix, bias in layers:
        value = value @ matrix.T.astype(np.float64) + bias
    head = scores.collapsed_head(layers)
    found = scores.aesthetic_score(jnp.asarray(IMAGES * 3, jnp.float32), head)
    np.testing.assert_allclose(found, value[..., 0], rtol=1e-4, atol=1e-3)
    with pytest.raises(ValueError, match=r"layer 1 of the head is \(5, 6\) with 5 biases, after 16"):
        scores.collapsed_head([layers[0], layers[2]])
    with pytest.raises(ValueError, match="has 16 outputs"):
        scores.collapsed_head(layers[:1])


# Preferences


def test_preferences_of_scores():
    found = scores.reward_to_preference([[0.1, 0.9, 0.5], [2.0, 1.9, 2.0], [1.0, 1.0, 1.0]], tie_margin=0.2)
    np.testing.assert_array_equal(found.chosen, [1, 0, 0])
    np.testing.assert_array_equal(found.rejected, [0, 1, 2])
    np.testing.assert_array_equal(found.decided, [True, False, False])


@pytest.mark.parametrize(
    ("given", "margin", "message"),
    [([1.0], 0, "at least two images"), ([1.0, np.nan], 0, "1 scores are no"), ([1, 2], -1, "tie_margin is -1")],
)
def test_scores_without_a_preference_are_refused(given, margin, message):
    with pytest.raises(ValueError, match=message):
        scores.reward_to_preference(given, tie_margin=margin)


def test_win_rates_and_ties_are_everything():
    a, b = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 1.0, 4.0, 1.0])
    there, back = scores.win_rate(a, b), scores.win_rate(b, a)
    assert there == (0.5, 0.25, 0.25) and there.wins + back.wins + there.ties == 1
    assert there.half == 0.625 and there.half + back.half == 1
    assert there.decided == 2 / 3 and np.isnan(scores.win_rate(a, a).decided)
    assert scores.win_rate(a, b, tie_margin=1.0).ties == 0.75
    with pytest.raises(ValueError, match="4 and 1 scores"):
        scores.win_rate(a, b[:1])


# PickScore's loss

LABELS = np.array([[1, 0], [0, 1], [0.5, 0.5], [1, 0]])


def reference(values, labels):
    """In float64: l_0 CE(., 0) + l_1 CE(., 1), and log(1/2) for ties."""
    values = np.asarray(values, np.float64)
    entropy = np.logaddexp(values[:, :1], values[:, 1:]) - values
    return (labels * entropy).sum(-1) + np.log(0.5) * (labels[:, 0] == 0.5)


def test_loss_against_float64():
    values = chirp("pairs", (4, 2)) * 3
    output = scores.pickscore_loss(scores=jnp.asarray(values), labels=jnp.asarray(LABELS))
    np.testing.assert_allclose(output.loss, reference(values, LABELS), rtol=1e-5, atol=1e-6)
    slope = jax.grad(lambda v: scores.pickscore_loss(scores=v, labels=jnp.asarray(LABELS)).loss.sum())(
        jnp.asarray(values)
    )
    np.testing.assert_allclose(slope, np.asarray(jax.nn.softmax(values)) - LABELS, rtol=1e-5, atol=1e-6)
    assert all(value.shape == (4,) and value.dtype == jnp.float32 for value in (output.loss, *output.metrics.values()))
    np.testing.assert_allclose(
        output.metrics["probability"], np.where(LABELS[:, 0] == 0.5, 0.5, np.exp(-reference(values, LABELS))), rtol=1e-5
    )


def test_loss_of_swapped_images_is_the_same():
    values = jnp.asarray(chirp("pairs", (4, 2)))
    ours = scores.pickscore_loss(scores=values, labels=jnp.asarray(LABELS))
    swapped = scores.pickscore_loss(scores=values[:, ::-1], labels=jnp.asarray(LABELS[:, ::-1]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), ours, swapped)


def test_loss_is_least_where_scores_say_the_label():
    values = jnp.asarray([[1e4, -1e4], [-1e4, 1e4], [3.0, 3.0], [-1e4, 1e4]])
    output = scores.pickscore_loss(scores=values, labels=jnp.asarray(LABELS))
    np.testing.assert_allclose(output.loss, [0, 0, 0, 2e4], atol=1e-6)
    np.testing.assert_array_equal(output.metrics["accuracy"], [1, 1, 0.5, 0])


# Pixels


def photo(height, width):
    return np.asarray((chirp("photo", (height, width, 3)) + 1) * 127.5, np.uint8)


@pytest.mark.parametrize(("height", "width"), [(40, 61), (61, 40), (20, 31), (32, 32), (9, 300)])
def test_short_side_is_pillows_own_resize(height, width):
    size, image = 32, photo(height, width)
    short = min(height, width)
    tall, wide = int(size * height / short), int(size * width / short)
    whole = np.asarray(Image.fromarray(image).resize((wide, tall), Image.Resampling.BICUBIC)).astype(np.float32) / 255
    top, left = (tall - size) // 2, (wide - size) // 2
    expected = (whole[top : top + size, left : left + size] - pixels.MEAN) / pixels.STD
    np.testing.assert_array_equal(pixels.short_side_crop(image, size), expected)


def test_odd_rests_are_split_in_two_ways():
    image = photo(32, 39)  # three columns and a half on each side
    down, even = pixels.short_side_crop(image, 32), pixels.short_side_crop(image, 32, nearest_centre=True)
    np.testing.assert_array_equal(down[:, 1:], even[:, :-1])


@pytest.mark.parametrize(("size", "wanted"), [(61, 32), (300, 32), (20, 32), (33, 32)])
def test_antialiased_weights_are_those_of_pillow_in_float(size, wanted):
    row = chirp("row", (1, size))
    expected = np.asarray(Image.fromarray(row).resize((wanted, 1), Image.Resampling.BICUBIC))
    weights = pixels.bicubic_weights(size, wanted, antialias=True)
    np.testing.assert_allclose(row @ weights.T, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize(("size", "wanted"), [(61, 32), (300, 32), (20, 32)])
def test_weights_are_those_of_torch(size, wanted, antialias):
    torch = pytest.importorskip("torch", reason="compares with torch")
    image = chirp("square", (1, 1, size, size))
    expected = torch.nn.functional.interpolate(
        torch.tensor(image), (wanted, wanted), mode="bicubic", align_corners=False, antialias=antialias
    )
    weights = pixels.bicubic_weights(size, wanted, antialias=antialias)
    np.testing.assert_allclose(weights @ image[0, 0] @ weights.T, expected[0, 0], rtol=1e-4, atol=1e-5)


def test_point_sampled_weights_of_torch():
    """What torch.nn.functional.interpolate makes of the five unit vectors, bicubic, to three."""
    first = [0.685185, 0.370370, -0.055555, 0.0, 0.0]
    found = pixels.bicubic_weights(5, 3, antialias=False)
    np.testing.assert_allclose(found, [first, [0, 0, 1, 0, 0], first[::-1]], atol=2e-6)


def test_constant_images_stay_constant():
    for value in (0, 77, 255):
        image = np.full((50, 31, 3), value, np.uint8)
        expected = pixels.normalised(np.full(3, value / 255, np.float32))
        np.testing.assert_allclose(pixels.short_side_crop(image, 32) - expected, 0, atol=1e-6)
        inside = pixels.long_side_pad(image, 32)[:, 6:26]
        np.testing.assert_allclose(inside - expected, 0, atol=1e-5)


@pytest.mark.parametrize("antialias", [True, False])
def test_padding_is_minus_mean_over_deviation(antialias):
    image = photo(60, 30)
    found = pixels.long_side_pad(image, 32, antialias=antialias)
    np.testing.assert_allclose(found[:, :8] - (-pixels.MEAN / pixels.STD), 0, atol=1e-6)
    np.testing.assert_array_equal(found[:, 24:], found[:, :8])
    assert (found[:, 8:24].std(axis=(0, 1)) > 0.1).all()
    np.testing.assert_array_equal(
        pixels.long_side_pad(photo(20, 32), 32)[6:26], pixels.normalised(photo(20, 32) / np.float32(255))
    )

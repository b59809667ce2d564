"""The shape world: captions and images that agree, a judge that reads them back under noise, tokens that come back."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_jax.diffusion.data.decoding import check_images
from dpo_jax.diffusion.data.rows import check_rows
from dpo_jax.worlds import shapes

CAPTIONS = st.sampled_from(shapes.all_captions())


def error_rates(count, sigma, *, blur=False, size=32):
    """Missed true captions, accepted captions with one wrong word, mean error of saturation."""
    random = np.random.default_rng(7)
    captions = shapes.make_captions(count, 0)
    missed = accepted = wrong_saturation = 0.0
    for caption in captions:
        scene = shapes.draw_scene(caption, random)
        image = shapes.render(scene, size)
        if blur:
            image = blurred(image)
        image = image + sigma * random.normal(size=image.shape)
        verdict = shapes.judge(caption, image)
        missed += not verdict.correct
        accepted += shapes.judge(shapes.edit_caption(caption, random), image).correct
        wrong_saturation += abs(verdict.saturation - np.mean([thing.saturation for thing in scene]))
    return missed / count, accepted / count, wrong_saturation / count


def blurred(image):
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
    weights = (0.25, 0.5, 0.25)
    rows = sum(w * padded[i : i + image.shape[0]] for i, w in enumerate(weights))
    return sum(w * rows[:, i : i + image.shape[1]] for i, w in enumerate(weights))


@settings(max_examples=60, deadline=None)
@given(CAPTIONS, st.integers(0, 2**31))
def test_true_images_are_judged_right_and_edited_captions_wrong(caption, seed):
    random = np.random.default_rng(seed)
    scene = shapes.draw_scene(caption, random)
    image = shapes.render(scene)
    assert image.shape == (32, 32, 3) and image.dtype == np.float32 and np.abs(image).max() <= 1
    verdict = shapes.judge(caption, image)
    assert verdict.correct and verdict.score == 1.0 and verdict.form > 0.95
    edited = shapes.edit_caption(caption, random)
    wrong = shapes.judge(edited, image)
    assert edited in shapes.all_captions() and edited != caption
    assert not wrong.correct and 0 < wrong.score < 1
    assert (wrong.colour < 1) + (wrong.shape < 1) + (wrong.relation < 1) == 1
    found = shapes.look(image)
    assert len(found) == len(scene)
    for thing in scene:  # things above each other have nearly one x, so the order from left to right is not theirs
        seen = min(found, key=lambda other: (other.x - thing.x) ** 2 + (other.y - thing.y) ** 2)
        assert (seen.colour, seen.kind) == (thing.colour, thing.kind)
        np.testing.assert_allclose(seen[2:6], thing[2:6], atol=0.02)


@pytest.mark.parametrize(
    "sigma, blur, most_missed",
    [(0.0, False, 0.0), (0.1, False, 0.005), (0.2, False, 0.01), (0.3, False, 0.02), (0.0, True, 0.04)],
)
def test_error_rates_under_noise(sigma, blur, most_missed):
    missed, accepted, saturation = error_rates(200, sigma, blur=blur)
    assert missed <= most_missed and accepted <= 0.005 and saturation < 0.06


def test_small_images_are_judged_too():
    assert error_rates(200, 0.05, size=16)[0] <= 0.02


def test_what_is_missing_or_too_much_costs():
    red = shapes.Thing("red", "circle", 0.26, 0.5, 0.14, 0.9)
    blue = shapes.Thing("blue", "square", 0.76, 0.5, 0.14, 0.6)
    caption = "a red circle left of a blue square"
    assert shapes.judge(caption, shapes.render((red, blue))).saturation == pytest.approx(0.75, abs=0.01)
    alone = shapes.judge(caption, shapes.render((red,)))
    assert alone[:6] == (pytest.approx(1 / 3), False, 0.5, 0.5, 0.0, 1.0)
    extra = shapes.judge("a red circle", shapes.render((red, blue)))
    assert extra[:6] == (0.5, False, 1.0, 1.0, 1.0, 0.5)
    swapped = shapes.judge("a blue square left of a red circle", shapes.render((red, blue)))
    assert swapped[:6] == (pytest.approx(2 / 3), False, 1.0, 1.0, 0.0, 1.0)


@pytest.mark.parametrize("sigma", [0.0, 0.1, 0.3])
def test_empty_and_noisy_images_show_nothing(sigma):
    image = shapes.render(()) + sigma * np.random.default_rng(0).normal(size=(32, 32, 3))
    assert shapes.look(image) == []
    assert shapes.judge("a red circle", image) == (0.0, False, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.3, 1.0, 3.0, 1e30]), st.sampled_from([0.0, np.nan, np.inf]))
def test_judge_takes_any_pixels(seed, spread, odd):
    image = spread * np.random.default_rng(seed).normal(size=(16, 16, 3)).astype(np.float32)
    image = blurred(image)
    image[3, 4] = odd
    verdict = shapes.judge("a red circle above a cyan cross", image)
    assert np.isfinite(verdict).all() and all(0 <= part <= 1 for part in verdict)


def test_wrong_form_of_image():
    with pytest.raises(ValueError, match=r"the form \[32, 16, 3\]"):
        shapes.look(np.zeros((32, 16, 3)))


def test_kinds_have_one_area():
    areas = [
        (shapes.render([shapes.Thing("red", k, 0.5, 0.5, 0.25, 1.0)], 128)[..., 0] > 0).mean() for k in shapes.KINDS
    ]
    np.testing.assert_allclose(areas, np.pi * 0.25**2, rtol=0.03)


def test_captions():
    captions = shapes.all_captions()
    assert len(captions) == len(set(captions)) == 24 + 1920
    assert "a red circle left of a blue square" in captions
    made = shapes.make_captions(500, 3)
    assert made == shapes.make_captions(500, 3) != shapes.make_captions(500, 4)
    assert np.mean([shapes.parse(c).relation is None for c in made]) == pytest.approx(0.5, abs=0.1)
    for text in ("", "a red", "red circle", "a red circle left of a red square", "a pink circle", "a red circle  "):
        with pytest.raises(ValueError, match="the shape world has no caption"):
            shapes.parse(text)


def test_images_repeat_with_their_seed():
    captions = shapes.make_captions(4, 0)
    first, again, other = (shapes.make_images(captions, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert first.shape == (4, 32, 32, 3) and np.abs(first - other).max() > 0.1


@given(CAPTIONS)
def test_tokens_come_back(caption):
    ids = shapes.encode(caption)
    assert ids.dtype == np.int32 and ids.shape == (shapes.CAPTION_LENGTH,) and ids.max() < shapes.VOCABULARY_SIZE
    assert shapes.decode(ids) == caption


def test_tokens_of_the_empty_caption_and_of_strange_words():
    assert shapes.encode("").tolist() == [shapes.BOS, shapes.EOS] + [shapes.PAD] * 8
    assert shapes.decode([shapes.BOS, 23, shapes.EOS]) == "?"
    with pytest.raises(ValueError, match="no words \\['pink'\\]"):
        shapes.encode("a pink circle")
    with pytest.raises(ValueError, match="captions of 9 words"):
        shapes.encode("a " * 9)


@pytest.mark.parametrize("form", ["pairs", "singles", "lists"])
def test_rows_are_of_their_form_and_in_order(form):
    rows = shapes.make_rows(form, 8, seed=1, size=32)
    read = check_rows(rows).rows
    checked = check_images(read)
    assert {row.form for row in read} == {form} and len(checked.rows) == 8
    for row in rows:
        if form == "pairs":
            assert row["chosen_score"] == 1.0 > row["rejected_score"] > 0
        if form == "singles":
            assert shapes.judge(row["caption"], row["image"] / 127.5 - 1).correct == row["label"]
        if form == "lists":
            assert row["scores"] == sorted(row["scores"], reverse=True) and row["scores"][0] == 1.0
    with pytest.raises(ValueError, match="no rows of 'trees'"):
        shapes.make_rows("trees", 1, seed=0)

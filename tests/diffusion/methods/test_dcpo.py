"""Dual captions: which caption goes to which image, perturbation, and what they do to Diffusion-DPO."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from error_arrays import PROCESS, batch_of, denoiser

from dpo_jax.diffusion.methods.dcpo import (
    RATES,
    generated_captions,
    hybrid_captions,
    ordered_captions,
    perturb_caption,
    perturbed_prompt,
)
from dpo_jax.diffusion.methods.diffusion_dpo import diffusion_dpo_loss
from dpo_jax.diffusion.objectives import from_loss
from dpo_jax.diffusion.types import DiffusionBatch

ROW = dict(
    prompt="a shape", chosen="1.png", rejected="2.png", chosen_caption="a red circle", rejected_caption="a blue square"
)
PARAMS = jnp.array([0.7, 0.4])


def objective_value(batch):
    objective = from_loss(diffusion_dpo_loss, PROCESS, beta=5.0)
    return objective(denoiser(PARAMS + 0.2), denoiser(PARAMS), batch, jax.random.key(2)).loss


# Rows


def test_strategies():
    original = dict(ROW)
    assert generated_captions(ROW) == ROW
    assert perturbed_prompt(ROW, perturb=str.upper) == {
        **ROW,
        "chosen_caption": "a shape",
        "rejected_caption": "A SHAPE",
    }
    assert hybrid_captions(ROW, perturb=str.upper) == {**ROW, "rejected_caption": "A BLUE SQUARE"}
    assert original == ROW


def test_prompt_strategy_needs_no_generated_captions():
    row = {"prompt": "a shape", "chosen": "1.png", "rejected": "2.png"}
    assert perturbed_prompt(row, perturb=str.title)["rejected_caption"] == "A Shape"


@pytest.mark.parametrize("label", [1, 0])
def test_the_winner_takes_its_caption_along(label):
    row = dict(image_0="1.png", image_1="2.png", caption_0="one", caption_1="two", label_0=label, prompt="p")
    ordered = ordered_captions(row)
    first = ("1.png", "one") if label else ("2.png", "two")
    assert ordered is not None
    assert (ordered["chosen"], ordered["chosen_caption"]) == first
    assert {ordered["rejected"], ordered["chosen"]} == {"1.png", "2.png"}
    assert ordered.keys() == {"prompt", "chosen", "rejected", "chosen_caption", "rejected_caption"}


def test_ties_are_dropped_and_other_labels_refused():
    row = dict(image_0="1.png", image_1="2.png", caption_0="one", caption_1="two")
    assert ordered_captions({**row, "label_0": 0.5}) is None
    with pytest.raises(ValueError, match="label_0 is 2"):
        ordered_captions({**row, "label_0": 2})


@pytest.mark.parametrize("strength", RATES)
def test_words_are_replaced_at_the_rate(strength):
    random = np.random.default_rng(0)
    caption = " ".join(["red", "cat"] * 2000)
    words = perturb_caption(caption, (("red", "blue", "green"),), rate=RATES[strength], random=random).split(" ")
    assert words[1::2] == ["cat"] * 2000
    changed = np.array(words[::2]) != "red"
    assert abs(changed.mean() - RATES[strength]) < 4 * np.sqrt(0.25 / 2000)
    assert set(np.array(words[::2])[changed]) == {"blue", "green"}


def test_rates_at_the_ends():
    random, groups = np.random.default_rng(0), (("a", "b"),)
    assert perturb_caption("a c a", groups, rate=0.0, random=random) == "a c a"
    assert perturb_caption("a c b", groups, rate=1.0, random=random) == "b c a"
    with pytest.raises(ValueError, match="rate is"):
        perturb_caption("a", groups, rate=1.5, random=random)


# The loss


def test_equal_captions_are_diffusion_dpo():
    batch = batch_of()
    doubled = DiffusionBatch(batch.latents, np.repeat(batch.condition, 2, axis=1), batch.weight, {})
    np.testing.assert_allclose(objective_value(doubled), objective_value(batch), rtol=1e-6)


def test_swapping_images_without_captions_changes_the_loss_and_with_them_the_margin_alone():
    batch = batch_of(own_conditions=True)
    both = DiffusionBatch(batch.latents[:, ::-1], batch.condition[:, ::-1], batch.weight, {})
    images = DiffusionBatch(batch.latents[:, ::-1], batch.condition, batch.weight, {})
    there, swapped, mixed = (np.asarray(objective_value(rows)) for rows in (batch, both, images))
    np.testing.assert_allclose(np.exp(-there) + np.exp(-swapped), 1.0, rtol=1e-5)  # sigma(z) + sigma(-z)
    assert np.abs(mixed - swapped).min() > 1e-3 and np.abs(mixed - there).min() > 1e-3


def test_start_and_deaf_models():
    batch = batch_of(own_conditions=True)
    objective = from_loss(diffusion_dpo_loss, PROCESS, beta=5.0)

    def total(params, reference=PARAMS):
        return jnp.sum(objective(denoiser(params), denoiser(reference), batch, jax.random.key(0)).loss)

    value, slope = jax.value_and_grad(total)(PARAMS)
    assert value == pytest.approx(4 * np.log(2), rel=1e-6) and np.all(np.abs(slope) > 1e-3)
    deaf, other = jnp.array([0.5, 0.0]), DiffusionBatch(batch.latents, batch.condition + 1, batch.weight, {})

    def of(rows):
        return objective(denoiser(deaf), denoiser(0.5 * deaf), rows, jax.random.key(0)).loss

    np.testing.assert_array_equal(of(batch), of(other))


def test_gradient_by_a_caption_comes_from_its_own_image_and_never_through_the_reference():
    batch, key = batch_of(own_conditions=True), jax.random.key(0)
    objective = from_loss(diffusion_dpo_loss, PROCESS, beta=5.0)

    def total(policy_scale, reference_scale, side):
        """Each model's own embedding of the captions, that of one side scaled."""

        def with_embedding(params, scale):
            def predict(latents, times, condition):
                ones = jnp.ones(2).at[side].set(scale)
                factor = jnp.tile(ones, latents.shape[0] // 2)[:, None, None]
                return denoiser(params)(latents, times, condition * factor)

            return predict

        policy = with_embedding(PARAMS + 0.2, policy_scale)
        return jnp.sum(objective(policy, with_embedding(PARAMS, reference_scale), batch, key).loss)

    for side in (0, 1):
        by_policy, by_reference = jax.grad(total, argnums=(0, 1))(1.0, 1.0, side)
        assert abs(by_policy) > 1e-3 and by_reference == 0

"""Diffusion-DPO against float64 NumPy written from the formula, and the properties its paper promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from error_arrays import PROCESS, at_margin, batch_of, denoiser, errors, gains, margin
from numeric import assert_formula, float32, gradients, sigmoid, softplus

from dpo_jax.diffusion.methods.diffusion_dpo import diffusion_dpo_loss
from dpo_jax.diffusion.objectives import from_loss
from dpo_jax.types import LossOutput

LOG2 = np.log(2.0)
PARAMS = jnp.array([0.7, 0.2])


def numpy_loss(a, beta, label_smoothing=0.0):
    z = beta / 2 * margin(a)
    return (1 - label_smoothing) * softplus(-z) + label_smoothing * softplus(z)


@pytest.mark.parametrize("options", [dict(beta=5.0), dict(beta=40.0), dict(beta=5.0, label_smoothing=0.2)])
@pytest.mark.parametrize("seed", [0, 1])
def test_value_and_gradient(options, seed):
    arrays = errors(seed)
    output = assert_formula(diffusion_dpo_loss, lambda a: numpy_loss(a, **options), arrays, **options)
    rewards = {side: options["beta"] / 2 * gains(arrays, side) for side in ("chosen", "rejected")}
    np.testing.assert_allclose(output.metrics["chosen_reward"], rewards["chosen"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(output.metrics["rejected_reward"], rewards["rejected"], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(output.metrics["accuracy"], margin(arrays) > 0)


def test_beta_is_the_papers_and_counts_half():
    np.testing.assert_allclose(diffusion_dpo_loss(**float32(at_margin(0.001))).loss, softplus(-2.5), rtol=1e-3)


# At the reference


@pytest.mark.parametrize("beta", [1.0, 5000.0])
def test_policy_equal_to_reference_gives_log_two_and_half_of_beta_in_the_gradient(beta):
    arrays = at_margin(0.0)
    output = diffusion_dpo_loss(**float32(arrays), beta=beta)
    np.testing.assert_allclose(output.loss, LOG2, rtol=1e-6)
    assert output.metrics["margin"] == 0 and output.metrics["accuracy"] == 0
    slopes = gradients(diffusion_dpo_loss, arrays, beta=beta)
    np.testing.assert_allclose(slopes["policy_chosen_error"], beta / 4, rtol=1e-6)
    np.testing.assert_allclose(slopes["policy_rejected_error"], -beta / 4, rtol=1e-6)


def test_gradient_of_a_real_denoiser_at_the_reference_is_that_of_the_errors():
    batch, key, beta = batch_of(), jax.random.key(4), 30.0
    objective = from_loss(diffusion_dpo_loss, PROCESS, beta=beta)

    def loss(params):
        output = objective(denoiser(params), denoiser(PARAMS), batch, key)
        return jnp.mean(output.loss), output

    (value, output), slope = jax.value_and_grad(loss, has_aux=True)(PARAMS)
    assert value == pytest.approx(LOG2, rel=1e-6)
    np.testing.assert_array_equal(output.metrics["margin"], 0.0)

    def error_of(statistic):
        def only(*, policy_chosen_error, policy_rejected_error):
            return LossOutput(policy_chosen_error - policy_rejected_error, {})

        return jnp.mean(from_loss(only, PROCESS)(denoiser(statistic), None, batch, key).loss)

    expected = beta / 4 * jax.grad(error_of)(PARAMS)  # the same key draws the same noise and timesteps
    assert np.all(np.abs(expected) > 0.05)
    np.testing.assert_allclose(slope, expected, rtol=1e-4)


def test_identical_images_give_no_gradient_through_shared_parameters():
    batch = batch_of()
    latents = np.repeat(batch.latents[:, :1], 2, axis=1)
    batch = type(batch)(latents, batch.condition, batch.weight, batch.columns)
    objective = from_loss(diffusion_dpo_loss, PROCESS, beta=100.0)

    def loss(params):
        return jnp.sum(objective(denoiser(params), denoiser(PARAMS), batch, jax.random.key(0)).loss)

    value, slope = jax.value_and_grad(loss)(PARAMS + 0.3)
    assert value == pytest.approx(4 * LOG2, rel=1e-6)
    np.testing.assert_allclose(slope, 0.0, atol=1e-4)  # two branches of opposite slopes near 50


# Other properties of the paper


def test_swapping_the_images_turns_the_margin():
    arrays = errors()
    other = {"chosen": "rejected", "rejected": "chosen"}
    swapped = {f"{m}_{s}_error": arrays[f"{m}_{other[s]}_error"] for m in ("policy", "reference") for s in other}
    there, back = (diffusion_dpo_loss(**float32(a), beta=8.0) for a in (arrays, swapped))
    np.testing.assert_allclose(back.metrics["margin"], -there.metrics["margin"], rtol=1e-6)
    np.testing.assert_allclose(there.loss - back.loss, -there.metrics["margin"], rtol=1e-4, atol=1e-6)


def test_loss_falls_with_the_rejected_error_and_rises_with_the_chosen_one_by_at_most_half_of_beta():
    beta = 6.0
    slopes = gradients(diffusion_dpo_loss, errors(rows=50, spread=1.0), beta=beta)
    chosen, rejected = slopes["policy_chosen_error"], slopes["policy_rejected_error"]
    assert np.all(chosen > 0) and np.all(rejected < 0)
    np.testing.assert_allclose(chosen, -rejected, rtol=1e-6)
    assert np.all(chosen <= beta / 2) and chosen.max() > 0.9 * beta / 2
    assert np.all(diffusion_dpo_loss(**float32(errors(rows=50))).loss >= 0)


def test_sums_of_errors_need_beta_divided_by_the_elements():
    arrays, elements = errors(), 48
    summed = {name: value * elements for name, value in arrays.items()}
    np.testing.assert_allclose(
        diffusion_dpo_loss(**float32(summed), beta=9.0 / elements).loss,
        diffusion_dpo_loss(**float32(arrays), beta=9.0).loss,
        rtol=2e-5,
    )


def test_common_shifts_of_errors_change_nothing():
    arrays = errors()
    expected = diffusion_dpo_loss(**float32(arrays), beta=9.0).loss
    for names in ([n for n in arrays if n.startswith("reference")], list(arrays)):
        shifted = {n: v + 0.5 * (n in names) for n, v in arrays.items()}
        np.testing.assert_allclose(diffusion_dpo_loss(**float32(shifted), beta=9.0).loss, expected, rtol=2e-5)


def test_doubling_beta_is_doubling_the_margin():
    np.testing.assert_allclose(
        diffusion_dpo_loss(**float32(at_margin([0.1, -0.4])), beta=6.0).loss,
        diffusion_dpo_loss(**float32(at_margin([0.2, -0.8])), beta=3.0).loss,
        rtol=1e-5,
    )


def test_smoothed_labels_have_their_least_loss_at_the_log_odds():
    e, beta = 0.2, 4.0
    best = 2 * np.log((1 - e) / e) / beta
    slopes = gradients(diffusion_dpo_loss, at_margin([best, best - 0.1, best + 0.1]), beta=beta, label_smoothing=e)
    np.testing.assert_array_equal(np.sign(np.round(slopes["policy_chosen_error"], 5)), [0, 1, -1])
    assert sigmoid(beta / 2 * best) == pytest.approx(1 - e)

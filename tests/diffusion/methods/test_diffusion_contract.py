"""Every public loss of the diffusion wing passes the same contract; broken ones fail it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusion_contract import (
    CHECKS,
    PROCESS,
    check_absent_images,
    check_bfloat16,
    check_constants,
    check_empty_places,
    check_every_array_matters,
    check_finite,
    check_objective,
    check_output,
    check_rows,
    check_signature,
    find_losses,
)
from loss_contract import assert_examples_hold, assert_loads_only_jax_and_chex, modules_of

import dpo_jax.diffusion.methods as methods
from dpo_jax.diffusion.errors import Inputs, noised_inputs
from dpo_jax.diffusion.objectives import column_names, from_loss
from dpo_jax.diffusion.process import Process
from dpo_jax.diffusion.types import DiffusionBatch
from dpo_jax.ops import batch_mean, logistic_loss
from dpo_jax.types import Array, LossOutput, PyTree

LOSSES = find_losses()
MODULES = modules_of(methods)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("name", LOSSES)
def test_loss_keeps_the_contract(name, check):
    check(LOSSES[name])


def test_every_loss_is_exported_under_a_name_of_its_own():
    names = [name.partition(".")[2] for name in LOSSES]
    assert len(names) >= 1 and len(set(names)) == len(names)
    missing = [name for name in names if not hasattr(methods, name)]
    assert not missing, f"not exported: {missing}"
    assert all(getattr(methods, name.partition(".")[2]) is loss for name, loss in LOSSES.items())


@pytest.mark.parametrize("name", MODULES)
def test_doctests_of_the_card(name):
    assert_examples_hold(name, LOSSES)


def test_losses_load_only_jax_and_chex():
    assert_loads_only_jax_and_chex("from dpo_jax.diffusion.methods import diffusion_dpo_loss")


# What the batch gives


def test_losses_may_ask_the_batch_which_rows_and_images_are_there():
    def places_loss(*, policy_error: Array, weight: Array, valid: Array) -> LossOutput:
        return LossOutput(weight + 10 * jnp.sum(valid, axis=1) + 0 * jnp.sum(policy_error, axis=1), {})

    def model(latents, times, condition):
        return latents

    assert column_names(places_loss) == ()
    weight = np.array([1, 1, 0], np.float32)
    batch = DiffusionBatch(np.ones((3, 4, 2), np.float32), (), weight, {})
    objective = from_loss(places_loss, PROCESS)
    np.testing.assert_array_equal(objective(model, None, batch, jax.random.key(0)).loss, 40 + weight)
    ragged = np.tril(np.ones((3, 4)))
    batch = DiffusionBatch(batch.latents, (), weight, {"valid": ragged})
    np.testing.assert_array_equal(objective(model, None, batch, jax.random.key(0)).loss, [11, 21, 30])


# A contract that nothing can break proves nothing: each loss below breaks one clause.


def sound_loss(*, policy_error: Array, reference_error: Array, valid: Array, beta: float = 100.0) -> LossOutput:
    """Logistic loss of each list's gains.

    Args:
      beta: scale, above 0.
    """
    if not beta > 0:
        raise ValueError(f"beta is {beta}; give a number above 0")
    gap = jnp.where(valid != 0, policy_error, 0.0).astype(jnp.float32)
    gap = gap - jax.lax.stop_gradient(jnp.where(valid != 0, reference_error, 0.0)).astype(jnp.float32)
    margin = -beta * jnp.sum(gap * jnp.array([[1.0, -0.5, 0.25]]), axis=1)
    return LossOutput(logistic_loss(margin), {"margin": margin})


def every_name_loss(
    *,
    policy_chosen_error: Array,
    policy_chosen_frame_error: Array,
    reference_rejected_error_map: Array,
    policy_rejected_pred: Array,
    rejected_target: Array,
    timesteps: Array,
    alphas_cumprod: Array,
    sigmas: Array,
    log_snr: Array,
    reward_gap: Array,
    weight: Array,
    loss_state: Array,
) -> LossOutput:
    """Asks for nearly everything; batch-coupled."""
    there = jax.lax.stop_gradient(weight)
    level = jax.lax.stop_gradient(timesteps + alphas_cumprod + sigmas + log_snr + reward_gap)
    wrong = policy_rejected_pred.astype(jnp.float32) - rejected_target.astype(jnp.float32)
    error = policy_chosen_error.astype(jnp.float32)
    total = level * error + jnp.sum(jnp.square(wrong), axis=(1, 2, 3)) + batch_mean(error, there)
    total += jnp.sum(policy_chosen_frame_error.astype(jnp.float32), axis=1)
    total -= jax.lax.stop_gradient(jnp.sum(reference_rejected_error_map.astype(jnp.float32), axis=(1, 2)))
    return LossOutput(loss_state + total, {}, loss_state + 1)


def every_name_state() -> Array:
    return jnp.zeros(())


def step_loss(
    *, policy_chosen_step_logps: Array, reference_rejected_step_logps: Array, chosen_step_gap: Array, step_stds: Array
) -> LossOutput:
    """Of recorded steps."""
    weight = jax.lax.stop_gradient(step_stds)
    gap = jnp.sum(weight * chosen_step_gap.astype(jnp.float32), axis=1)
    logps = policy_chosen_step_logps.astype(jnp.float32)
    logps -= jax.lax.stop_gradient(reference_rejected_step_logps.astype(jnp.float32))
    return LossOutput(gap - jnp.sum(logps, axis=1), {})


def own_noise_loss(*, policy_image_error: Array, labels: Array) -> LossOutput:
    """Comes with inputs of its own."""
    return LossOutput(policy_image_error.astype(jnp.float32) * (2.0 * labels - 1), {})


def own_noise_inputs(
    *, clean: Array, own_noise: Array, times: Array, condition: PyTree, process: Process, scale: float = 0.5
) -> Inputs:
    """Noise of each image's own.

    Args:
      scale: of the noise.
    """
    return noised_inputs(clean=clean, noise=scale * own_noise, times=times, condition=condition, process=process)


def positional_loss(policy_image_error: Array) -> LossOutput:
    """Positional array."""
    return LossOutput(policy_image_error, {})


def unguarded_loss(*, policy_image_error: Array, beta: float = 0.1) -> LossOutput:
    """Takes any beta.

    Args:
      beta: scale, above 0.
    """
    return LossOutput(beta * policy_image_error, {})


def undocumented_loss(*, policy_image_error: Array, scale: float = 0.1) -> LossOutput:
    """No line for the scale."""
    return LossOutput(scale * policy_image_error, {})


def reduced_loss(*, policy_image_error: Array) -> LossOutput:
    """Mean over the batch."""
    return LossOutput(jnp.mean(policy_image_error), {})


def overflowing_loss(*, policy_image_error: Array) -> LossOutput:
    """The exponential has no cap."""
    return LossOutput(jnp.exp(policy_image_error), {})


def zero_over_zero_loss(*, policy_image_error: Array, reference_image_error: Array) -> LossOutput:
    """The ratio of gains is nan where there is none."""
    gap = policy_image_error - jax.lax.stop_gradient(reference_image_error)
    return LossOutput(gap / jnp.abs(gap), {})


def low_precision_loss(*, policy_image_error: Array) -> LossOutput:
    """Squares in the dtype of the input."""
    return LossOutput(jnp.square(policy_image_error).astype(jnp.float32), {})


def coupled_loss(*, policy_image_error: Array) -> LossOutput:
    """Centres on the other rows and keeps silent about it."""
    return LossOutput(jnp.square(policy_image_error - jnp.mean(policy_image_error)), {})


def weightless_loss(*, policy_image_error: Array) -> LossOutput:
    """Batch-coupled, and cannot know which places are empty; the word is batch-coupled."""
    return LossOutput(jnp.square(policy_image_error - jnp.mean(policy_image_error)), {})


def counting_loss(*, policy_image_error: Array, weight: Array) -> LossOutput:
    """Is batch-coupled and takes the mean over empty places too."""
    return LossOutput(jnp.square(policy_image_error - jnp.mean(policy_image_error)) * weight, {})


def absent_loss(*, policy_error: Array, valid: Array) -> LossOutput:
    """nan times zero is nan."""
    return LossOutput(jnp.sum(policy_error * valid, axis=1), {})


def leaking_loss(*, policy_image_error: Array, reference_image_error: Array) -> LossOutput:
    """The reference learns too."""
    return LossOutput(logistic_loss(reference_image_error - policy_image_error), {})


def idle_argument_loss(*, policy_image_error: Array, reference_image_error: Array) -> LossOutput:
    """Makes somebody run the reference for nothing."""
    return LossOutput(policy_image_error, {})


def untrainable_loss(*, policy_image_error: Array) -> LossOutput:
    """Nothing learns from it."""
    return LossOutput(jax.lax.stop_gradient(policy_image_error), {})


SOUND = [sound_loss, every_name_loss, step_loss, own_noise_loss]
NO_DATA = (check_objective, every_name_loss)  # none has both frames and maps of places


@pytest.mark.parametrize(
    ("check", "loss"),
    [(check, loss) for check in CHECKS for loss in SOUND if (check, loss) != NO_DATA],
    ids=lambda function: function.__name__,
)
def test_contract_accepts_a_sound_loss(check, loss):
    check(loss)


@pytest.mark.parametrize(
    ("check", "loss", "message"),
    [
        (check_signature, positional_loss, "not keyword-only"),
        (check_signature, unguarded_loss, "beta=-1.0 was accepted"),
        (check_signature, undocumented_loss, "scale has no line"),
        (check_output, reduced_loss, r"loss is float32\(\)"),
        (check_finite, overflowing_loss, "large"),
        (check_finite, zero_over_zero_loss, "equal"),
        (check_bfloat16, low_precision_loss, "Not equal to tolerance"),
        (check_rows, coupled_loss, "Not equal to tolerance"),
        (check_empty_places, weightless_loss, "takes the rows' weight"),
        (check_empty_places, counting_loss, "Not equal to tolerance"),
        (check_absent_images, absent_loss, "Not equal to tolerance|nan"),
        (check_constants, leaking_loss, "flows into reference_image_error"),
        (check_constants, untrainable_loss, "no gradient reaches policy_image_error"),
        (check_every_array_matters, idle_argument_loss, "reference_image_error changes nothing"),
        (check_objective, untrainable_loss, "no gradient reaches the model"),
    ],
)
def test_contract_refuses_a_broken_loss(check, loss, message):
    with pytest.raises(AssertionError, match=message):
        check(loss)

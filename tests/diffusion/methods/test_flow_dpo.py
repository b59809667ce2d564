"""Flow-DPO against float64 NumPy written from the formula, and errors of velocity and noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from error_arrays import batch_of, errors, margin
from numeric import assert_formula, float32, gradients, softplus

from dpo_jax.diffusion.methods.diffusion_dpo import diffusion_dpo_loss
from dpo_jax.diffusion.methods.flow_dpo import best_and_worst, flow_dpo_loss, flow_dpo_noise_loss
from dpo_jax.diffusion.objectives import from_loss
from dpo_jax.diffusion.process import Process
from dpo_jax.diffusion.schedule import add_noise, flow_level, prediction_target, predicts_flow

FLOW = Process(predicts_flow, shift=3.0)
SIGMAS = np.array([0.0, 0.2, 0.5, 0.9, 1.0])


def test_value_and_gradient():
    assert_formula(flow_dpo_loss, lambda a: softplus(-4.0 * margin(a)), errors(), beta=8.0)


def test_value_and_gradient_with_the_falling_beta():
    arrays = {**errors(), "sigmas": SIGMAS}

    def formula(a):
        return softplus(-4.0 * (1 - a["sigmas"]) ** 2 * margin(a))

    assert_formula(flow_dpo_noise_loss, formula, arrays, beta=8.0)


def test_falling_beta_ends_of_the_path():
    arrays = {**errors(), "sigmas": SIGMAS}
    loss, flat = flow_dpo_noise_loss(**float32(arrays)).loss, flow_dpo_loss(**float32(errors())).loss
    assert loss[0] == pytest.approx(float(flat[0]), rel=1e-6) and loss[-1] == pytest.approx(np.log(2), rel=1e-6)
    slopes = gradients(flow_dpo_noise_loss, arrays)["policy_chosen_error"]
    assert slopes[-1] == 0


def test_falling_beta_is_diffusion_dpo_on_errors_of_the_noise():
    """x + (1 - sigma) v is the noise that a velocity implies; and x - sigma v the clean image."""
    rng = np.random.default_rng(0)
    clean, noise = (rng.normal(size=(5, 2, 6)) for _ in range(2))  # chosen and rejected
    noise[:, 1] = noise[:, 0]
    sigma = SIGMAS.clip(0.05, 0.95)[:, None, None]
    x, velocity = (1 - sigma) * clean + sigma * noise, noise - clean
    said = {model: velocity + rng.normal(0, 0.5, velocity.shape) for model in ("policy", "reference")}

    def arrays(convert, target):
        wrong = {model: np.mean((convert(v) - target) ** 2, axis=-1) for model, v in said.items()}
        sides = enumerate(("chosen", "rejected"))
        return {f"{m}_{side}_error": wrong[m][:, i] for i, side in sides for m in wrong}

    of_noise = arrays(lambda v: x + (1 - sigma) * v, noise)
    of_velocity = arrays(lambda v: v, velocity)
    of_clean = arrays(lambda v: x - sigma * v, clean)
    flat = sigma[:, 0, 0]
    for name, error in of_velocity.items():
        np.testing.assert_allclose(of_noise[name], (1 - flat) ** 2 * error, rtol=1e-9)
        np.testing.assert_allclose(of_clean[name], flat**2 * error, rtol=1e-9)
    np.testing.assert_allclose(
        flow_dpo_noise_loss(**float32({**of_velocity, "sigmas": flat}), beta=6.0).loss,
        diffusion_dpo_loss(**float32(of_noise), beta=6.0).loss,
        rtol=1e-5,
    )


def test_the_other_sign_of_velocity_changes_nothing():
    def backwards(alpha, sigma):
        a, b = predicts_flow(alpha, sigma)
        return -a, -b

    def model(sign):
        def predict(latents, times, condition):
            return sign * jnp.tanh(latents + condition)

        return predict

    losses = []
    for process, sign in ((FLOW, 1), (Process(backwards, shift=3.0), -1)):
        objective = from_loss(flow_dpo_loss, process)
        other = model(0.5 * sign)
        losses.append(objective(model(sign), other, batch_of(), jax.random.key(0)).loss)
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    assert np.abs(losses[0] - np.log(2)).max() > 0.1


def test_start_has_a_gradient():
    objective = from_loss(flow_dpo_loss, FLOW)

    def total(scale):
        def predict(latents, times, condition):
            return scale * jnp.tanh(latents) + condition

        def frozen(latents, times, condition):
            return 0.7 * jnp.tanh(latents) + condition

        return jnp.mean(objective(predict, frozen, batch_of(), jax.random.key(0)).loss)

    value, slope = jax.value_and_grad(total)(0.7)
    assert value == pytest.approx(np.log(2), rel=1e-6) and abs(slope) > 1e-3


def test_at_pure_noise_the_images_differ_by_their_targets_alone():
    clean, noise = jax.random.normal(jax.random.key(0), (2, 4)), jnp.ones((2, 4))
    level = flow_level(jnp.ones(2))
    noisy, target = add_noise(clean, noise, level), prediction_target(clean, noise, level, predicts_flow)
    np.testing.assert_array_equal(noisy[0], noisy[1])
    np.testing.assert_allclose(target[0] - target[1], clean[1] - clean[0], rtol=1e-6)
    # Over pairs whose images are exchangeable, a model that says the same to all has no margin on average.
    rng = np.random.default_rng(1)
    images = rng.normal(size=(20_000, 2, 4))
    wrong = [np.mean((constant - (1 - images)) ** 2, axis=-1) for constant in (0.3, 0.0)]  # policy and reference
    margins = (wrong[1] - wrong[0]) @ np.array([1.0, -1.0])
    assert abs(margins.mean()) < 4 * margins.std() / np.sqrt(20_000) and margins.std() > 0.1


def test_best_and_worst():
    pairs = best_and_worst(np.array([[0.1, 0.9, 0.5], [2.0, 2.0, 2.0], [3.0, 1.0, 1.0]]))
    assert [x.tolist() for x in pairs] == [[0, 2], [1, 0], [0, 1]]
    assert len(best_and_worst(np.zeros((3, 4))).prompts) == 0


@pytest.mark.parametrize("rewards", [np.zeros((2, 1)), np.zeros(3), np.array([[0.0, np.nan]])])
def test_rewards_that_make_no_pairs_are_refused(rewards):
    with pytest.raises(ValueError, match="at least two images"):
        best_and_worst(rewards)

"""Self-NPO: the negative branch of guidance learns from the model's own truncated samples, without labels.

Wang et al. 2025, "Self-NPO: Data-Free Diffusion Model Enhancement via Truncated Diffusion Fine-Tuning", arXiv
2505.11777 (AAAI 2026). Evidence: official code; motivation and tables from a public summary of the paper.

    x_t     K steps of DDIM by the reference from noised latents, guidance 0 (without the prompt)
    x_ref   the reference's estimate of the clean latents from x_t, guidance 0 too
    x_s   = (alpha_s / alpha_t) x_t + sqrt(sigma_s^2 - sigma_t^2 alpha_s^2 / alpha_t^2) eps,   s above t
    loss  = mean over elements of sqrt((x_theta(x_s) - x_ref)^2 + c^2) - c,                    c = 0.001

`self_npo_inputs` makes x_s and the target; the errors of clean latents are factors times those of what is predicted,
one loss for each. Few updates: long training decorrelates the branches. The published rollouts are those of the moving
average of the policy: `train.ReferenceUpdate(rate=0.001, every=1)` makes the reference that. Sampling and the
composition of weights are Diffusion-NPO's; there is no other tie to the reference.

>>> import jax.numpy as jnp
>>> half, pred, target = jnp.array([0.5]), jnp.zeros((1, 2, 3)), jnp.ones((1, 2, 3))
>>> out = self_npo_loss(policy_image_pred=pred, image_target=target, alphas_cumprod=half, sigmas=half**0.5)
>>> round(float(out.loss[0]), 4)
0.999
"""

import jax
import jax.numpy as jnp

from dpo_jax.diffusion.draws import normal, of_examples, split_keys
from dpo_jax.diffusion.errors import Inputs
from dpo_jax.diffusion.process import Process, empty_condition, level_of
from dpo_jax.diffusion.sampler import Guidance, guided
from dpo_jax.diffusion.schedule import SMALLEST, add_noise, denoised, implied_noise, per_example, prediction_target
from dpo_jax.diffusion.transitions import FLOW_TIME
from dpo_jax.diffusion.types import Denoised, Level, Predict
from dpo_jax.ops import require_positive
from dpo_jax.types import Array, LossOutput, PyTree


def truncated_rollout(
    predict: Predict,
    latents: Array,
    times: Array,
    condition: PyTree,
    process: Process,
    *,
    steps: int,
    stride: float,
) -> tuple[Array, Array, Denoised]:
    """Deterministic steps of one stride each: the latents, the timesteps [N] they reached, what the model says there.

    An image that would fall below timestep 0 stays at 0.

    Args:
      latents: [N, ...] at the levels of `times` [N], float32.
      condition: leaves [N, ...].
      steps: number of them; 0 asks the model where it stands.
      stride: of a step, in timesteps.
    """

    def ask(latents: Array, times: Array) -> Denoised:
        return denoised(predict(latents, times, condition), latents, level_of(process, times), process.parameterisation)

    def step(state: tuple[Array, Array], _: None):
        latents, times = state
        clean, noise = ask(latents, times)
        after = jnp.maximum(times - stride, 0.0)
        # An image at 0 has arrived: it is not told twice.
        moved = jnp.where(per_example(times, latents) > 0, add_noise(clean, noise, level_of(process, after)), latents)
        return (moved, after), None

    (latents, times), _ = jax.lax.scan(step, (latents.astype(jnp.float32), times), None, length=steps)
    return latents, times, ask(latents, times)


def noise_further(latents: Array, noise: Array, here: Level, after: Level) -> Array:
    """Latents at a level taken to a noisier one, float32 [N, ...]: a draw of q(x_after | x_here).

    Args:
      latents, noise: [N, ...].
      here, after: levels [N]; where `after` is no noisier nothing is added.
    """
    ratio = after.alpha / jnp.maximum(here.alpha, SMALLEST)
    variance = jnp.square(after.sigma) - jnp.square(here.sigma * ratio)
    return per_example(ratio, latents) * latents + per_example(jnp.sqrt(jnp.maximum(variance, 0.0)), noise) * noise


def self_npo_inputs(
    *,
    clean: Array,
    own_noise: Array,
    times: Array,
    condition: PyTree,
    process: Process,
    reference: Predict,
    key: Array,
    rollout_steps: int = 5,
    grid: int = 25,
    guidance: float = 0.0,
) -> Inputs:
    """Re-noised truncated samples of the reference, its estimate of their clean latents being the target.

    Args:
      clean: [N, ...], where rollouts start after noising; the policy is asked with their condition.
      own_noise: [N, ...] of the start.
      times: [N], moved up to the grid.
      condition: leaves [N, ...].
      process: what the models were trained to undo; gives the empty prompt.
      reference: the model that rolls out.
      key: of the levels s and their noise; of the batch, or keys [N].
      rollout_steps: K of a rollout.
      grid: number of the grid's levels over all timesteps.
      guidance: of the rollout: 0 is without the prompt, as published, and 1 with it.
    """
    last = FLOW_TIME if process.schedule is None else process.schedule.timesteps - 1
    stride = (last + (process.schedule is not None)) // grid
    offset = 0 if process.schedule is None else 1  # straight paths have levels up to 1000, schedules timesteps to 999
    start = jnp.minimum(stride * (1 + times // stride) - offset, last)
    rows = clean.shape[0]
    model, told = reference, condition
    if guidance == 0:
        told = empty_condition(process, condition)
    elif guidance != 1:
        model, told = guided(reference, guidance), Guidance(condition, empty_condition(process, condition))
    noised = add_noise(clean, own_noise, level_of(process, start))
    latents, here, said = truncated_rollout(model, noised, start, told, process, steps=rollout_steps, stride=stride)
    level_key, noise_key = split_keys(key, 2)
    share = jax.vmap(jax.random.uniform)(level_key) if of_examples(key) else jax.random.uniform(level_key, (rows,))
    after = here + (last - here) * share
    if process.schedule is not None:  # t + 1, ..., T - 1 alike
        after = jnp.minimum(here + 1 + jnp.floor(share * (last - here)), last)
    level = level_of(process, after)
    moved = noise_further(latents, normal(noise_key, latents.shape), level_of(process, here), level)
    target = prediction_target(said.clean, implied_noise(moved, said.clean, level), level, process.parameterisation)
    return jax.lax.stop_gradient(Inputs(moved, after, target, condition)._replace(guidance=0))._replace(guidance=1.0)


self_npo_velocity_inputs = self_npo_inputs


def self_npo_loss(
    *, policy_image_pred: Array, image_target: Array, alphas_cumprod: Array, sigmas: Array, huber: float = 1e-3
) -> LossOutput:
    """The loss of Self-NPO for models that predict the noise.

    Args:
      policy_image_pred, image_target: [B, ...] predicted noise, and that which the reference's clean latents imply.
      alphas_cumprod, sigmas: [B] of the level s.
      huber: below it errors are squared, above it absolute.

    Returns:
      loss float32 [B], a mean over elements; `clean_error` is the mean squared error of the clean latents.

    Raises:
      ValueError: huber not positive.
    """
    factor = sigmas / jnp.sqrt(jnp.maximum(alphas_cumprod, SMALLEST))
    return _huber(policy_image_pred, image_target, factor, huber)


def self_npo_velocity_loss(
    *, policy_image_pred: Array, image_target: Array, sigmas: Array, huber: float = 1e-3
) -> LossOutput:
    """The same for models that predict a velocity, of a schedule or of a straight path; arguments as above.

    Args:
      policy_image_pred, image_target: [B, ...].
      sigmas: [B] of the level s.
      huber: below it errors are squared, above it absolute.
    """
    return _huber(policy_image_pred, image_target, sigmas, huber)


def _huber(prediction: Array, target: Array, factor: Array, huber: float) -> LossOutput:
    require_positive(huber=huber)
    target = jax.lax.stop_gradient(target.astype(jnp.float32))
    factor = jax.lax.stop_gradient(per_example(factor, target))
    error = factor * (prediction.astype(jnp.float32) - target)
    axes = tuple(range(1, error.ndim))
    square = jnp.square(error)
    # d^2 / (sqrt(d^2 + c^2) + c): the difference of the roots would lose all digits of a small error.
    loss = jnp.mean(square / (jnp.sqrt(square + huber**2) + huber), axis=axes)
    return LossOutput(loss, {"clean_error": jax.lax.stop_gradient(jnp.mean(square, axis=axes))})

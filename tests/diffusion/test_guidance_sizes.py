"""Guidance in training leads away from the empty prompt, and not from the sizes that SDXL is told of an image."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.diffusion.errors import measure, noised_inputs
from dpo_jax.diffusion.methods.inversion_dpo import inversion_dpo_inputs
from dpo_jax.diffusion.methods.self_npo import self_npo_inputs
from dpo_jax.diffusion.process import Process
from dpo_jax.diffusion.schedule import predicts_noise, scaled_linear_schedule
from dpo_jax.diffusion.types import TextCondition

N = 3
KEYS = jax.random.split(jax.random.key(0), 5)
WHOLE = jnp.full((1, 6), 1.0)
EMPTY = TextCondition(jnp.zeros((1, 2, 4)), jnp.zeros((1, 5)), WHOLE)
PROCESS = Process(predicts_noise, scaled_linear_schedule(), empty=EMPTY)
CLEAN, NOISE = (jax.random.normal(key, (N, 8)) for key in KEYS[:2])
TIMES = jnp.array([30.0, 400.0, 800.0])
TOLD = TextCondition(
    jax.random.normal(KEYS[2], (N, 2, 4)), jax.random.normal(KEYS[3], (N, 5)), jax.random.uniform(KEYS[4], (N, 6))
)


def blind(latents, times, condition):
    """A model that sees sizes and no text."""
    return jnp.sin(latents + times[:, None] / 500) + condition.sizes.sum(-1, keepdims=True)


def reading(latents, times, condition):
    """A model that sees both."""
    return blind(latents, times, condition) + condition.states.sum((1, 2))[:, None] + condition.pooled.sum(-1)[:, None]


def errors_of(model, guidance):
    given = noised_inputs(clean=CLEAN, noise=NOISE, times=TIMES, condition=TOLD, process=PROCESS)
    return measure(model, given._replace(guidance=guidance), PROCESS, ("error",))["error"]


def inverted_by(model, guidance):
    given = inversion_dpo_inputs(
        clean=CLEAN, condition=TOLD, process=PROCESS, reference=model, trajectory_steps=3, guidance=guidance
    )
    return given.latents


def rolled_out_by(model, guidance):
    given = self_npo_inputs(
        clean=CLEAN,
        own_noise=NOISE,
        times=TIMES,
        condition=TOLD,
        process=PROCESS,
        reference=model,
        key=jax.random.key(1),
        rollout_steps=2,
        guidance=guidance,
    )
    return given.target


@pytest.mark.parametrize("said_by", [errors_of, inverted_by, rolled_out_by])
def test_a_model_that_reads_no_text_does_not_feel_guidance(said_by):
    run = partial(jax.jit, static_argnums=(0, 1))(said_by)
    scales = (0.0, 2.0) if said_by is rolled_out_by else (2.0,)
    for scale in scales:
        np.testing.assert_allclose(run(blind, scale), run(blind, 1.0), rtol=1e-4, atol=1e-5)
        assert np.abs(run(reading, scale) - run(reading, 1.0)).max() > 0.1

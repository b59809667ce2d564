"""Draws of noise levels: their distributions, the published levels of straight paths, and what a level is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.diffusion.process import (
    Process,
    draw_times,
    empty_condition,
    level_of,
    logit_normal_density,
    uniform_density,
)
from dpo_jax.diffusion.schedule import predicts_flow, predicts_noise, scaled_linear_schedule

SD = scaled_linear_schedule()
VP, FLOW = Process(predicts_noise, SD), Process(predicts_flow, shift=3.0)
COUNT = 100_000
KEY = jax.random.key(0)


def bounds(share):
    """Five standard errors of a share of COUNT draws."""
    return 5 * np.sqrt(share * (1 - share) / COUNT)


def test_timesteps_are_whole_and_uniform():
    times = np.asarray(draw_times(VP, KEY, (COUNT,)))
    assert times.dtype == np.float32 and np.array_equal(times, np.floor(times))
    assert times.min() == 0 and times.max() == 999
    shares = np.histogram(times, bins=10, range=(0, 1000))[0] / COUNT
    np.testing.assert_allclose(shares, 0.1, atol=bounds(0.1))
    assert len(np.unique(times)) == 1000


def test_levels_of_straight_paths_are_the_published_table():
    """A scheduler of a thousand timesteps shifts 1, 0.999, ..., 0.001 once; the model is told a thousand times that."""
    sigmas = np.arange(1000, 0, -1) / 1000
    table = 1000 * 3 * sigmas / (1 + 2 * sigmas)
    times = np.asarray(draw_times(Process(predicts_flow, shift=3.0, density=uniform_density), KEY, (COUNT,)))
    nearest = np.abs(times[:, None][:2000] - table).min(1)
    np.testing.assert_allclose(nearest, 0, atol=1e-3)
    assert len(np.unique(times)) == 1000
    assert times.max() == 1000 and times.min() == pytest.approx(table[-1], rel=1e-5)


def test_levels_of_straight_paths_are_logit_normal_before_the_shift():
    times = np.asarray(draw_times(FLOW, KEY, (COUNT,)), np.float64) / 1000
    plain = times / (3 - 2 * times)  # the shift undone
    for low, high, share in ((0, 0.5, 0.5), (0.2689414, 0.7310586, 0.6826895), (0.8807971, 1, 0.0227501)):
        inside = ((plain > low) & (plain <= high + 5e-4)).mean()
        assert abs(inside - share) < bounds(share) + 2e-3, (low, high)


def test_the_logit_normal_density_is_moved_and_widened():
    moved = functools.partial(logit_normal_density, mean=0.5, deviation=2.0)
    draws = np.asarray(moved(KEY, (COUNT,)), np.float64)
    logits = np.log(draws / (1 - draws))
    assert logits.mean() == pytest.approx(0.5, abs=0.04) and logits.std() == pytest.approx(2, abs=0.03)
    process = Process(predicts_flow, density=moved)
    assert draw_times(process, KEY, (COUNT,)).mean() == pytest.approx(1000 * draws.mean(), abs=1)
    with pytest.raises(ValueError, match="deviation"):
        logit_normal_density(KEY, (2,), deviation=0.0)


@pytest.mark.parametrize("process", [VP, FLOW], ids=["schedule", "flow"])
def test_a_density_is_the_share_of_the_way_to_noise(process):
    """Near 0 is nearly clean, near 1 nearly noise, whatever the process."""
    kept = dict(parameterisation=process.parameterisation, schedule=process.schedule)
    for share, low, high in ((0.0, 0.9, 1.0), (0.9999, 0.0, 0.1)):
        always = Process(**kept, density=lambda key, shape, share=share: jnp.full(shape, share))
        alpha = level_of(always, draw_times(always, KEY, (3,))).alpha
        assert np.all((low <= alpha) & (alpha <= high)), (share, alpha)


def test_densities_are_inside_the_unit_interval():
    """A float32 sigmoid may round to 1: there the last level is drawn, not one that does not exist."""
    for density in (uniform_density, logit_normal_density):
        draws = density(KEY, (1000,))
        assert draws.min() >= 0 and draws.max() <= 1
    for process in (VP, FLOW):
        edge = Process(process.parameterisation, process.schedule, density=lambda key, shape: jnp.ones(shape))
        times = draw_times(edge, KEY, (2,))
        assert np.all(times <= 1000) and np.all(level_of(edge, times).sigma > 0.9)


def test_drawn_timesteps_are_mapped():
    four = Process(predicts_noise, SD, timestep_map=lambda t: jnp.floor(t / 250) * 250 + 249)
    times, counts = np.unique(np.asarray(draw_times(four, KEY, (COUNT,))), return_counts=True)
    np.testing.assert_array_equal(times, [249, 499, 749, 999])
    np.testing.assert_allclose(counts / COUNT, 0.25, atol=bounds(0.25))


def test_level_of_timesteps():
    times = jnp.array([[0.0, 400.0], [999.0, 17.0]])
    alpha, sigma = level_of(VP, times)
    abar = SD.alphas_cumprod[np.asarray(times, int)]
    np.testing.assert_allclose(alpha, np.sqrt(abar), rtol=1e-6)
    np.testing.assert_allclose(sigma, np.sqrt(1 - abar), rtol=1e-6)
    alpha, sigma = level_of(FLOW, times)
    np.testing.assert_allclose(sigma, times / 1000, rtol=1e-6)
    np.testing.assert_allclose(alpha + sigma, 1, rtol=1e-6)


def test_the_empty_prompt_is_repeated_and_missed():
    empty = {"states": jnp.arange(6.0).reshape(1, 2, 3), "pooled": jnp.array([[7.0]])}
    told = jax.tree.map(lambda leaf: jnp.ones((4, *leaf.shape[1:])), empty)
    given = empty_condition(Process(predicts_noise, SD, empty=empty), told)
    np.testing.assert_array_equal(given["states"], np.tile(empty["states"], (4, 1, 1)))
    assert given["pooled"].shape == (4, 1)
    with pytest.raises(ValueError, match="empty prompt"):
        empty_condition(VP, told)

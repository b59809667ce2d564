"""Pools of candidates: which pairs they give, how often the model is asked; a random next state changes nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_models import MEAN, SPREAD, gaussian_model

from dpo_jax.diffusion.pools import follow_best, follow_random, pair_rows, pool_rollout, select_pairs
from dpo_jax.diffusion.sampler import sample
from dpo_jax.diffusion.schedule import leading_timesteps, level_at, linear_schedule, predicts_noise
from dpo_jax.diffusion.transitions import ddim_steps, take_steps

SCHEDULE = linear_schedule()
STEPS = ddim_steps(SCHEDULE, leading_timesteps(6), eta=1.0)
MODEL = gaussian_model(SCHEDULE, predicts_noise)
N, K, START = 5, 3, 2


def score(clean, times, condition):
    return clean.sum(-1)


def roll(key=0, *, model=MODEL, latents=None, steps=STEPS, condition=None, candidates=K, start=START, **options):
    latents = jax.random.normal(jax.random.key(7), (N, 2)) if latents is None else latents
    options = dict(score=score, threshold=0.0, follow=follow_random) | options
    return pool_rollout(
        model, latents, steps, condition, parameterisation=predicts_noise, key=jax.random.key(key),
        candidates=candidates, start=start, **options,
    )  # fmt: skip


def test_selection():
    scores = jnp.array([[0.0, 2.0, 1.0], [1.0, 1.0, 1.0], [0.3, 0.1, 0.0]])
    choice = select_pairs(scores, threshold=0.3)
    assert choice.chosen.tolist() == [1, 0, 0] and choice.rejected.tolist() == [0, 0, 2]
    np.testing.assert_array_equal(choice.valid, [1, 0, 0])
    np.testing.assert_array_equal(select_pairs(scores + 50.0, threshold=0.3).valid, choice.valid)
    np.testing.assert_array_equal(select_pairs(scores * 10, threshold=0.3).valid, [1, 0, 1])
    np.testing.assert_array_equal(select_pairs(scores).valid, [1, 0, 1])
    ends = np.exp(np.float64(scores)[:, [1, 0]])  # of two scores: difference of the softmax is tanh of half the gap
    softmax = ends / ends.sum(-1, keepdims=True)
    gap = np.float64(scores[:, 1] - scores[:, 0])
    np.testing.assert_allclose(softmax[:, 0] - softmax[:, 1], np.tanh(gap / 2), atol=1e-12)


def test_pairs_are_steps_of_the_policy_from_one_state():
    out = roll()
    pairs, count = out.pairs, len(STEPS.time) - START
    assert pairs.before.shape == (N, count, 2) and pairs.scores.shape == (N, count, K)
    steps = jax.tree.map(jnp.asarray, take_steps(STEPS, slice(START, None)))
    for i in range(count):
        step = take_steps(steps, i)
        mean, std = ddim_mean(pairs.before[:, i], float(step.time))
        assert np.allclose(std, step.std, rtol=1e-5)
        for after in (pairs.chosen[:, i], pairs.rejected[:, i]):
            assert np.abs((after - mean) / std).max() < 5
    gap = pairs.scores.max(-1) - pairs.scores.min(-1)
    np.testing.assert_array_equal(pairs.valid, gap > 0)


def ddim_mean(x, time):
    """Posterior of DDPM between neighbouring times of the grid, float64."""
    grid = np.asarray(STEPS.time).astype(int)
    place = int(np.flatnonzero(grid == time)[0])
    here = SCHEDULE.alphas_cumprod[grid[place]]
    after = SCHEDULE.alphas_cumprod[grid[place + 1]] if place + 1 < len(grid) else SCHEDULE.alphas_cumprod[0]
    eps = np.float64(MODEL(x, jnp.full(len(x), time), None))
    clean = (np.float64(x) - np.sqrt(1 - here) * eps) / np.sqrt(here)
    variance = (1 - after) / (1 - here) * (1 - here / after)
    return np.sqrt(after) * clean + np.sqrt(1 - after - variance) * eps, np.sqrt(variance)


def test_scores_are_of_the_prediction_at_the_next_level_and_the_last_ones_of_the_points():
    """The chosen candidate's score, computed anew from the state that was kept."""
    pairs = roll().pairs
    steps = jax.tree.map(jnp.asarray, take_steps(STEPS, slice(START, None)))
    for i in range(len(STEPS.time) - START):
        for after, best in ((pairs.chosen[:, i], jnp.max), (pairs.rejected[:, i], jnp.min)):
            clean = after
            if i + 1 < len(STEPS.time) - START:
                level = level_at(SCHEDULE, jnp.int32(steps.time[i + 1]))
                clean = (after - level.sigma * MODEL(after, jnp.full(N, steps.time[i + 1]), None)) / level.alpha
            np.testing.assert_allclose(clean.sum(-1), best(pairs.scores[:, i], axis=-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("follow", [follow_random, follow_best])
def test_the_next_state_is_one_of_the_pool(follow):
    out = roll(follow=follow, candidates=2)
    before, chosen, rejected = (np.asarray(x) for x in out.pairs[:3])
    following = np.concatenate([before[:, 1:], np.asarray(out.latents)[:, None]], axis=1)
    best = np.isclose(following, chosen).all(-1)
    worst = np.isclose(following, rejected).all(-1)
    assert (best | worst).all() and best.any() and worst.any() == (follow is follow_random)


def test_a_random_next_state_leaves_the_distribution_as_it_is():
    latents = jax.random.normal(jax.random.key(0), (20_000, 1))
    pooled = jax.jit(lambda x: roll(3, latents=x, candidates=4, start=1).latents)(latents)
    plain = sample(MODEL, latents, STEPS, parameterisation=predicts_noise, key=jax.random.key(5)).latents
    best = jax.jit(lambda x: roll(3, latents=x, candidates=4, start=1, follow=follow_best).latents)(latents)
    error = SPREAD / np.sqrt(20_000)
    assert abs(pooled.mean() - plain.mean()) < 6 * error and abs(pooled.std() / plain.std() - 1) < 0.03
    assert abs(plain.mean() - MEAN) < 0.1 and best.mean() > plain.mean() + 10 * error


@pytest.mark.parametrize(("candidates", "start"), [(2, 0), (4, 2), (3, 5)])
def test_number_of_model_calls(candidates, start):
    calls = []

    def counted(latents, times, condition):
        jax.debug.callback(lambda: calls.append(len(latents)))
        return MODEL(latents, times, condition)

    jax.block_until_ready(roll(model=counted, candidates=candidates, start=start).latents)
    jax.effects_barrier()
    assert sum(calls) == N * (start + (len(STEPS.time) - start - 1) * candidates + 1)


def test_conditions_and_grids_belong_to_their_rows():
    """Each row's condition shifts the model, and the score sees it too."""
    told = jnp.array([-3.0, 0.0, 3.0, 6.0, 9.0])

    def model(latents, times, condition):
        return MODEL(latents, times, None) - 0.2 * condition[:, None]

    def toward(clean, times, condition):
        return -jnp.square(clean - condition[:, None]).sum(-1)

    out = roll(model=model, condition=told, score=toward)
    alone = [
        roll(model=model, condition=told[i : i + 1], score=toward, latents=out.pairs.before[i : i + 1, 0])
        for i in (0, 4)
    ]
    assert [bool(a.pairs.scores.shape == (1, 4, K)) for a in alone] == [True, True]
    assert (jnp.diff(out.latents.mean(-1)) > 0).all()


def test_rows_of_pairs():
    pairs, told = roll(condition=None).pairs, jnp.arange(N)
    pairs = pairs._replace(valid=pairs.valid.at[2, 1].set(0.0))
    steps = take_steps(STEPS, slice(START, None))
    batch = pair_rows(pairs, steps, told)
    count = len(STEPS.time) - START
    assert batch.latents.shape == (N * count, 2, 2, 2) and batch.steps.time.shape == (N * count, 1)
    row = 2 * count + 1
    np.testing.assert_array_equal(batch.latents[row, 0], jnp.stack([pairs.before[2, 1], pairs.chosen[2, 1]]))
    np.testing.assert_array_equal(batch.latents[row, 1], jnp.stack([pairs.before[2, 1], pairs.rejected[2, 1]]))
    assert batch.condition[row, 0] == 2 and batch.weight[row] == 0 and batch.steps.time[row, 0] == steps.time[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(candidates=1), "1 candidates"),
        (dict(start=6), "from step 6 of 6"),
        (dict(steps=ddim_steps(SCHEDULE, leading_timesteps(6))), "stochastic table"),
    ],
)
def test_what_is_no_pool_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        roll(**options)


def test_a_refined_candidate_is_kept_and_followed():
    up = functools.partial(lambda chosen, reward, std: chosen + 0.25)
    out = roll(refine=up, follow=follow_best)
    following = jnp.concatenate([out.pairs.before[:, 1:], out.latents[:, None]], axis=1)
    np.testing.assert_allclose(following, out.pairs.chosen, rtol=1e-6)
    plain = roll(follow=follow_best)
    np.testing.assert_allclose(out.pairs.chosen[:, 0], plain.pairs.chosen[:, 0] + 0.25, rtol=1e-6)

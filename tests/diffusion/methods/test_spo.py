"""SPO against float64 NumPy: the pair's loss, its direction, the preference model's loss, and turns beside D3PO's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from four_modes import DIFFUSION, STEPS, learn, noise, reward, score
from numeric import central_differences, float32, gradients, softplus
from test_d3po import arrays, log_ratios
from test_d3po import turn as d3po_turn

from dpo_jax.diffusion.methods import d3po_loss, spo_loss
from dpo_jax.diffusion.methods.spo import feature_scores, preference_divergence, spo_rollout
from dpo_jax.diffusion.pools import pair_rows
from dpo_jax.diffusion.schedule import predicts_noise
from dpo_jax.diffusion.step_objectives import from_step_loss
from dpo_jax.diffusion.types import Step, TrajectoryBatch


def pairs(seed=0, spread=0.06):
    inputs = arrays(seed, spread)
    inputs.pop("preference")
    return inputs


def numpy_spo(a, beta, ratio_clip):
    first, second = (np.log(np.clip(np.exp(d), 1 - ratio_clip, 1 + ratio_clip)) for d in log_ratios(a))
    return softplus(-beta * (first - second)).mean(-1)


@pytest.mark.parametrize(("beta", "ratio_clip"), [(10.0, 0.1), (2.0, 1.5)])
def test_value_and_gradient_against_the_formula(beta, ratio_clip):
    inputs, options = pairs(), dict(beta=beta, ratio_clip=ratio_clip)
    formula = functools.partial(numpy_spo, **options)
    np.testing.assert_allclose(spo_loss(**float32(inputs), **options).loss, formula(inputs), rtol=5e-6)
    for name, gradient in gradients(functools.partial(spo_loss, **options), inputs).items():
        np.testing.assert_allclose(gradient, central_differences(formula, inputs, name), rtol=1e-3, atol=1e-5)


def test_it_is_d3po_where_the_chosen_one_is_preferred():
    inputs = float32(pairs())
    one = {"preference": jnp.ones(len(inputs["policy_chosen_step_logps"]))}
    here, there = spo_loss(**inputs, beta=3.0), d3po_loss(**inputs, **one, beta=3.0)
    np.testing.assert_allclose(here.loss, there.loss, rtol=1e-6)
    np.testing.assert_allclose(here.metrics["margin"], there.metrics["margin"], rtol=1e-6)


@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_the_gradient_in_the_mean_points_from_loser_to_winner(shift):
    """Wherever the mean is, by a model whose prediction is a free array and a table whose mean is the prediction."""
    rng = np.random.default_rng(0)
    state, better, worse = (jnp.asarray(rng.normal(size=(1, 1, 1, 3)), jnp.float32) for _ in range(3))
    latents = jnp.concatenate([jnp.concatenate([state, after], axis=2) for after in (better, worse)], axis=1)
    one = jnp.ones((1, 1))
    steps = Step(time=one, alpha=one * 0.6, sigma=one * 0.8, clean=0 * one, noise=one, std=0.5 * one)
    batch = TrajectoryBatch(latents, steps, None, jnp.ones(1), {})
    objective = from_step_loss(spo_loss, DIFFUSION, ratio_clip=np.inf, beta=2.0, shared_state=True)

    def loss(mean):
        return objective(lambda x, t, c: mean, lambda x, t, c: 0 * x, batch, jax.random.key(0)).loss.sum()

    mean = jnp.full((1, 3), shift)
    difference = (better - worse)[0, 0]
    z = 2.0 / (0.25 * 3) * jnp.sum(mean * difference)  # of equal deviations the log-ratios differ in the cross term
    wanted = -jax.nn.sigmoid(-z) * 2.0 * difference / (0.25 * 3)
    np.testing.assert_allclose(jax.grad(loss)(mean), wanted, rtol=2e-4, atol=1e-6)


def test_the_preference_models_loss():
    scores = np.array([[1.0, 0.2], [0.3, 0.3], [-1.0, 2.0], [5.0, 5.5]])
    share = np.array([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0], [0.5, 0.5]])
    logs = scores - np.logaddexp(*scores.T)[:, None]
    expected = -(share * logs).sum(-1) - np.where((share == 0.5).all(-1), np.log(2), 0.0)
    got = preference_divergence(jnp.float32(scores), jnp.float32(share))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)
    assert got[1] == 0 and got[3] > 0
    slope = jax.grad(lambda s: preference_divergence(s, jnp.float32(share)).sum())(jnp.float32(scores))
    np.testing.assert_allclose(slope, np.exp(logs) - share, rtol=1e-5, atol=1e-6)
    images, text = jnp.array([[3.0, 0.0], [1.0, 1.0]]), jnp.array([2.0, 0.0])
    np.testing.assert_allclose(
        feature_scores(images, jnp.tile(text, (2, 1)), np.log(100.0)), [100, 100 / np.sqrt(2)], rtol=1e-5
    )


def spo_turn(model, key):
    start, draws = jax.random.split(key)
    out = spo_rollout(
        model, noise(start), STEPS, parameterisation=predicts_noise, score=score, key=draws, candidates=2, start=0,
        threshold=0.0,
    )  # fmt: skip
    return pair_rows(out.pairs, STEPS), reward(out.latents)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_pairs_of_steps_learn_more_than_labels_of_final_images_from_as_many_samples(seed):
    options = dict(beta=1.0, ratio_clip=np.inf)
    steps = from_step_loss(spo_loss, DIFFUSION, shared_state=True, **options)
    finals = from_step_loss(d3po_loss, DIFFUSION, **options)
    by_steps = learn(steps, spo_turn, turns=30, batches=4, seed=seed)[1]
    by_finals = learn(finals, d3po_turn, turns=30, batches=4, seed=seed)[1]
    assert by_steps[-3:].mean() > by_finals[-3:].mean() + 3 and by_finals[-3:].mean() > by_finals[:3].mean()


def test_a_turn_with_the_papers_options_moves_the_policy():
    def turn(model, key):
        start, draws = jax.random.split(key)
        out = spo_rollout(model, noise(start, 64), STEPS, parameterisation=predicts_noise, score=score, key=draws)
        return pair_rows(out.pairs, jax.tree.map(lambda table: table[4:], STEPS)), reward(out.latents)

    params, _ = learn(from_step_loss(spo_loss, DIFFUSION, shared_state=True), turn, turns=2)
    assert np.abs(params[-1]["kernel"]).max() > 1e-5

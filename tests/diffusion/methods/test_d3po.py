"""D3PO against float64 NumPy: value, gradient, the trusted interval, ties, and pairs made of scores."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from four_modes import DIFFUSION, STEPS, initial, learn, noise, reward
from numeric import central_differences, float32, gradients, sigmoid, softplus

from dpo_jax.diffusion.methods import d3po_loss
from dpo_jax.diffusion.methods.d3po import pairs_from_scores, pareto_preference
from dpo_jax.diffusion.sampler import sample
from dpo_jax.diffusion.schedule import predicts_noise
from dpo_jax.diffusion.step_objectives import from_step_loss
from dpo_jax.diffusion.trajectories import trajectory_rows

B, S = 6, 4
NAMES = [f"{of}_{side}_step_logps" for of in ("policy", "reference") for side in ("chosen", "rejected")]


def arrays(seed=0, spread=0.06):
    """Log-ratios on both sides of the interval's ends, away from them, and every label."""
    rng = np.random.default_rng(seed)
    inputs = {name: -1.0 - rng.gamma(2.0, 0.2, (B, S)) for name in NAMES[2:]}
    for side in ("chosen", "rejected"):
        inputs[f"policy_{side}_step_logps"] = inputs[f"reference_{side}_step_logps"] + rng.normal(0, spread, (B, S))
    return inputs | {"preference": np.tile([1, -1, 0], B // 3)}


def log_ratios(a):
    return [a[f"policy_{side}_step_logps"] - a[f"reference_{side}_step_logps"] for side in ("chosen", "rejected")]


def numpy_d3po(a, beta, ratio_clip):
    first, second = (np.log(np.clip(np.exp(d), 1 - ratio_clip, 1 + ratio_clip)) for d in log_ratios(a))
    return softplus(-beta * a["preference"][:, None] * (first - second)).mean(-1)


@pytest.mark.parametrize(("beta", "ratio_clip"), [(0.1, 0.1), (10.0, 0.05), (3.0, 1.5)])
@pytest.mark.parametrize("seed", [0, 1])
def test_value_and_gradient_against_the_formula(beta, ratio_clip, seed):
    inputs, options = arrays(seed), dict(beta=beta, ratio_clip=ratio_clip)
    formula = functools.partial(numpy_d3po, **options)
    np.testing.assert_allclose(d3po_loss(**float32(inputs), **options).loss, formula(inputs), rtol=2e-6)
    for name, gradient in gradients(functools.partial(d3po_loss, **options), inputs).items():
        np.testing.assert_allclose(gradient, central_differences(formula, inputs, name), rtol=1e-3, atol=1e-6)


def test_where_policy_is_reference():
    inputs, beta = arrays(spread=0.0), 0.7
    assert np.allclose(d3po_loss(**float32(inputs), beta=beta).loss, np.log(2), rtol=1e-6)
    slope = gradients(functools.partial(d3po_loss, beta=beta), inputs)
    wanted = -0.5 * beta / S * np.tile(inputs["preference"][:, None], S)
    np.testing.assert_allclose(slope["policy_chosen_step_logps"], wanted, rtol=1e-5)
    np.testing.assert_allclose(slope["policy_rejected_step_logps"], -wanted, rtol=1e-5)


def test_a_tie_teaches_nothing():
    inputs = arrays() | {"preference": np.zeros(B, int)}
    np.testing.assert_allclose(d3po_loss(**float32(inputs), beta=50.0).loss, np.log(2), rtol=1e-6)
    for name, value in gradients(functools.partial(d3po_loss, beta=50.0), inputs).items():
        np.testing.assert_array_equal(value, 0.0, err_msg=name)


def test_beyond_the_interval_one_side_rests_and_the_other_moves():
    inputs = arrays(spread=0.0)
    inputs["policy_chosen_step_logps"] = inputs["reference_chosen_step_logps"] + np.array([0.2, -0.2, 90.0, -90.0])
    inputs["preference"] = np.ones(B, int)
    slope = gradients(d3po_loss, inputs)
    np.testing.assert_array_equal(slope["policy_chosen_step_logps"], 0.0)
    assert (slope["policy_rejected_step_logps"] > 0).all()
    np.testing.assert_allclose(d3po_loss(**float32(inputs)).metrics["clip_share"], 0.5)


def test_swapping_images_and_label_changes_nothing():
    inputs = float32(arrays())
    swapped = {name: inputs[name.replace("chosen", "x").replace("rejected", "chosen").replace("x", "rejected")]
               for name in NAMES} | {"preference": -inputs["preference"]}  # fmt: skip
    here, there = d3po_loss(**inputs), d3po_loss(**swapped)
    np.testing.assert_allclose(there.loss, here.loss, rtol=1e-6)
    for name in ("chosen_reward", "rejected_reward", "clip_share"):
        decided = inputs["preference"] != 0
        np.testing.assert_allclose(there.metrics[name][decided], here.metrics[name][decided], rtol=1e-5)


def test_a_flipped_label_differs_by_the_margin():
    inputs = float32(arrays() | {"preference": np.ones(B, int)})
    right, wrong = (d3po_loss(**inputs | {"preference": sign * inputs["preference"]}, beta=5.0) for sign in (1, -1))
    np.testing.assert_allclose(right.loss - wrong.loss, -right.metrics["margin"], rtol=1e-4, atol=1e-6)


def test_without_the_clip_it_is_dpo_on_sums_with_beta_times_the_elements():
    inputs, elements = arrays(spread=1.0) | {"preference": np.ones(B, int)}, 12
    one = {name: value[:, :1] if value.ndim == 2 else value for name, value in inputs.items()}
    u, v = (elements * d[:, 0] for d in log_ratios(one))
    got = d3po_loss(**float32(one), beta=0.3 * elements, ratio_clip=np.inf).loss
    np.testing.assert_allclose(got, softplus(-0.3 * (u - v)), rtol=1e-5)


def test_bounds_at_the_defaults():
    far = arrays(spread=0.0)
    for sign in (1, -1):
        far["policy_chosen_step_logps"] = far["reference_chosen_step_logps"] + 1e3 * sign
        far["policy_rejected_step_logps"] = far["reference_rejected_step_logps"] - 1e3 * sign
        z = 0.1 * np.log(1.1 / 0.9) * sign * far["preference"]
        np.testing.assert_allclose(d3po_loss(**float32(far)).loss, softplus(-z), rtol=1e-6)
    assert sigmoid(0.1 * np.log(1.1 / 0.9)) < np.exp(-0.6827) and sigmoid(-0.1 * np.log(1.1 / 0.9)) > np.exp(-0.7038)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_no_interval_is_refused(value):
    with pytest.raises(ValueError, match="ratio_clip is"):
        d3po_loss(**float32(arrays()), ratio_clip=value)


def test_pairs_are_all_but_the_ties():
    scores = np.array([0.2, 0.9, 0.2, -1.0, 0.5, 0.9, 0.7])
    pairs = pairs_from_scores(scores)
    assert len(pairs) == 7 * 6 // 2 - 2 and len({frozenset(p) for p in pairs.tolist()}) == len(pairs)
    assert (scores[pairs[:, 0]] > scores[pairs[:, 1]]).all()
    assert pairs_from_scores(np.ones(3)).shape == (0, 2)


def test_pareto_preference():
    first = jnp.array([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0], [1.0, 2.0], [0.0, 2.0]])
    second = jnp.array([[0.0, 2.0], [1.0, 2.0], [2.0, 1.0], [1.0, 3.0], [0.0, 1.0]])
    np.testing.assert_array_equal(pareto_preference(first, second), [1, 0, 0, -1, 1])
    np.testing.assert_array_equal(pareto_preference(second, first), [-1, 0, 0, 1, -1])


def turn(model, key):
    """Two images from one noise, and which of them has the higher reward."""
    start, draws = jax.random.split(key)
    twins = jnp.repeat(noise(start, 128), 2, axis=0)
    out = sample(model, twins, STEPS, parameterisation=predicts_noise, key=draws, record=(0, len(STEPS.time)))
    assert out.trajectory is not None
    rewards = reward(out.latents)
    columns = {"preference": jnp.sign(rewards[::2] - rewards[1::2])}
    return trajectory_rows(out.trajectory, STEPS, images=2, columns=columns), rewards


@pytest.mark.parametrize("seed", [0, 1])
def test_turns_of_sampling_judging_and_training_raise_the_reward(seed):
    objective = from_step_loss(d3po_loss, DIFFUSION, beta=1.0, ratio_clip=np.inf)
    params, rewards = learn(objective, turn, turns=25, batches=4, seed=seed)
    assert rewards[-5:].mean() > rewards[:5].mean() + 1.0
    moved = jax.tree.map(lambda new, old: np.abs(new - old).max(), params, initial(seed))
    assert all(change > 1e-4 for change in jax.tree.leaves(moved))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_trusted_interval_holds_the_policy_near_the_reference(seed):
    """At a rate fifteen times as large the policy without it goes astray, as the clip's purpose says."""
    held, free = (
        learn(
            from_step_loss(d3po_loss, DIFFUSION, beta=1.0, ratio_clip=clip),
            turn,
            turns=25,
            batches=4,
            rate=5e-3,
            seed=seed,
        )[1]
        for clip in (0.1, np.inf)
    )
    assert held[-5:].mean() > free[-5:].mean() + 2

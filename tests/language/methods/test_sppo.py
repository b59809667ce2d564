"""SPPO against float64 NumPy written from the formulas, its targets, and the game that it plays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.language.methods.sppo import (
    sppo_exact_step,
    sppo_hard_loss,
    sppo_loss,
    sppo_single_loss,
    sppo_targets,
    win_probabilities,
)

B, T = 5, 6
POLICY = ("policy_chosen_logps", "policy_rejected_logps")


def pairs(seed=0):
    rng = np.random.default_rng(seed)
    arrays = {}
    for side in ("chosen", "rejected"):
        arrays[f"reference_{side}_logps"] = -rng.gamma(2.0, 0.8, (B, T))
        arrays[f"policy_{side}_logps"] = arrays[f"reference_{side}_logps"] - rng.normal(0, 0.5, (B, T))
        arrays[f"{side}_mask"] = (np.arange(T) < rng.integers(1, T + 1, (B, 1))).astype(float)
        arrays[f"{side}_win_prob"] = rng.uniform(0, 1, B)
    return {**arrays, "label_prob": rng.uniform(0, 1, B)}


NAMES = [n for n in pairs() if not n.endswith("prob")]
COLUMNS = {sppo_loss: ["chosen_win_prob", "rejected_win_prob"], sppo_single_loss: ["label_prob"], sppo_hard_loss: []}


def ratios(a):
    return [
        ((a[f"policy_{s}_logps"] - a[f"reference_{s}_logps"]) * a[f"{s}_mask"]).sum(-1) for s in ("chosen", "rejected")
    ]


def numpy_sppo(a, beta):
    u, v = ratios(a)
    win, lose = a["chosen_win_prob"], a["rejected_win_prob"]
    return 0.5 * ((u - (win - 0.5) / beta) ** 2 + (v - (lose - 0.5) / beta) ** 2)


def numpy_single(a, beta):
    u, v = ratios(a)
    target = (a["label_prob"] - 0.5) / beta
    return 0.5 * ((u - target) ** 2 + (v + target) ** 2)


def numpy_hard(a, beta):
    u, v = ratios(a)
    return (u - 1 / (2 * beta)) ** 2 + (v + 1 / (2 * beta)) ** 2


@functools.cache
def compiled(loss, options):
    def total(policy, rest):
        output = loss(**policy, **rest, **dict(options))
        return output.loss.sum(), output

    return jax.jit(jax.grad(total, has_aux=True))


def evaluate(loss, arrays, **options):
    inputs = {n: np.asarray(arrays[n], np.float32) for n in [*NAMES, *COLUMNS[loss]]}
    policy = {n: inputs.pop(n) for n in POLICY}
    gradient, output = jax.device_get(compiled(loss, tuple(options.items()))(policy, inputs))
    return output, gradient


@pytest.mark.parametrize(
    ("loss", "formula", "beta"),
    [(sppo_loss, numpy_sppo, 0.2), (sppo_single_loss, numpy_single, 0.3), (sppo_hard_loss, numpy_hard, 0.5)],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_value_and_gradient_against_the_formula(loss, formula, beta, seed):
    arrays = pairs(seed)
    output, gradient = evaluate(loss, arrays, beta=beta)
    np.testing.assert_allclose(output.loss, formula(arrays, beta), rtol=1e-5, atol=1e-6)
    for name in POLICY:
        numeric, step = np.zeros((B, T)), 1e-5
        for place in np.ndindex(B, T):
            up, down = arrays[name].copy(), arrays[name].copy()
            up[place] += step
            down[place] -= step
            difference = formula({**arrays, name: up}, beta) - formula({**arrays, name: down}, beta)
            numeric[place] = difference.sum() / (2 * step)
        np.testing.assert_allclose(gradient[name], numeric, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("loss", "formula"), [(sppo_loss, numpy_sppo), (sppo_single_loss, numpy_single), (sppo_hard_loss, numpy_hard)]
)
def test_the_default_is_one_thousandth(loss, formula):
    arrays = pairs(2)
    np.testing.assert_allclose(evaluate(loss, arrays)[0].loss, formula(arrays, 1e-3), rtol=1e-5)


def at_reference(arrays, **columns):
    same = {f"policy_{s}_logps": arrays[f"reference_{s}_logps"] for s in ("chosen", "rejected")}
    return {**arrays, **same, **{n: np.full(B, p) for n, p in columns.items()}}


def test_a_tie_at_the_reference_is_at_rest():
    arrays = at_reference(pairs(), chosen_win_prob=0.5, rejected_win_prob=0.5, label_prob=0.5)
    for loss in (sppo_loss, sppo_single_loss):
        output, gradient = evaluate(loss, arrays)
        assert not np.any(output.loss) and not any(np.any(g) for g in gradient.values())
    arrays = at_reference(pairs(), chosen_win_prob=0.9, rejected_win_prob=0.2)
    np.testing.assert_allclose(evaluate(sppo_loss, arrays, beta=0.1)[0].loss, 50 * (0.4**2 + 0.3**2), rtol=1e-5)


def test_each_answer_is_fitted_by_itself():
    """The chosen answer's gradient is its own residual at every token, whatever the rejected one does (unlike DPO)."""
    arrays, beta = pairs(), 0.25
    u, _ = ratios(arrays)
    residual = u - (arrays["chosen_win_prob"] - 0.5) / beta
    other = pairs(7)
    mixed = {n: other[n] if "rejected" in n else v for n, v in arrays.items()}
    for a in (arrays, mixed):
        gradient = evaluate(sppo_loss, a, beta=beta)[1]["policy_chosen_logps"]
        np.testing.assert_allclose(gradient, residual[:, None] * arrays["chosen_mask"], rtol=1e-4, atol=1e-5)


def test_members_meet():
    arrays, beta = pairs(), 0.3
    p = arrays["label_prob"]
    soft = evaluate(sppo_loss, {**arrays, "chosen_win_prob": p, "rejected_win_prob": 1 - p}, beta=beta)[0]
    np.testing.assert_allclose(evaluate(sppo_single_loss, arrays, beta=beta)[0].loss, soft.loss, rtol=1e-5)
    sure = evaluate(sppo_single_loss, {**arrays, "label_prob": np.ones(B)}, beta=beta)[0].loss
    np.testing.assert_allclose(evaluate(sppo_hard_loss, arrays, beta=beta)[0].loss, 2 * sure, rtol=1e-6)


# Targets


def test_win_probabilities_against_loops():
    rng = np.random.default_rng(0)
    scores, there = rng.normal(0, 2, (6, 5)), rng.random((6, 5)) < 0.8
    there[0], there[-1] = True, False
    pair, win = win_probabilities(jnp.asarray(np.where(there, scores, np.nan)), jnp.asarray(there))
    for row in range(6):
        here = np.flatnonzero(there[row])
        table = 1 / (1 + np.exp(scores[row][None, here] - scores[row][here, None]))
        np.testing.assert_allclose(np.asarray(pair)[row][np.ix_(here, here)], table, rtol=1e-5)
        if here.size:
            np.testing.assert_allclose(np.asarray(win)[row, here], table.mean(1), rtol=1e-5)
        assert not np.any(np.asarray(win)[row, ~there[row]])
        assert np.sum(win[row]) == pytest.approx(here.size / 2, rel=1e-5)


def test_targets_are_the_best_and_the_worst():
    scores = jnp.array([[0.0, 2.0, -1.0, 2.0], [3.0, 3.0, 3.0, 3.0], [5.0, 1.0, 0.0, 9.0], [4.0, 0.0, 0.0, 0.0]])
    there = jnp.array([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    targets = sppo_targets(scores, there)
    np.testing.assert_array_equal(targets.chosen, [1, 0, 0, 0])
    np.testing.assert_array_equal(targets.rejected, [2, 0, 1, 0])
    np.testing.assert_array_equal(targets.keep, [1, 0, 1, 0])

    def beats(d):
        return 1 / (1 + np.exp(-d))

    np.testing.assert_allclose(targets.label_prob[:3], [beats(3), 0.5, beats(4)], rtol=1e-5)
    np.testing.assert_allclose(targets.chosen_win_prob[0], np.mean([beats(2), 0.5, beats(3), 0.5]), rtol=1e-5)
    np.testing.assert_allclose(targets.rejected_win_prob[2], (beats(-4) + 0.5) / 2, rtol=1e-5)
    np.testing.assert_allclose(targets.chosen_win_prob[1], 0.5)


# The game


def duality_gap(policy, preference):
    """max_y P(y > pi) - min_y P(pi > y): zero at the Nash policy only."""
    return np.max(preference @ policy) - np.min(policy @ preference)


def test_exact_step_against_the_formula():
    rng = np.random.default_rng(1)
    policy = rng.dirichlet(np.ones(4))
    upper = np.triu(rng.uniform(0, 1, (4, 4)), 1)
    preference = upper + np.tril(1 - upper.T, -1) + np.eye(4) / 2
    expected = policy * np.exp(3.0 * (preference @ policy))
    step = sppo_exact_step(jnp.log(policy), jnp.asarray(preference, jnp.float32), eta=3.0)
    np.testing.assert_allclose(np.exp(step), expected / expected.sum(), rtol=1e-5)


def test_self_play_on_average_finds_the_nash_policy_of_a_cycle():
    """Five arms, each beating the next two: best responses cycle, the mean of SPPO's iterates loses to no arm."""
    wins = (np.subtract.outer(np.arange(5), np.arange(5)) % 5 >= 3).astype(float)  # i beats i + 1 and i + 2
    preference = 0.8 * wins + 0.2 * wins.T + np.eye(5) / 2
    start = jnp.log(jnp.array([0.6, 0.2, 0.1, 0.05, 0.05]))

    def step(log_probs, _):
        after = sppo_exact_step(log_probs, jnp.asarray(preference, jnp.float32), eta=0.2)
        return after, jnp.exp(after)

    _, policies = jax.lax.scan(step, start, None, length=2000)
    policies = np.asarray(policies, float)
    np.testing.assert_allclose(policies.sum(-1), 1.0, rtol=1e-5)
    assert duality_gap(np.exp(start), preference) > 0.3
    assert duality_gap(policies.mean(0), preference) < 0.02
    best_response, answers = 0, set()
    for _ in range(10):
        best_response = int(np.argmax(preference[:, best_response]))
        answers.add(best_response)
    assert len(answers) > 1


def test_nash_is_a_fixed_point():
    wins = (np.subtract.outer(np.arange(3), np.arange(3)) % 3 == 2).astype(float)
    preference = jnp.asarray(0.9 * wins + 0.1 * wins.T + np.eye(3) / 2, jnp.float32)
    uniform = jnp.log(jnp.full(3, 1 / 3))
    np.testing.assert_allclose(sppo_exact_step(uniform, preference, eta=50.0), uniform, rtol=1e-5)


def test_eta_out_of_range():
    with pytest.raises(ValueError, match="eta"):
        sppo_exact_step(jnp.zeros(2), jnp.full((2, 2), 0.5), eta=0.0)

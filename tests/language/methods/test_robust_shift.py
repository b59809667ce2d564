"""KL-DRO of calibrated DPO against float64 NumPy, its dual, and golden calibration."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.language.methods.dpo import dpo_loss
from dpo_jax.language.methods.robust_shift import golden_calibration, kl_dro, kl_dro_dual, robust_shift_loss

B, T = 6, 5
POLICY = ("policy_chosen_logps", "policy_rejected_logps")


def pairs(seed=0):
    rng = np.random.default_rng(seed)
    arrays = {}
    for side in ("chosen", "rejected"):
        arrays[f"reference_{side}_logps"] = -rng.gamma(2.0, 0.8, (B, T))
        arrays[f"policy_{side}_logps"] = arrays[f"reference_{side}_logps"] - rng.normal(0, 1.0, (B, T))
        arrays[f"{side}_mask"] = (np.arange(T) < rng.integers(1, T + 1, (B, 1))).astype(float)
    return {**arrays, "calibration": rng.gamma(2.0, 0.5, B)}


def numpy_dpo(a, beta):
    u, v = (
        ((a[f"policy_{s}_logps"] - a[f"reference_{s}_logps"]) * a[f"{s}_mask"]).sum(-1) for s in ("chosen", "rejected")
    )
    return np.logaddexp(0, -beta * (u - v))


def numpy_kl_dro(values, penalty_coef):
    return penalty_coef * (np.logaddexp.reduce(values / penalty_coef) - np.log(len(values)))


def numpy_loss(a, beta, penalty_coef):
    return numpy_kl_dro(a["calibration"] * numpy_dpo(a, beta), penalty_coef)


@functools.cache
def compiled(options):
    def mean(policy, rest):
        output = robust_shift_loss(**policy, **rest, **dict(options))
        return output.loss.mean(), output

    return jax.jit(jax.grad(mean, has_aux=True))


def evaluate(arrays, **options):
    """Output and the gradient of the mean over the batch, as the trainer takes it."""
    inputs = {n: np.asarray(v, np.float32) for n, v in arrays.items()}
    policy = {n: inputs.pop(n) for n in POLICY}
    gradient, output = jax.device_get(compiled(tuple(options.items()))(policy, inputs))
    return output, gradient


@pytest.mark.parametrize("options", [dict(beta=0.1, penalty_coef=1.0), dict(beta=0.7, penalty_coef=0.3)])
@pytest.mark.parametrize("seed", [0, 1])
def test_value_and_gradient_against_the_formula(options, seed):
    arrays = pairs(seed)
    output, gradient = evaluate(arrays, **options)
    np.testing.assert_allclose(output.loss, np.full(B, numpy_loss(arrays, **options)), rtol=1e-5)
    for name in POLICY:
        numeric, step = np.zeros((B, T)), 1e-6
        for place in np.ndindex(B, T):
            up, down = arrays[name].copy(), arrays[name].copy()
            up[place] += step
            down[place] -= step
            numeric[place] = numpy_loss({**arrays, name: up}, **options) - numpy_loss({**arrays, name: down}, **options)
        np.testing.assert_allclose(gradient[name], numeric / (2 * step), rtol=1e-4, atol=1e-7)


def test_defaults_and_metrics():
    arrays = pairs(3)
    output, _ = evaluate(arrays)
    values = arrays["calibration"] * numpy_dpo(arrays, 0.1)
    np.testing.assert_allclose(output.loss, numpy_kl_dro(values, 1.0), rtol=1e-5)
    np.testing.assert_allclose(output.metrics["calibrated_loss"], values, rtol=1e-5)
    weights = np.exp(values) / np.exp(values).sum()
    np.testing.assert_allclose(output.metrics["worst_case_weight"], B * weights, rtol=1e-5)


def test_gradient_is_the_worst_mixtures():
    """sum_i a_i h_i grad l_i with a = softmax(h l / lambda); an example without calibration has none."""
    arrays = pairs()
    arrays["calibration"][2] = 0.0
    output, gradient = evaluate(arrays, beta=0.5, penalty_coef=0.2)
    inputs = {n: jnp.asarray(v, jnp.float32) for n, v in arrays.items() if n != "calibration"}
    coefficient = output.metrics["worst_case_weight"] / B * arrays["calibration"]
    base = jax.grad(lambda p: jnp.sum(coefficient * dpo_loss(**{**inputs, POLICY[0]: p}, beta=0.5).loss))
    np.testing.assert_allclose(gradient[POLICY[0]], base(inputs[POLICY[0]]), rtol=1e-4, atol=1e-8)
    assert not np.any(gradient[POLICY[0]][2]) and np.any(gradient[POLICY[0]][1])


def test_limits_of_the_penalty():
    values = jnp.asarray(np.random.default_rng(0).gamma(2.0, 1.0, 8), jnp.float32)
    there = jnp.ones(8)
    results = [float(kl_dro(values, there, penalty_coef=c).value) for c in (1e-4, 0.1, 1.0, 10.0, 1e4)]
    assert results[0] == pytest.approx(float(values.max()), rel=1e-3)
    assert results[-1] == pytest.approx(float(values.mean()), rel=1e-3)
    assert np.all(np.diff(results) < 0)
    assert all(float(values.mean()) <= r * (1 + 1e-3) and r <= float(values.max()) for r in results)


def test_equal_losses_are_their_own_worst_case():
    assert float(kl_dro(jnp.full(5, 0.7), jnp.ones(5), penalty_coef=0.3).value) == pytest.approx(0.7, rel=1e-6)


def test_raising_a_loss_never_lowers_the_value_and_the_scale_of_calibration_matters():
    values = np.random.default_rng(1).gamma(2.0, 1.0, 6)
    base = kl_dro(jnp.asarray(values), jnp.ones(6)).value
    for i in range(6):
        assert kl_dro(jnp.asarray(values + 0.1 * (np.arange(6) == i)), jnp.ones(6)).value > base
    assert abs(kl_dro(jnp.asarray(2 * values), jnp.ones(6)).value - 2 * base) > 0.05


@pytest.mark.parametrize("penalty_coef", [0.2, 1.0, 5.0])
def test_primal_meets_dual(penalty_coef):
    rng = np.random.default_rng(2)
    values = jnp.asarray(rng.gamma(2.0, 1.0, 7), jnp.float32)
    worst = kl_dro(values, jnp.ones(7), penalty_coef=penalty_coef)
    assert float(worst.weights.sum()) == pytest.approx(1.0, rel=1e-6)
    dual = functools.partial(kl_dro_dual, values, penalty_coef=penalty_coef)
    assert float(dual(worst.weights)) == pytest.approx(float(worst.value), rel=1e-5)
    for weights in [*rng.dirichlet(np.ones(7), 20), np.eye(7)[0], np.full(7, 1 / 7)]:
        assert float(dual(jnp.asarray(weights, jnp.float32))) <= float(worst.value) + 1e-5


def test_empty_places_count_for_nothing():
    values = jnp.array([0.3, jnp.nan, 1.2, jnp.inf])
    there = jnp.array([1, 0, 1, 0])
    worst = kl_dro(values, there)
    assert float(worst.value) == pytest.approx(numpy_kl_dro(np.array([0.3, 1.2]), 1.0), rel=1e-5)
    assert not np.any(worst.weights[jnp.array([1, 3])])
    gradient = jax.grad(lambda v: kl_dro(v, there).value)(values)
    np.testing.assert_allclose(gradient, worst.weights, rtol=1e-6)
    nobody = kl_dro(values, jnp.zeros(4))
    assert nobody.value == 0 and not np.any(nobody.weights)
    assert not np.any(jax.grad(lambda v: kl_dro(v, jnp.zeros(4)).value)(values))


def test_losses_of_ten_thousand():
    worst = kl_dro(jnp.array([1e4, 0.0, -1e4]), jnp.ones(3))
    assert float(worst.value) == pytest.approx(1e4 - np.log(3), rel=1e-6)
    np.testing.assert_array_equal(worst.weights, [1, 0, 0])


# Calibration


def test_calibration_against_the_formula():
    rng = np.random.default_rng(0)
    logits, imbalance, mixture = rng.normal(0, 2, (4, 2, 3)), rng.gamma(2.0, 1.0, 3), rng.dirichlet(np.ones(3))
    c = 1 / (1 + np.exp(-logits))
    for stabilizer in (None, 0.05):
        eps = stabilizer or 1 / 3
        expected = (imbalance * c / (mixture * (1 - c) + eps)).mean(-1)
        shares: dict[str, Any] = dict(imbalance=jnp.asarray(imbalance), mixture=jnp.asarray(mixture))
        found = golden_calibration(jnp.asarray(logits), stabilizer=stabilizer, **shares)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        assert np.all(found >= 0) and np.all(found <= imbalance.mean() / eps)


def test_sure_classifiers_stay_bounded_and_order_is_kept():
    arrays: dict[str, Any] = dict(imbalance=jnp.array([2.0]), mixture=jnp.array([0.5]))
    found = golden_calibration(jnp.array([[-1e4], [-1.0], [0.0], [1.0], [30.0], [1e4]]), **arrays)
    assert np.all(np.isfinite(found)) and np.all(np.diff(found)[:4] > 0)
    assert found[0] == 0 and found[-1] == pytest.approx(2.0)


def test_without_a_stabiliser_to_speak_of_it_is_the_density_ratio():
    logits = np.array([[-2.0], [0.0], [3.0]])
    arrays: dict[str, Any] = dict(imbalance=jnp.array([3.0]), mixture=jnp.array([1.0]))
    found = golden_calibration(jnp.asarray(logits), **arrays, stabilizer=1e-7)
    np.testing.assert_allclose(found, 3.0 * np.exp(logits[:, 0]), rtol=1e-4)


def test_calibrated_worst_case_serves_golden_users_best():
    """30 % of the pairs follow the golden preference, the rest another one; style features betray the source."""
    rng = np.random.default_rng(0)
    n, d = 1000, 8
    u, v = rng.normal(0, 1, (2, d))
    golden = rng.random(n) < 0.3
    x = rng.normal(0, 1, (n, d))
    labels = np.where(golden, x @ u, x @ v) + rng.logistic(0, 0.3, n) > 0
    x = np.where(labels, 1, -1)[:, None] * x  # features of the chosen answer less those of the rejected one
    style = rng.normal(0, 1, (n, 3)) + 1.5 * golden[:, None]
    # The exact log odds of golden, as a perfect classifier has them.
    logits = (1.5 * (style - 0.75)).sum(-1) + np.log(0.3 / 0.7)
    imbalance, mixture = jnp.array([0.7 / 0.3]), jnp.array([0.7])
    h = golden_calibration(jnp.asarray(logits)[:, None], imbalance=imbalance, mixture=mixture, stabilizer=0.5)
    h, x = h / h.mean(), jnp.asarray(x, jnp.float32)
    test = rng.normal(0, 1, (4000, d))

    def accuracy(calibration, penalty_coef):
        def loss(weights):
            values = calibration * jax.nn.softplus(-x @ weights)
            return kl_dro(values, jnp.ones(n), penalty_coef=penalty_coef).value

        slope = jax.grad(loss)
        weights = jax.lax.fori_loop(0, 300, lambda _, w: w - 0.3 * slope(w), jnp.zeros(d))
        return np.mean((test @ np.asarray(weights) > 0) == (test @ u > 0))

    plain, robust = accuracy(1.0, 1e4), accuracy(1.0, 1.0)
    weighted, both = accuracy(h, 1e4), accuracy(h, 1.0)
    assert both > plain + 0.05 and weighted > plain + 0.05
    assert abs(robust - plain) < 0.1


@pytest.mark.parametrize("call", [
    lambda: kl_dro(jnp.ones(2), jnp.ones(2), penalty_coef=0.0),
    lambda: kl_dro_dual(jnp.ones(2), jnp.full(2, 0.5), penalty_coef=-1.0),
    lambda: golden_calibration(jnp.ones((2, 1)), imbalance=jnp.ones(1), mixture=jnp.ones(1), stabilizer=0.0),
    lambda: evaluate(pairs(), penalty_coef=0.0),
])  # fmt: skip
def test_options_out_of_range(call):
    with pytest.raises(ValueError, match=r"penalty_coef|stabilizer"):
        call()

"""Fast-slow losses against float64 NumPy, the roles, the arithmetic of adapters and the fit of their combination."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numeric import sigmoid, softplus

from dpo_jax.language.methods.dpo import dpo_loss
from dpo_jax.language.methods.ofs_dpo import (
    assign_leader,
    combine_adapters,
    combined_delta,
    fast_slow_losses,
    fit_combination,
    project_to_simplex,
)

B, T = 5, 4
SIDES = ("chosen", "rejected")


def modules(seed=0, spread=0.6):
    rng = np.random.default_rng(seed)
    arrays = {}
    for side in SIDES:
        arrays[f"reference_{side}_logps"] = -rng.gamma(2.0, 0.8, (B, T))
        for module in ("fast", "slow"):
            arrays[f"{module}_{side}_logps"] = arrays[f"reference_{side}_logps"] - rng.normal(0, spread, (B, T))
        arrays[f"{side}_mask"] = (np.arange(T) < rng.integers(1, T + 1, (B, 1))).astype(float)
    return arrays


def gap(a, model):
    """d = log pi(y_w) - log pi(y_l), float64 [B]."""
    chosen, rejected = ((a[f"{model}_{s}_logps"] * a[f"{s}_mask"]).sum(-1) for s in SIDES)
    return chosen - rejected


def numpy_losses(a, fast_leads, beta, alpha):
    """(fast, slow) by eqs. 3-6, in roles."""
    h = {m: beta * (gap(a, m) - gap(a, "reference")) for m in ("fast", "slow")}
    leader, chaser = ("fast", "slow") if fast_leads else ("slow", "fast")
    between = softplus(-(h[leader] - h[chaser]))
    loss = {leader: softplus(-h[leader]) + alpha * between, chaser: softplus(-h[chaser]) - alpha * between}
    return loss["fast"], loss["slow"]


def numpy_slopes(a, fast_leads, beta, alpha):
    """Gradient of each module's loss by its own d."""
    h = {m: beta * (gap(a, m) - gap(a, "reference")) for m in ("fast", "slow")}
    leader, chaser = ("fast", "slow") if fast_leads else ("slow", "fast")
    extra = alpha * sigmoid(h[chaser] - h[leader])
    return tuple(-beta * (sigmoid(-h[m]) + extra) for m in ("fast", "slow"))


@functools.cache
def compiled(beta, alpha):
    def total(policies, rest, fast_leads):
        both = fast_slow_losses(**policies, **rest, fast_leads=fast_leads, beta=beta, alpha=alpha)
        return both.fast.loss.sum() + both.slow.loss.sum(), both

    return jax.jit(jax.grad(total, has_aux=True))


def evaluate(arrays, fast_leads=True, beta=0.1, alpha=0.1):
    """Both outputs, and the gradient of their sum by all four policy arrays."""
    inputs = {n: np.asarray(v, np.float32) for n, v in arrays.items()}
    policies = {n: inputs.pop(n) for n in arrays if n.startswith(("fast", "slow"))}
    gradient, both = jax.device_get(compiled(beta, alpha)(policies, inputs, fast_leads))
    return both, gradient


@pytest.mark.parametrize("fast_leads", [True, False])
@pytest.mark.parametrize(("beta", "alpha"), [(0.1, 0.1), (0.8, 0.5)])
@pytest.mark.parametrize("seed", [0, 1])
def test_value_and_gradient_against_the_formula(fast_leads, beta, alpha, seed):
    arrays = modules(seed)
    both, gradient = evaluate(arrays, fast_leads, beta, alpha)
    for found, expected in zip(both, numpy_losses(arrays, fast_leads, beta, alpha)):
        np.testing.assert_allclose(found.loss, expected, rtol=1e-5, atol=1e-6)
    for module, slope in zip(("fast", "slow"), numpy_slopes(arrays, fast_leads, beta, alpha)):
        for side, sign in zip(SIDES, (1, -1)):
            by_hand = sign * slope[:, None] * arrays[f"{side}_mask"]
            np.testing.assert_allclose(gradient[f"{module}_{side}_logps"], by_hand, rtol=1e-5, atol=1e-7)


def test_defaults():
    arrays = modules(2)
    inputs: dict[str, Any] = {n: jnp.asarray(v, jnp.float32) for n, v in arrays.items()}
    both = fast_slow_losses(**inputs)
    for found, expected in zip(both, numpy_losses(arrays, True, 0.1, 0.1)):
        np.testing.assert_allclose(found.loss, expected, rtol=1e-5)


def test_without_comparison_they_are_two_dpo_runs():
    arrays = modules()
    both, gradient = evaluate(arrays, beta=0.3, alpha=0.0)
    for module, output in zip(("fast", "slow"), both):
        inputs = {n.replace(module, "policy"): jnp.asarray(v, jnp.float32) for n, v in arrays.items()}
        inputs = {n: v for n, v in inputs.items() if not n.startswith(("fast", "slow"))}
        np.testing.assert_allclose(output.loss, dpo_loss(**inputs, beta=0.3).loss, rtol=1e-6)
        slope = jax.grad(lambda p, i=inputs: dpo_loss(**{**i, "policy_chosen_logps": p}, beta=0.3).loss.sum())
        expected = slope(inputs["policy_chosen_logps"])
        np.testing.assert_allclose(gradient[f"{module}_chosen_logps"], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("module", ["fast", "slow"])
@pytest.mark.parametrize("fast_leads", [True, False])
def test_each_loss_trains_its_own_module_only(module, fast_leads):
    arrays = {n: jnp.asarray(v, jnp.float32) for n, v in modules().items()}

    def loss(inputs):
        return getattr(fast_slow_losses(**inputs, fast_leads=fast_leads, alpha=1.0), module).loss.sum()

    gradient = jax.jit(jax.grad(loss))(arrays)
    for name, value in gradient.items():
        assert bool(np.any(value)) == name.startswith(module), name


def test_identical_modules_keep_half_the_weight():
    arrays = modules()
    arrays |= {f"slow_{s}_logps": arrays[f"fast_{s}_logps"] for s in SIDES}
    beta, alpha = 0.5, 0.4
    both, gradient = evaluate(arrays, beta=beta, alpha=alpha)
    plain, plain_gradient = evaluate(arrays, beta=beta, alpha=0.0)
    for sign, module, output, dpo in zip((1, -1), ("fast", "slow"), both, plain):
        np.testing.assert_allclose(output.loss - dpo.loss, sign * alpha * np.log(2), rtol=1e-5)
        extra = gradient[f"{module}_chosen_logps"] - plain_gradient[f"{module}_chosen_logps"]
        np.testing.assert_allclose(extra, -beta * alpha / 2 * arrays["chosen_mask"], rtol=1e-4, atol=1e-6)


def test_the_weight_does_not_vanish_when_pairs_are_fitted():
    arrays = modules()
    for module in ("fast", "slow"):
        arrays[f"{module}_chosen_logps"] = arrays["reference_chosen_logps"] + 500.0
        arrays[f"{module}_rejected_logps"] = arrays["reference_rejected_logps"] - 500.0
    arrays["rejected_mask"] = arrays["chosen_mask"] = np.ones((B, T))
    _, dpo = evaluate(arrays, beta=1.0, alpha=0.0)
    _, chased = evaluate(arrays, beta=1.0, alpha=0.2)
    assert not np.any(dpo["fast_chosen_logps"])
    np.testing.assert_allclose(chased["fast_chosen_logps"], -0.1, rtol=1e-3)
    np.testing.assert_allclose(chased["slow_chosen_logps"], -0.1, rtol=1e-3)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 2.0])
def test_the_sum_of_values_does_not_know_alpha_and_gradients_only_grow(alpha):
    arrays = modules()
    both, gradient = evaluate(arrays, alpha=alpha)
    np.testing.assert_allclose(
        both.fast.loss + both.slow.loss, both.fast.metrics["dpo"] + both.slow.metrics["dpo"], rtol=1e-5
    )
    _, plain = evaluate(arrays, alpha=0.0)
    for name, value in gradient.items():
        assert np.all(np.abs(value) >= np.abs(plain[name]) - 1e-8)


def test_swapping_roles_is_swapping_modules():
    arrays = modules()
    exchange = {"fast": "slow", "slow": "fast"}
    swapped = {}
    for name, value in arrays.items():
        module, _, rest = name.partition("_")
        swapped[f"{exchange.get(module, module)}_{rest}" if rest else name] = value
    here, there = evaluate(arrays, True)[0], evaluate(swapped, False)[0]
    np.testing.assert_allclose(here.fast.loss, there.slow.loss, rtol=1e-6)
    np.testing.assert_allclose(here.slow.loss, there.fast.loss, rtol=1e-6)
    np.testing.assert_allclose(here.fast.metrics["lead"], -here.slow.metrics["lead"], rtol=1e-6)


def test_a_constant_of_the_reference_cancels():
    arrays = modules()
    moved = {**arrays, **{f"reference_{s}_logps": arrays[f"reference_{s}_logps"].copy() for s in SIDES}}
    for side in SIDES:
        moved[f"reference_{side}_logps"][:, 0] += np.linspace(-2, 2, B)
    for a, b in zip(evaluate(arrays)[0], evaluate(moved)[0]):
        np.testing.assert_allclose(a.loss, b.loss, rtol=1e-5, atol=1e-6)


def test_a_chaser_far_ahead_is_not_bounded_below():
    arrays = modules()
    arrays["chosen_mask"] = np.ones((B, T))
    arrays["slow_chosen_logps"] = arrays["fast_chosen_logps"] + 1000.0
    both, _ = evaluate(arrays, beta=1.0, alpha=0.5)
    assert np.all(both.slow.loss < -1500)
    assert all(np.isfinite(v).all() for output in both for v in output.metrics.values())


def test_leader_is_who_loses_less_and_ties_go_to_the_fast_one():
    assert bool(assign_leader(jnp.array(1.0), jnp.array(1.0)))
    assert bool(assign_leader(jnp.array(0.9), jnp.array(1.0)))
    assert not bool(assign_leader(jnp.array(1.1), jnp.array(1.0)))


@pytest.mark.parametrize("options", [dict(beta=0.0), dict(alpha=-0.1), dict(alpha=float("nan"))])
def test_options_out_of_range(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        fast_slow_losses(**{n: jnp.asarray(v) for n, v in modules().items()}, **options)


# Adapters


def adapters(ranks=(2, 3), seed=0):
    rng = np.random.default_rng(seed)

    def factors(rank, layers, inside, outside):
        a, b = rng.normal(0, 1, (*layers, inside, rank)), rng.normal(0, 1, (*layers, rank, outside))
        return {"a": jnp.asarray(a, jnp.float32), "b": jnp.asarray(b, jnp.float32)}

    return [{"query": factors(r, (), 4, 6), "mlp": {"up": factors(r, (3,), 4, 5)}} for r in ranks]


def deltas(adapter):
    return [np.asarray(f["a"], float) @ np.asarray(f["b"], float) for f in (adapter["query"], adapter["mlp"]["up"])]


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.3, 0.7), (1.3, -0.3)])
def test_combination_is_the_sum_of_products(weights):
    first, second = adapters()
    expected = [weights[0] * x + weights[1] * y for x, y in zip(deltas(first), deltas(second))]
    joined = combine_adapters([first, second], weights)
    assert joined["query"]["a"].shape == (4, 5) and joined["mlp"]["up"]["b"].shape == (3, 5, 5)
    merged = combined_delta([first, second], weights)
    for found, also, exact in zip(deltas(joined), (merged["query"], merged["mlp"]["up"]), expected):
        np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(also, exact, rtol=1e-5, atol=1e-5)


def test_the_mean_of_factors_is_not_the_mean_of_modules():
    first, second = adapters((2, 2))
    mean = jax.tree.map(lambda x, y: (x + y) / 2, first, second)
    right = combined_delta([first, second], (0.5, 0.5))
    assert np.max(np.abs(deltas(mean)[0] - right["query"])) > 0.1


def test_adapters_that_do_not_match():
    first, second = adapters()
    with pytest.raises(ValueError, match="one weight per adapter"):
        combine_adapters([first, second], (1.0,))
    with pytest.raises(ValueError, match="0 adapters"):
        combine_adapters([], ())
    with pytest.raises(ValueError):
        combined_delta([first, {"query": second["query"]}], (0.5, 0.5))


# Combination


def test_projection_against_bisection():
    rng = np.random.default_rng(0)
    for values in [*rng.normal(0, 2, (10, 5)), np.zeros(5), np.array([3.0, 0, 0, 0, 0])]:
        low, high = values.min() - 1, values.max()
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if np.maximum(values - middle, 0).sum() > 1 else (low, middle)
        found = project_to_simplex(jnp.asarray(values, jnp.float32))
        np.testing.assert_allclose(found, np.maximum(values - low, 0), atol=1e-5)
        assert float(found.sum()) == pytest.approx(1.0, abs=1e-5) and np.all(found >= 0)


@pytest.mark.parametrize("target", [(0.2, 0.5, 0.3), (0.9, 0.3, 0.0), (0.0, 0.0, 1.0)])
def test_fit_finds_the_least_quadratic(target):
    goal = jnp.array(target)
    found = fit_combination(lambda w: jnp.sum((w - goal) ** 2), 3, steps=200)
    np.testing.assert_allclose(found, project_to_simplex(goal), atol=1e-3)


def test_fit_never_loses_to_a_single_module():
    """A loss with a ridge between the corners: projected gradient alone would rest in the middle."""
    found = fit_combination(lambda w: w[0] * w[1] * 10 - 0.1 * w[1], 2, steps=5, learning_rate=1e-3)
    np.testing.assert_array_equal(found, [0.0, 1.0])
    np.testing.assert_array_equal(fit_combination(lambda w: w.sum(), 1), [1.0])


def test_combined_modules_remember_both_domains():
    """Two linear preference tasks with shared features: the combination is better on the mean than either module."""
    rng = np.random.default_rng(0)
    truth = jnp.asarray(rng.normal(0, 1, (2, 8)), jnp.float32)
    x = jnp.asarray(rng.normal(0, 1, (2, 400, 8)), jnp.float32)
    x = x * jnp.sign(jnp.einsum("dnf,df->dn", x, truth))[..., None]  # features of chosen less rejected
    trained, memory = [{"head": {"a": w[:, None], "b": jnp.ones((1, 1))}} for w in truth], x[:, :64]

    def loss(data, weights):
        delta = combined_delta(trained, weights)["head"][:, 0]
        return jnp.mean(jax.nn.softplus(-data @ delta))

    found = fit_combination(lambda w: loss(memory, w), 2)
    assert 0.05 < float(found[0]) < 0.95
    for single in jnp.eye(2):
        assert float(loss(x[:, 64:], found)) < float(loss(x[:, 64:], single))


@pytest.mark.parametrize(("domains", "rate"), [(0, 0.1), (2, 0.0)])
def test_fit_out_of_range(domains, rate):
    with pytest.raises(ValueError, match=r"domains|learning_rate"):
        fit_combination(lambda w: w.sum(), domains, learning_rate=rate)

"""Float64 pairs and central differences for the tests of losses over pairs."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

B, T = 5, 6


def softplus(z):
    return np.logaddexp(0.0, z)


def sigmoid(z):
    return np.exp(-softplus(-z))


def pairs(seed=0, spread=0.5, rows=B):
    """Float64 pairs with ragged masks; the policy strays from the reference by `spread` nats per token."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for side in ("chosen", "rejected"):
        arrays[f"reference_{side}_logps"] = -rng.gamma(2.0, 0.8, (rows, T))
        arrays[f"policy_{side}_logps"] = arrays[f"reference_{side}_logps"] - rng.normal(0, spread, (rows, T))
        arrays[f"{side}_mask"] = (np.arange(T) < rng.integers(1, T + 1, (rows, 1))).astype(float)
    return arrays


def with_empty_rows(arrays, at):
    """The batch with empty places (zeros everywhere) inserted before the given rows."""
    return {name: np.insert(value, at, 0, axis=0) for name, value in arrays.items()}


def float32(arrays) -> dict[str, Any]:
    return {name: jnp.asarray(value, jnp.float32) for name, value in arrays.items()}


def sums(a):
    """(S_w, u, |y_w|, S_l, v, |y_l|), each float64 [B]."""
    out = []
    for side in ("chosen", "rejected"):
        policy, mask = a[f"policy_{side}_logps"], a[f"{side}_mask"]
        reference = a.get(f"reference_{side}_logps", 0.0 * policy)
        out += [(policy * mask).sum(-1), ((policy - reference) * mask).sum(-1), mask.sum(-1)]
    return out


def without(arrays, *prefixes) -> dict[str, Any]:
    return {name: value for name, value in arrays.items() if not name.startswith(prefixes)}


def scalar_pair(u, v: Any = 0.0, reference=-3.0) -> dict[str, Any]:
    """One-token pairs with the log-ratios u and v; either may be an array."""
    u, v = np.broadcast_arrays(np.atleast_1d(np.asarray(u, float)), np.asarray(v, float))
    base = np.full_like(u, reference)
    arrays = dict(
        policy_chosen_logps=base + u,
        policy_rejected_logps=base + v,
        reference_chosen_logps=base,
        reference_rejected_logps=base,
        chosen_mask=np.ones_like(u),
        rejected_mask=np.ones_like(u),
    )
    return float32({name: value[:, None] for name, value in arrays.items()})


def slope(loss, inputs, side="chosen", **options):
    """d sum(loss) / d log-probability of the one-token answers of one side, [B]."""
    name = f"policy_{side}_logps"
    gradient = jax.jit(jax.grad(lambda p: loss(**{**inputs, name: p}, **options).loss.sum()))
    return np.asarray(gradient(inputs[name]))[:, 0]


def numeric_gradient(function, arrays, name, step=1e-6):
    """Central differences of sum(function) by every entry of one array, float64."""
    gradient = np.zeros_like(arrays[name])
    for place in np.ndindex(*gradient.shape):
        moved = []
        for sign in (1, -1):
            shifted = arrays[name].copy()
            shifted[place] += sign * step
            moved.append(np.sum(function({**arrays, name: shifted})))
        gradient[place] = (moved[0] - moved[1]) / (2 * step)
    return gradient


def value_and_gradients(loss, arrays):
    """The loss [B] and the gradient of its sum by the policy's arrays, compiled once for all."""
    arrays = float32(arrays)
    policy = {name: value for name, value in arrays.items() if name.startswith("policy_")}

    def total(policy):
        values = loss(**{**arrays, **policy}).loss
        return values.sum(), values

    gradient, values = jax.jit(jax.grad(total, has_aux=True))(policy)
    return values, gradient


def gradients(loss, arrays):
    return value_and_gradients(loss, arrays)[1]


def check_against(loss, formula, arrays, options):
    """Value and gradient of a loss equal those of a float64 formula: arrays -> [B]."""
    function = functools.partial(formula, **options)
    value, gradient_of = value_and_gradients(functools.partial(loss, **options), arrays)
    np.testing.assert_allclose(value, function(arrays), rtol=3e-5, atol=2e-6)
    for name, gradient in gradient_of.items():
        expected = numeric_gradient(function, arrays, name)
        assert np.any(expected != 0), f"the case of {name} is trivial"
        np.testing.assert_allclose(gradient, expected, rtol=2e-4, atol=2e-6, err_msg=name)

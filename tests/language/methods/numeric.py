"""What tests of losses share: small float64 inputs, gradients by central differences and by JAX."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Arrays = dict[str, np.ndarray]


def completions(names: tuple[str, ...], *, reference: bool, seed: int = 0, rows: int = 5, tokens: int = 6) -> Arrays:
    """Float64 log-probabilities and ragged masks of one completion per name; with a reference, the policy strays from
    it by half a nat per token."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for name in names:
        arrays[f"policy_{name}_logps"] = -rng.gamma(2.0, 0.8, (rows, tokens))
        arrays[f"{name}_mask"] = (np.arange(tokens) < rng.integers(1, tokens + 1, (rows, 1))).astype(float)
        if reference:
            stray = rng.normal(0, 0.5, (rows, tokens))
            arrays[f"reference_{name}_logps"] = arrays[f"policy_{name}_logps"] - stray
    return arrays


def one_token(chosen, rejected) -> dict[str, Any]:
    """Float32 pairs of single tokens with these log-probabilities."""
    chosen, rejected = (jnp.atleast_1d(jnp.asarray(x, jnp.float32))[:, None] for x in (chosen, rejected))
    ones = jnp.ones_like(chosen)
    return dict(policy_chosen_logps=chosen, policy_rejected_logps=rejected, chosen_mask=ones, rejected_mask=ones)


def total(arrays: Arrays, name: str) -> np.ndarray:
    """Sum of the policy's log-probabilities over the tokens of one completion, [B]."""
    return (arrays[f"policy_{name}_logps"] * arrays[f"{name}_mask"]).sum(-1)


def mean(arrays: Arrays, name: str) -> np.ndarray:
    return total(arrays, name) / arrays[f"{name}_mask"].sum(-1)


def log_ratio(arrays: Arrays, name: str) -> np.ndarray:
    gap = arrays[f"policy_{name}_logps"] - arrays[f"reference_{name}_logps"]
    return (gap * arrays[f"{name}_mask"]).sum(-1)


def softplus(z: np.ndarray) -> np.ndarray:
    return np.logaddexp(0.0, z)


def sigmoid(z: np.ndarray) -> np.ndarray:
    return np.exp(-softplus(-z))


def float32(arrays: Arrays) -> dict[str, Any]:
    return {n: jnp.asarray(v, jnp.float32 if v.dtype.kind == "f" else jnp.int32) for n, v in arrays.items()}


def value_and_gradients(loss: Callable, arrays: Arrays, **special) -> tuple[np.ndarray, Arrays]:
    """The loss [B] and the gradient of its sum by each policy array, compiled together."""
    inputs = float32(arrays)
    policy = {name: inputs.pop(name) for name in arrays if name.startswith("policy_")}

    def summed(policy):
        value = loss(**inputs, **policy, **special).loss
        return value.sum(), value

    return jax.device_get(jax.jit(jax.grad(summed, has_aux=True))(policy))[::-1]


def gradients(loss: Callable, arrays: Arrays, **special) -> Arrays:
    return value_and_gradients(loss, arrays, **special)[1]


def central_differences(function: Callable[[Arrays], np.ndarray], arrays: Arrays, name: str, step=1e-6) -> np.ndarray:
    """Derivative of sum(function) by every entry of one array, float64."""
    gradient = np.zeros(arrays[name].shape)
    for place in np.ndindex(*gradient.shape):
        moved = []
        for sign in (1, -1):
            shifted = arrays[name].copy()
            shifted[place] += sign * step
            moved.append(function({**arrays, name: shifted}).sum())
        gradient[place] = (moved[0] - moved[1]) / (2 * step)
    return gradient


def assert_formula(loss: Callable, formula: Callable[[Arrays], np.ndarray], arrays: Arrays, **special) -> None:
    """Value and gradient of a loss are those of a float64 formula: float32 rounding is all that may part them."""
    value, slopes = value_and_gradients(loss, arrays, **special)
    np.testing.assert_allclose(value, formula(arrays), rtol=2e-5, atol=1e-6)
    for name, slope in slopes.items():
        expected = central_differences(formula, arrays, name)
        np.testing.assert_allclose(slope, expected, rtol=1e-4, atol=2e-6, err_msg=name)

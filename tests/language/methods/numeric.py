"""What tests of losses share: small float64 inputs, gradients by central differences and by JAX."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpo_jax.types import LossOutput

Arrays = dict[str, np.ndarray]

PAIR = ("chosen", "rejected")

# Inputs


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


def pairs(
    seed: int = 0,
    spread: float = 0.5,
    *,
    drift: float = 0.0,
    rows: int = 5,
    tokens: int = 6,
    sides: tuple[str, ...] = PAIR,
) -> Arrays:
    """Float64 pairs with ragged masks; the policy strays from the reference by `spread` nats per token around
    `drift` nats below it."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for side in sides:
        arrays[f"reference_{side}_logps"] = -rng.gamma(2.0, 0.8, (rows, tokens))
        arrays[f"policy_{side}_logps"] = arrays[f"reference_{side}_logps"] - rng.normal(drift, spread, (rows, tokens))
        arrays[f"{side}_mask"] = (np.arange(tokens) < rng.integers(1, tokens + 1, (rows, 1))).astype(float)
    return arrays


def with_empty_rows(arrays: Arrays, at: Any) -> Arrays:
    """The batch with empty places (zeros everywhere) inserted before the given rows."""
    return {name: np.insert(value, at, 0, axis=0) for name, value in arrays.items()}


def without(arrays: dict[str, Any], *prefixes: str) -> dict[str, Any]:
    return {name: value for name, value in arrays.items() if not name.startswith(prefixes)}


def one_token(chosen, rejected) -> dict[str, Any]:
    """Float32 pairs of single tokens with these log-probabilities."""
    chosen, rejected = (jnp.atleast_1d(jnp.asarray(x, jnp.float32))[:, None] for x in (chosen, rejected))
    ones = jnp.ones_like(chosen)
    return dict(policy_chosen_logps=chosen, policy_rejected_logps=rejected, chosen_mask=ones, rejected_mask=ones)


def scalar_pair(u: Any, v: Any = 0.0, reference: float = -3.0) -> dict[str, Any]:
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


def float32(arrays: Arrays) -> dict[str, Any]:
    return {n: jnp.asarray(v, jnp.float32 if v.dtype.kind == "f" else jnp.int32) for n, v in arrays.items()}


# Formulas


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


def sums(arrays: Arrays) -> list[np.ndarray]:
    """(S_w, u, |y_w|, S_l, v, |y_l|), each float64 [B]."""
    out = []
    for side in PAIR:
        referenced = f"reference_{side}_logps" in arrays
        ratio = log_ratio(arrays, side) if referenced else total(arrays, side)
        out += [total(arrays, side), ratio, arrays[f"{side}_mask"].sum(-1)]
    return out


# Gradients


@functools.cache
def _compiled(loss: Callable[..., LossOutput], options: tuple) -> Callable[[dict, dict], tuple[Arrays, LossOutput]]:
    def summed(policy: dict, rest: dict) -> tuple[jax.Array, LossOutput]:
        output = loss(**policy, **rest, **dict(options))
        return output.loss.sum(), output

    return jax.jit(jax.grad(summed, has_aux=True))


def value_and_gradients(loss: Callable, arrays: Arrays, **options: Any) -> tuple[LossOutput, Arrays]:
    """Output of a loss and the gradient of its sum by each policy array, float32.

    Compiled once for the same loss, numbers among the options and shapes.
    """
    numbers = tuple(sorted((n, v) for n, v in options.items() if v is None or isinstance(v, str | int | float)))
    rest = float32(arrays) | {n: v for n, v in options.items() if n not in dict(numbers)}
    policy = {name: rest.pop(name) for name in arrays if name.startswith("policy_")}
    gradient, output = jax.device_get(_compiled(loss, numbers)(policy, rest))
    return output, gradient


def gradients(loss: Callable, arrays: Arrays, **options: Any) -> Arrays:
    return value_and_gradients(loss, arrays, **options)[1]


def slope(loss: Callable, inputs: dict[str, Any], side: str = "chosen", **options: Any) -> np.ndarray:
    """d sum(loss) / d log-probability of the one-token answers of one side, [B]."""
    return gradients(loss, inputs, **options)[f"policy_{side}_logps"][:, 0]


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


def assert_formula(
    loss: Callable, formula: Callable[[Arrays], np.ndarray], arrays: Arrays, *, idle: str = "", **options: Any
) -> LossOutput:
    """Value and gradient of a loss are those of a float64 formula: float32 rounding is all that may part them.

    No array is without effect but the one named `idle`, whose gradient is zero everywhere.
    """
    output, slopes = value_and_gradients(loss, arrays, **options)
    np.testing.assert_allclose(output.loss, formula(arrays), rtol=2e-5, atol=1e-6)
    for name, slope in slopes.items():
        expected = central_differences(formula, arrays, name)
        assert np.any(expected != 0) == (name != idle), f"the case of {name} is trivial"
        np.testing.assert_allclose(slope, expected, rtol=1e-4, atol=2e-6, err_msg=name)
    return output

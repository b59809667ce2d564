"""What tests of losses over lists share: ragged float64 lists, lists from log ratios, one compiled evaluation."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numeric import Arrays, value_and_gradients

from dpo_jax.types import LossOutput


def lists(seed: int = 0, *, rows: int = 4, items: int = 4, tokens: int = 3, absent: bool = True) -> Arrays:
    """Float64 lists with ragged masks; the policy strays from the reference by half a nat per token.

    With `absent`, row 0 lacks an item in the middle and row 1 its last two.
    """
    rng = np.random.default_rng(seed)
    mask = (np.arange(tokens) < rng.integers(1, tokens + 1, (rows, items, 1))).astype(float)
    if absent:
        mask[0, 1] = mask[1, -2:] = 0
    reference = -rng.gamma(2.0, 0.8, (rows, items, tokens))
    return {
        "policy_logps": reference - rng.normal(0, 0.5, reference.shape),
        "reference_logps": reference,
        "mask": mask,
        "scores": rng.permuted(np.tile(np.linspace(0.05, 0.95, items), (rows, 1)), axis=1),
    }


def with_log_ratios(ratios: Any, **columns: Any) -> Arrays:
    """Lists of one token per item with the given log ratios [B, K] and columns [B, K], in the shape of `lists`.

    What is left of that shape is not there: one shape for all means one compilation.
    """
    rows, items = np.shape(ratios)
    shape = (max(rows, 4), max(items, 4), 3)
    arrays = {name: np.zeros(shape) for name in ("policy_logps", "reference_logps", "mask")}
    arrays["policy_logps"][:rows, :items, 0] = ratios
    arrays["mask"][:rows, :items, 0] = 1
    for name, values in columns.items():
        arrays[name] = np.zeros(shape[:2])
        arrays[name][:rows, :items] = values
    return arrays


def there(arrays: Arrays) -> np.ndarray:
    """Which items have a token, bool [B, K]."""
    return arrays["mask"].any(-1)


def log_ratios(arrays: Arrays) -> np.ndarray:
    """Log ratio of each item, [B, K]."""
    return ((arrays["policy_logps"] - arrays["reference_logps"]) * arrays["mask"]).sum(-1)


def evaluate(loss: Callable[..., LossOutput], arrays: Arrays, **options: float) -> tuple[LossOutput, np.ndarray]:
    """Output of a loss and the gradient of its sum by `policy_logps`, in float32 and compiled."""
    output, gradient = value_and_gradients(loss, arrays, **options)
    return output, gradient["policy_logps"]

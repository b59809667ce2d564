"""The words that both wings share."""

from typing import Any, NamedTuple

import jax

Array = jax.Array
PyTree = Any


class LossOutput(NamedTuple):
    """What every loss returns; nothing in it is reduced over the batch.

    Attributes:
      loss: float32 [B], one value per example.
      metrics: name -> float32 [B].
      state: what the loss remembers until the next step (a pytree), or None.
    """

    loss: Array
    metrics: dict[str, Array]
    state: PyTree = None

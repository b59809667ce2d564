"""What a function of named arrays asks for, read from its signature."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

_SPECIAL = ("loss_state", "key")


class Needs(NamedTuple):
    """What a loss asks for, read from its signature.

    Attributes:
      arrays: names of the arrays, in order: the keyword arguments without a default.
      hyper: names and defaults of the hyper-parameters: the keyword arguments with one.
      state: whether it remembers something between steps (an argument `loss_state`).
      key: whether it draws random numbers (an argument `key`).
    """

    arrays: tuple[str, ...]
    hyper: dict[str, Any]
    state: bool
    key: bool


def read_needs(function: Callable) -> Needs:
    """Read the signature of a loss, or of another function of named arrays."""
    parameters = inspect.signature(function).parameters
    plain = {name: p.default for name, p in parameters.items() if name not in _SPECIAL}
    arrays = tuple(name for name, default in plain.items() if default is inspect.Parameter.empty)
    hyper = {name: default for name, default in plain.items() if name not in arrays}
    return Needs(arrays, hyper, "loss_state" in parameters, "key" in parameters)

"""Reading config.json and its like: values of a right type and range, or one error that names the key."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


class WeightsError(ValueError):
    """A checkpoint that cannot be read as asked; the message names the folder and every tensor or key concerned."""


def read_object(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
      WeightsError: there is no such file, or it holds something else.
    """
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{file}: {error}") from error
    if not isinstance(found, dict):
        raise WeightsError(f"{file}: expected an object")
    return found


def integer(config: Mapping[str, Any], place: str, key: str, default: int | None = None) -> int:
    """An integer from 1 on; a key that is missing or null takes the default."""
    value = default if config.get(key) is None else config[key]
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
        raise WeightsError(f"{place}: {key} is {value!r}; expected an integer from 1 to 2^31 - 1")
    return value


def number(
    config: Mapping[str, Any], place: str, key: str, default: float | None = None, *, above: float = 0.0
) -> float:
    """A number above the bound; a key that is missing or null takes the default."""
    value = default if config.get(key) is None else config[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not above < value < 1e30:
        raise WeightsError(f"{place}: {key} is {value!r}; expected a number above {above:g}")
    return float(value)


def flag(config: Mapping[str, Any], place: str, key: str, default: bool) -> bool:
    """True or false; a key that is missing or null takes the default."""
    value = default if config.get(key) is None else config[key]
    if not isinstance(value, bool):
        raise WeightsError(f"{place}: {key} is {value!r}; expected true or false")
    return value


def choice(config: Mapping[str, Any], place: str, key: str, default: str, choices: Mapping[str, Any]) -> Any:
    """What one of some words stands for; a key that is missing or null takes the default."""
    value = default if config.get(key) is None else config[key]
    if not isinstance(value, str) or value not in choices:
        raise WeightsError(f"{place}: {key} is {value!r}; there is {', '.join(choices)}")
    return choices[value]


def optional(read: Callable[..., Any], config: Mapping[str, Any], place: str, key: str, default: Any) -> Any:
    """As `read`, for a key whose null means "none": only a missing one takes the default."""
    return None if config.get(key, default) is None else read(config, place, key, default)


def refuse(config: Mapping[str, Any], place: str, usual: Mapping[str, Any]) -> None:
    """Features that a model lacks, as key -> the one value that leaves them out.

    Raises:
      WeightsError: a key that is there with another value; all such keys are named.
    """
    odd = [f"{key} {config[key]!r}" for key, value in usual.items() if config.get(key, value) not in (value, None)]
    if odd:
        raise WeightsError(f"{place}: {', '.join(odd)}: not supported")

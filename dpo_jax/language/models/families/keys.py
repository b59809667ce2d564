"""Reading config.json: values of a right type and range, or one error that names the key."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

# Names of config.json -> `activation` of `DecoderConfig`.
GELUS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


class WeightsError(ValueError):
    """A checkpoint that cannot be read as asked; the message names the folder and every tensor or key concerned."""


class Architecture(NamedTuple):
    """What an architecture's name in config.json means.

    Attributes:
      family: name of the family, which is also its `model_type`.
      reward: whether it is a sequence classifier, here a reward model.
    """

    family: str
    reward: bool = False


def architecture_name(architectures: Mapping[str, Architecture], family: str, reward: bool) -> str:
    """The name that config.json has for a family's language model or reward model."""
    return next(name for name, known in architectures.items() if known == Architecture(family, reward))


def gelu_name(activation: str) -> str:
    """The name in config.json of an `activation`."""
    return next(name for name, ours in GELUS.items() if ours == activation)


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
    """Features that the decoder lacks, as key -> the one value that leaves them out.

    Raises:
      WeightsError: a key that is there with another value; all such keys are named.
    """
    odd = [f"{key} {config[key]!r}" for key, value in usual.items() if config.get(key, value) not in (value, None)]
    if odd:
        raise WeightsError(f"{place}: {', '.join(odd)}: not supported")


def sizes(
    config: Mapping[str, Any],
    place: str,
    *,
    key_value_heads: int | None = None,
    head_dim: int | None = None,
    multiples: bool = False,
) -> dict[str, Any]:
    """V, D, F, depth, heads and head_dim, by the names of `DecoderConfig`.

    Args:
      key_value_heads, head_dim: what a missing key stands for; all heads, and hidden_size over the heads, by default.
        A null is all heads.
      multiples: whether hidden_size must be a multiple of the heads in any case.
    """
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    if missing := [key for key in keys if config.get(key) is None]:
        raise WeightsError(f"{place}: the keys {', '.join(missing)} are missing")
    vocabulary, hidden, intermediate, layers, heads = (integer(config, place, key) for key in keys)
    if ((config.get("head_dim") is None and head_dim is None) or multiples) and hidden % heads:
        raise WeightsError(f"{place}: num_attention_heads is {heads}; hidden_size {hidden} is no multiple of it")
    dimension = integer(config, place, "head_dim", head_dim or hidden // heads)
    if dimension % 2:
        raise WeightsError(f"{place}: head_dim is {dimension}; rotary positions need an even one")
    missing_key = "num_key_value_heads" not in config and key_value_heads is not None
    shared = integer(config, place, "num_key_value_heads", key_value_heads if missing_key else heads)
    if heads % shared:
        raise WeightsError(
            f"{place}: num_key_value_heads is {shared}; num_attention_heads {heads} is no multiple of it"
        )
    return {
        "vocabulary_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "layers": layers,
        "heads": heads,
        "key_value_heads": shared,
        "head_dim": dimension,
    }


def local_layers(config: Mapping[str, Any], place: str, layers: int, default: Callable[[int], bool]) -> list[bool]:
    """Which layers see only a window, from `layer_types`; where there is none, `default(number of the layer)`."""
    kinds = {"sliding_attention": True, "full_attention": False}
    given = config.get("layer_types")
    if given is None:
        return [default(layer) for layer in range(layers)]
    if not isinstance(given, list) or len(given) < layers or any(str(kind) not in kinds for kind in given):
        raise WeightsError(f"{place}: layer_types is {given!r}; expected {layers} of {', '.join(kinds)}")
    return [kinds[kind] for kind in given[:layers]]


def windows(window: int | None, local: list[bool]) -> dict[str, Any]:
    """`window` and `local_layers` of `DecoderConfig`, each layout in one spelling."""
    if window is None or not any(local):
        return {"window": None, "local_layers": ()}
    return {"window": window, "local_layers": () if all(local) else tuple(local)}


def layer_types(layers: int, window: int | None, local: tuple[bool, ...]) -> list[str]:
    """`layer_types` of config.json."""
    kinds = local or (window is not None,) * layers
    return ["sliding_attention" if kind else "full_attention" for kind in kinds]

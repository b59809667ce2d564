"""Reading config.json of a decoder: what its families share, beside the plain values of `dpo_jax.keys`."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dpo_jax.keys import WeightsError, choice, flag, integer, number, optional, refuse

__all__ = [
    "GELUS",
    "Architecture",
    "WeightsError",
    "architecture_name",
    "choice",
    "flag",
    "gelu_name",
    "integer",
    "layer_types",
    "local_layers",
    "number",
    "optional",
    "refuse",
    "sizes",
    "windows",
]

# Names of config.json -> `activation` of `DecoderConfig`.
GELUS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


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

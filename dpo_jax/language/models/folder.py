"""A Hugging Face folder apart from its tensors: config.json in and out by family, tokenizer, hub ids."""

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from dpo_jax import weights
from dpo_jax.keys import WeightsError, read_object
from dpo_jax.language.models.config import DecoderConfig
from dpo_jax.language.models.families import gemma, gpt2, llama, mistral, mixtral, neox, phi, qwen, qwen_moe
from dpo_jax.language.models.families.keys import Architecture

__all__ = [
    "ARCHITECTURES",
    "WeightsError",
    "config_from_hf",
    "config_to_hf",
    "family_of",
    "load_tokenizer",
    "local_folder",
    "read_config",
]

# Each has ARCHITECTURES, PREFIX, config_from_hf, config_to_hf and table.
FAMILIES = (llama, qwen, mistral, gemma, phi, neox, gpt2, qwen_moe, mixtral)
ARCHITECTURES: Mapping[str, Architecture] = {
    name: architecture for module in FAMILIES for name, architecture in module.ARCHITECTURES.items()
}


def family_of(family: str) -> ModuleType:
    """The module that reads and writes a family.

    Raises:
      WeightsError: there is none of that name.
    """
    for module in FAMILIES:
        if any(architecture.family == family for architecture in module.ARCHITECTURES.values()):
            return module
    known = dict.fromkeys(architecture.family for architecture in ARCHITECTURES.values())
    raise WeightsError(f"no family is called {family!r}; there is {', '.join(known)}")


def config_from_hf(config: Mapping[str, Any], *, place: str = "config.json") -> DecoderConfig:
    """Decoder config of a checkpoint's config.json, in the layout of transformers 4 or 5.

    Raises:
      WeightsError: an architecture or a feature that the decoder does not have, or a key that is missing or wrong.
    """
    names = config.get("architectures") or []
    known = [n for n in names if isinstance(n, str) and n in ARCHITECTURES] if isinstance(names, list) else []
    if not known:
        raise WeightsError(f"{place}: architecture {names or 'not given'}; there is {', '.join(ARCHITECTURES)}")
    architecture = ARCHITECTURES[known[0]]
    labels = config.get("id2label")
    count = len(labels) if isinstance(labels, Mapping) else config.get("num_labels", 2)
    if architecture.reward and count != 1:
        raise WeightsError(f"{place}: {known[0]} with {count} labels; a reward model has one")
    return family_of(architecture.family).config_from_hf(config, architecture, place)


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The config.json of a decoder config."""
    labels = {"id2label": {"0": "reward"}, "label2id": {"reward": 0}} if config.reward else {}
    return family_of(config.family).config_to_hf(config) | labels


def local_folder(model: str | Path) -> Path:
    """The folder itself, or a hub id's files (safetensors, configs, tokenizer) in the hub's cache.

    Raises:
      WeightsError: neither a folder nor a hub id that can be had.
    """
    return weights.local_folder(model, ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"))


def read_config(folder: Path) -> dict[str, Any]:
    """A checkpoint's config.json.

    Raises:
      WeightsError: there is none, or it is no JSON object.
    """
    return read_object(folder / "config.json")


def load_tokenizer(folder: Path) -> Any:
    """The checkpoint's tokenizer.

    Raises:
      WeightsError: there is none that transformers can read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise WeightsError(f"{folder}: no tokenizer can be read ({error})") from error

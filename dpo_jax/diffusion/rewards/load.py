"""Released image rewards read from safetensors and made into one function of images and prompts.

    pickscore   yuvalkirstain/PickScore_v1, which has no tokenizer
    hps         xswu/HPSv2, v2 or v2.1, as safetensors, in OpenCLIP's names; no tokenizer
    clip        any CLIP of both towers, such as openai/clip-vit-large-patch14
    aesthetic   openai/clip-vit-large-patch14, and beside it the head sac+logos+ava1-l14-linearMSE as safetensors

All that read text know the same words, so the tokenizer may be that of any CLIP, such as openai/clip-vit-large-patch14.

Pickled weights (.pt, .pth, .bin) can run code when they are read, so they are refused. Convert them once:

    import torch; from safetensors.torch import save_file
    read = torch.load("HPS_v2.1_compressed.pt", "cpu", weights_only=True); read = read.get("state_dict", read)
    save_file({name: value.contiguous().clone() for name, value in read.items()}, "HPS_v2.1_compressed.safetensors")
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from dpo_jax.diffusion.models.clip import clip_function
from dpo_jax.diffusion.models.clip_config import VIT_H_14, VIT_L_14, ClipConfig, config_from_dict
from dpo_jax.diffusion.models.clip_weights import as_transformers, read_clip
from dpo_jax.diffusion.models.layers import Types
from dpo_jax.diffusion.rewards.pixels import long_side_pad, short_side_crop
from dpo_jax.diffusion.rewards.scores import (
    AffineHead,
    aesthetic_score,
    clip_score,
    collapsed_head,
    hps_score,
    pickscore,
)
from dpo_jax.keys import WeightsError
from dpo_jax.sharding import make_mesh
from dpo_jax.types import Array, PyTree
from dpo_jax.weights import local_folder, on_host, open_tensors, weight_files

_HEAD = tuple(f"layers.{number}" for number in (0, 2, 4, 6, 7))  # linear layers; dropout stands between
_FLOAT32 = Types()
_PICKLED = (".pt", ".pth", ".bin", ".ckpt")
_TOKENIZER = ("tokenizer*.json", "vocab.json", "merges.txt", "special_tokens_map.json")
_PATTERNS = ("model*.safetensors", "model*.safetensors.index.json", "config.json", *_TOKENIZER)  # of a hub id
_CONVERT = (
    "import torch; from safetensors.torch import save_file; read = torch.load({old!r}, 'cpu', weights_only=True); "
    "save_file({{k: v.contiguous().clone() for k, v in read.get('state_dict', read).items()}}, {new!r})"
)


class Reward(NamedTuple):
    """A judge of images.

    Attributes:
      name: of `REWARDS`.
      score: (N images uint8 [H, W, 3] of any sizes, N prompts) -> float32 [N] on the host.
    """

    name: str
    score: Callable[[Sequence[np.ndarray], Sequence[str]], np.ndarray]


class _Kind(NamedTuple):
    """How a reward is made: sizes where no config.json says them, pixels, and the score of features.

    `combine(image features, text features, logit scale)`; None for a reward that reads no text.
    """

    sizes: ClipConfig
    pixels: Callable[..., np.ndarray]
    combine: Callable[[Array, Array, Array], Array] | None


_KINDS: Mapping[str, _Kind] = {
    "pickscore": _Kind(VIT_H_14, short_side_crop, pickscore),
    "hps": _Kind(VIT_H_14, long_side_pad, lambda images, texts, _: hps_score(images, texts)),
    "clip": _Kind(VIT_L_14, short_side_crop, lambda images, texts, _: clip_score(images, texts)),
    "aesthetic": _Kind(VIT_L_14, partial(short_side_crop, nearest_centre=True), None),
}
REWARDS = tuple(_KINDS)


def check_reward(name: str, folder: str | Path, *, tokenizer: str | Path | None = None) -> None:
    """Find the files of a reward and read all but the weights, before anything is done for it.

    Raises:
      ValueError, WeightsError: as `load_reward`, but for weights that do not fit.
    """
    kind, place = _kind(name), _place(folder)
    config = _config(_folder_of(place), kind.sizes)
    with _tensors(place, extra=_is_head if kind.combine is None else None) as tensors:
        if kind.combine is None:
            _read_head(place, tensors)
    if kind.combine is not None:
        _encoder(tokenizer or _folder_of(place), config)


def load_reward(
    name: str,
    folder: str | Path,
    mesh: Mesh | None = None,
    *,
    tokenizer: str | Path | None = None,
    batch: int = 16,
    types: Types = _FLOAT32,
) -> Reward:
    """A reward from its files.

    Args:
      name: of `REWARDS`.
      folder: with the weights as safetensors (or that file alone, or a hub id), and config.json where sizes are not
        the released ones. All processes read it.
      mesh: by default the first device alone.
      tokenizer: folder or hub id of CLIP's tokenizer; that of the weights by default.
      batch: images or prompts that go through a tower at a time.

    Raises:
      ValueError: no such reward, or a batch below 1.
      WeightsError: files that are missing, pickled or do not fit.
    """
    if batch < 1:
        raise ValueError(f"batch is {batch}; give at least 1")
    kind, folder = _kind(name), _place(folder)
    mesh = mesh or make_mesh(devices=jax.devices()[:1])
    config = _config(_folder_of(folder), kind.sizes)
    head = None
    with _tensors(folder, extra=_is_head if kind.combine is None else None) as tensors:
        if kind.combine is None:
            head = _read_head(folder, tensors)
            config = ClipConfig(vision=config.vision, projection=config.projection)
        elif config.text is None or config.vision is None:
            raise WeightsError(f"{folder}: config.json has one tower; {name} needs text and images")
        body = {key: tensor for key, tensor in tensors.items() if not _is_head(key)}
        variables = read_clip(as_transformers(body), config, place=folder, mesh=mesh, types=types)
    if head is not None and head.weight.shape != (config.projection,):
        raise WeightsError(f"{folder}: the head judges {len(head.weight)} numbers; CLIP gives {config.projection}")
    tower = _towers(config, variables, mesh, batch, types)
    size = config.vision.image_size if config.vision is not None else 0

    def image_features(images: Sequence[np.ndarray]) -> np.ndarray:
        return tower("vision", [kind.pixels(_checked(image), size) for image in images])

    if kind.combine is None:

        def score(images: Sequence[np.ndarray], prompts: Sequence[str]) -> np.ndarray:
            _same_number(images, prompts)
            return np.asarray(aesthetic_score(jax.numpy.asarray(image_features(images)), head))  # type: ignore[arg-type]

        return Reward(name, score)

    encode = _encoder(tokenizer or _folder_of(folder), config)
    combine, scale = kind.combine, on_host(variables["logit_scale"]).astype(np.float32)

    def score(images: Sequence[np.ndarray], prompts: Sequence[str]) -> np.ndarray:
        _same_number(images, prompts)
        known = list(dict.fromkeys(prompts))
        texts = tower("text", list(encode(known)) if known else [])
        places = {prompt: place for place, prompt in enumerate(known)}
        chosen = texts[[places[prompt] for prompt in prompts]] if known else texts
        return np.asarray(combine(image_features(images), chosen, scale))  # type: ignore[arg-type]

    return Reward(name, score)


def _kind(name: str) -> _Kind:
    if name not in _KINDS:
        raise ValueError(f"no reward is called {name!r}; there is {', '.join(REWARDS)}")
    return _KINDS[name]


def _place(folder: str | Path) -> Path:
    """The folder or file itself, or the folder in the hub's cache."""
    place = Path(folder)
    if place.suffix in _PICKLED and place.is_file():
        raise WeightsError(f"{place} would run code when read: {_conversion(place)}")
    return place if place.exists() else local_folder(folder, _PATTERNS)


def _folder_of(place: Path) -> Path:
    return place if place.is_dir() else place.parent


def _conversion(file: Path) -> str:
    code = _CONVERT.format(old=str(file), new=str(file.with_suffix(".safetensors")))
    return f'convert it once, where torch is installed, by python -c "{code}"'


def _towers(
    config: ClipConfig, variables: PyTree, mesh: Mesh, batch: int, types: Types
) -> Callable[[str, Sequence[np.ndarray]], np.ndarray]:
    """(tower, N inputs) -> projected features float32 [N, P], in batches of one size so that each compiles once."""
    apply = clip_function(config, types)
    towers = {
        name: jax.jit(lambda variables, given, name=name: apply(variables, given, method=name).projected)
        for name in ("text", "vision")
    }

    def run(name: str, given: Sequence[np.ndarray]) -> np.ndarray:
        found = [np.zeros((0, config.projection or 0), np.float32)]
        for start in range(0, len(given), batch):
            part = list(given[start : start + batch])
            filled = np.stack(part + [part[-1]] * (batch - len(part)))
            with jax.set_mesh(mesh):
                found.append(on_host(towers[name](variables, filled)).astype(np.float32)[: len(part)])
        return np.concatenate(found)

    return run


def _encoder(place: str | Path, config: ClipConfig) -> Callable[[Sequence[str]], np.ndarray]:
    """Prompts -> int32 [N, positions], cut off behind the last place with the end token there."""
    folder = local_folder(place, _TOKENIZER)
    if not any((folder / file).exists() for file in ("tokenizer.json", "vocab.json")):
        raise WeightsError(
            f"{folder}: no tokenizer.json and no vocab.json; give `tokenizer` (--reward-tokenizer), a folder or hub id "
            "of CLIP's, such as openai/clip-vit-large-patch14"
        )
    from transformers import CLIPTokenizer

    try:
        tokenizer: Any = CLIPTokenizer.from_pretrained(folder)
    except Exception as error:  # broken files raise almost anything
        raise WeightsError(f"{folder}: no tokenizer can be read ({error})") from error
    words, length = (0, 0) if config.text is None else (config.text.vocabulary_size, config.text.positions)
    if len(tokenizer) > words:
        raise WeightsError(f"{folder}: the tokenizer knows {len(tokenizer)} words; the text tower {words}")

    def encode(prompts: Sequence[str]) -> np.ndarray:
        said = tokenizer(list(prompts), padding="max_length", truncation=True, max_length=length)
        return np.asarray(said["input_ids"], np.int32)

    return encode


def _config(folder: Path, otherwise: ClipConfig) -> ClipConfig:
    """Sizes of config.json if it is one of CLIP, and the released ones otherwise."""
    file = folder / "config.json"
    if not file.exists():
        return otherwise
    try:
        keys = json.loads(file.read_text())
        names = keys.get("architectures") or []
    except (OSError, ValueError, AttributeError) as error:
        raise WeightsError(f"{file}: expected an object ({error})") from error
    return config_from_dict(keys, str(file)) if any(str(name).startswith("CLIP") for name in names) else otherwise


def _is_head(name: str) -> bool:
    return name.startswith("layers.")


@contextmanager
def _tensors(folder: Path, extra: Callable[[str], bool] | None) -> Iterator[dict[str, Any]]:
    """Lazy tensors of the weights; of the folder's other files those that `extra` asks for."""
    with ExitStack() as stack:
        parts = [stack.enter_context(open_tensors([file])) for file in _files(folder)]
        counts = Counter(name for part in parts for name in part)
        if twice := [name for name, count in counts.items() if count > 1]:
            raise WeightsError(f"{folder}: {twice[0]} stands in several files; give the file itself")
        found = {name: tensor for part in parts for name, tensor in part.items()}
        if extra is not None and not any(map(extra, found)) and folder.is_dir():
            for file in sorted(set(folder.glob("*.safetensors")) - set(_files(folder))):
                part = stack.enter_context(open_tensors([file]))
                found |= {name: tensor for name, tensor in part.items() if extra(name)}
        yield found


def _files(folder: Path) -> list[Path]:
    if folder.suffix == ".safetensors" and folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise WeightsError(f"{folder} is neither a folder nor a file of safetensors")
    if any(folder.glob("model*.safetensors*")):
        return weight_files(folder, "model", ("fp16",))
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        others = sorted(file for file in folder.iterdir() if file.suffix in _PICKLED)
        hint = f"; {others[0].name} would run code when read: {_conversion(others[0])}" if others else ""
        raise WeightsError(f"{folder}: no safetensors{hint}")
    return files


def _read_head(folder: Path, tensors: Mapping[str, Any]) -> AffineHead:
    wanted = [f"{layer}.{kind}" for layer in _HEAD for kind in ("weight", "bias")]
    present = sorted(filter(_is_head, tensors))
    if sorted(wanted) != present:
        found = f"; there is {', '.join(present)}" if present else ""
        raise WeightsError(f"{folder}: the aesthetic head's tensors are {', '.join(wanted)}{found}")
    read = {name: np.asarray(tensors[name][...]) for name in wanted}
    try:
        return collapsed_head([(read[f"{layer}.weight"], read[f"{layer}.bias"]) for layer in _HEAD])
    except ValueError as error:
        raise WeightsError(f"{folder}: {error}") from error


def _checked(image: np.ndarray) -> np.ndarray:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"an image is {image.dtype} {list(image.shape)}; expected uint8 [H, W, 3]")
    return image


def _same_number(images: Sequence[np.ndarray], prompts: Sequence[str]) -> None:
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images and {len(prompts)} prompts; give one prompt for each image")

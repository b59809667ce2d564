"""A diffusers folder as a whole: model_index.json and its components, opened, loaded one by one and written again.

    model_index.json, unet/ or transformer/, vae/, text_encoder/, text_encoder_2/, tokenizer/, tokenizer_2/,
    scheduler/scheduler_config.json

Stable Diffusion 1 and 2 ("sd"), XL ("sdxl") and 3 ("sd3") in the layouts of https://github.com/huggingface/diffusers.
SD3's third text encoder, a T5, is not read: its states are given (`dpo_jax.diffusion.models.text`).
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from dpo_jax.diffusion.models import clip, clip_config, mmdit, unet, unet_config, vae
from dpo_jax.diffusion.models.clip_config import ClipConfig
from dpo_jax.diffusion.models.layers import Types
from dpo_jax.diffusion.models.mmdit_config import MMDiTConfig
from dpo_jax.diffusion.models.scheduler import Noising, noising_from_dict
from dpo_jax.diffusion.models.unet_config import UNetConfig
from dpo_jax.diffusion.models.vae_config import AutoencoderConfig
from dpo_jax.diffusion.models.weights import DIFFUSERS, TRANSFORMERS, find_files, load_model, save_model
from dpo_jax.keys import WeightsError, flag, read_object
from dpo_jax.sharding import Rules
from dpo_jax.types import Array, PyTree
from dpo_jax.weights import local_folder, open_tensors

_FLOAT32 = Types()
INDEX_FILE, SCHEDULER_FILE = "model_index.json", "scheduler_config.json"
Kind = Literal["sd", "sdxl", "sd3"]
_KINDS: dict[str, Kind] = {
    "StableDiffusionPipeline": "sd",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd3",
}
_ENCODERS: dict[Kind, tuple[str, ...]] = {
    "sd": ("text_encoder",),
    "sdxl": ("text_encoder", "text_encoder_2"),
    "sd3": ("text_encoder", "text_encoder_2"),
}
_TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
_ENDS = (".safetensors", "-*.safetensors")
# What a hub id is downloaded of: neither half-precision variants nor other formats beside the plain files.
_PATTERNS = (
    *(INDEX_FILE, "*/*.json", "*/*.txt"),
    *(f"{name}/{DIFFUSERS}{end}" for name in ("unet", "transformer", "vae") for end in _ENDS),
    *(f"{name}/{TRANSFORMERS}{end}" for name in ("text_encoder", "text_encoder_2") for end in _ENDS),
)


@dataclass(frozen=True, eq=False)
class Pipeline:
    """What a folder says apart from its tensors.

    Attributes:
      folder: where it is.
      kind: "sd", "sdxl" or "sd3".
      denoiser: config of the UNet or the transformer; replace its dtypes and remat before loading.
      autoencoder: config of the autoencoder, which holds the latents' scaling; None for a model of pixels.
      encoders: configs of the text encoders.
      noising: the process that the denoiser was trained to undo, and its usual grid.
      tokenizers: transformers' own, one for each text encoder.
      zero_empty: zeros stand for no prompt at all, and not the states of the empty text (SDXL).
      names_t5: model_index.json names a third text encoder, which is not read.
    """

    folder: Path
    kind: Kind
    denoiser: UNetConfig | MMDiTConfig
    autoencoder: AutoencoderConfig | None
    encoders: tuple[ClipConfig, ...]
    noising: Noising
    tokenizers: tuple[Any, ...]
    zero_empty: bool = False
    names_t5: bool = False


def denoiser_name(kind: Kind) -> str:
    """The denoiser's folder."""
    return "transformer" if kind == "sd3" else "unet"


def open_pipeline(model: str | Path) -> Pipeline:
    """A pipeline's configs and tokenizers; no tensor is read.

    Args:
      model: folder or hub id.

    Raises:
      WeightsError: a class, a component or a feature that there is not here, named with its file and key.
    """
    folder = local_folder(model, _PATTERNS)
    place = folder / INDEX_FILE
    index = read_object(place)
    name = index.get("_class_name")
    if name not in _KINDS:
        raise WeightsError(f"{place}: _class_name is {name!r}; there is {', '.join(_KINDS)}")
    kind = _KINDS[name]
    encoders = _ENCODERS[kind]
    pixels = index.get("vae") == [None, None]  # how diffusers writes a component that is not there
    latent = () if pixels else ("vae",)
    wanted = (denoiser_name(kind), *latent, "scheduler", *encoders, *(_TOKENIZERS[encoder] for encoder in encoders))
    if missing := [part for part in wanted if not _is_component(index.get(part))]:
        raise WeightsError(f"{place}: {', '.join(missing)}: expected a component of {name}, found none")
    scheduler = folder / "scheduler" / SCHEDULER_FILE
    read_denoiser = mmdit.config_from_dict if kind == "sd3" else unet_config.config_from_dict
    return Pipeline(
        folder=folder,
        kind=kind,
        denoiser=read_denoiser(*_config(folder / denoiser_name(kind))),
        autoencoder=None if pixels else vae.config_from_dict(*_config(folder / "vae")),
        encoders=tuple(clip_config.config_from_dict(*_config(folder / encoder)) for encoder in encoders),
        noising=noising_from_dict(read_object(scheduler), str(scheduler)),
        tokenizers=tuple(_tokenizer(folder / _TOKENIZERS[encoder]) for encoder in encoders),
        zero_empty=kind == "sdxl" and flag(index, str(place), "force_zeros_for_empty_prompt", True),
        names_t5=_is_component(index.get("text_encoder_3")),
    )


def _is_component(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry)


def _config(folder: Path) -> tuple[dict[str, Any], str]:
    file = folder / "config.json"
    return read_object(file), str(file)


def _tokenizer(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    try:
        return CLIPTokenizer.from_pretrained(folder)
    except Exception as error:
        raise WeightsError(f"{folder}: no CLIP tokenizer can be read ({error})") from error


def _model(kind: Kind) -> ModuleType:
    return mmdit if kind == "sd3" else unet


def predict_function(pipeline: Pipeline, adapters: PyTree = None) -> Callable[..., Array]:
    """`predict(variables, latents, timesteps, condition)` of the denoiser; arguments as in `unet_function`."""
    if isinstance(pipeline.denoiser, MMDiTConfig):
        return mmdit.mmdit_function(pipeline.denoiser, adapters)
    return unet.unet_function(pipeline.denoiser, adapters)


def load_denoiser(pipeline: Pipeline, *, mesh: Mesh | None = None, rules: Rules | None = None) -> PyTree:
    """Variables of the denoiser in the types of its config; arguments and errors as in `load_model`."""
    model, config = _model(pipeline.kind), pipeline.denoiser
    return load_model(
        pipeline.folder / denoiser_name(pipeline.kind),
        model.abstract_variables(config),
        model.weight_table(config),
        mesh=mesh,
        rules=model.RULES if rules is None else rules,
    )


def load_autoencoder(pipeline: Pipeline, *, mesh: Mesh | None = None, types: Types = _FLOAT32) -> PyTree:
    """Variables of the autoencoder; arguments and errors as in `load_model`.

    Raises:
      ValueError: a model of pixels has none.
    """
    folder, config = pipeline.folder / "vae", pipeline.autoencoder
    if config is None:
        raise ValueError(f"{pipeline.folder} is a model of pixels: it has no autoencoder")
    with open_tensors(find_files(folder)) as tensors:
        old = any(name.endswith(".proj_attn.weight") for name in tensors)
    table = vae.weight_table(config, old_names=old)
    return load_model(folder, vae.abstract_variables(config, types), table, mesh=mesh, rules=vae.RULES)


def load_encoders(pipeline: Pipeline, *, mesh: Mesh | None = None, types: Types = _FLOAT32) -> tuple[PyTree, ...]:
    """Variables of each text encoder; arguments and errors as in `load_model`."""
    return tuple(
        load_model(
            pipeline.folder / name,
            clip.abstract_variables(config, types),
            clip.weight_table(config),
            mesh=mesh,
            rules=clip.RULES,
            # A buffer of files older than transformers 4.31.
            passed_over=lambda name: name.endswith("embeddings.position_ids"),
        )
        for name, config in zip(_ENCODERS[pipeline.kind], pipeline.encoders)
    )


def save_pipeline(
    folder: str | Path,
    pipeline: Pipeline,
    variables: PyTree,
    *,
    source: Path | None = None,
    dtype: Any = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a pipeline that diffusers loads: the denoiser new, all else copied byte for byte; process 0 writes.

    Components that the source names and does not have, such as parts of a hub id that are not downloaded, become absent
    ones in the index.

    Args:
      variables: of the denoiser, without adapters (`dpo_jax.lora.merge`).
      source: folder of the other components; by default the one that the pipeline was opened from, and may be `folder`.
      dtype: of the denoiser's tensors; that of the variables by default.
      max_shard_bytes: a file of weights holds at most that many bytes of tensors (one tensor at least).

    Raises:
      ValueError: the variables are not the denoiser's.
      WeightsError: the source is no such pipeline.
    """
    folder, source = Path(folder), source or pipeline.folder
    index = read_object(source / INDEX_FILE)
    name, model = denoiser_name(pipeline.kind), _model(pipeline.kind)
    moved = folder.resolve() != source.resolve()
    if jax.process_index() == 0 and moved:
        for part, entry in index.items():
            if part != name and _is_component(entry) and (source / part).is_dir():
                shutil.copytree(source / part, folder / part, dirs_exist_ok=True)
    before = read_object(source / name / "config.json")
    save_model(
        folder / name,
        variables,
        model.weight_table(pipeline.denoiser),
        {**before, **model.config_to_dict(pipeline.denoiser)},
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
    )
    if jax.process_index() == 0 and moved:
        # Last: a folder without it is no pipeline. What was not downloaded is named as diffusers names the absent.
        absent = [part for part, entry in index.items() if _is_component(entry) and not (source / part).is_dir()]
        if absent:
            named = {**index, **{key: [None, None] for key in absent}}
            (folder / INDEX_FILE).write_text(json.dumps(named, indent=2) + "\n")
        else:
            shutil.copyfile(source / INDEX_FILE, folder / INDEX_FILE)

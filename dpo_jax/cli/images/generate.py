"""`dpo-jax generate` for diffusion models: images of prompts as PNG files and one grid."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from dpo_jax.cli.checks import check_ranges, mesh_of
from dpo_jax.cli.configs import MeshConfig
from dpo_jax.cli.console import OutputConfig, UsageError, result
from dpo_jax.cli.images.configs import ImageModelConfig
from dpo_jax.cli.images.models import OpenPipeline, open_images, require_alike
from dpo_jax.cli.images.sampling import ImageSampler, SamplingConfig, check_sampling, grid_of
from dpo_jax.cli.images.texts import open_t5, require_states, text_encoder
from dpo_jax.cli.processes import is_first, join_processes
from dpo_jax.diffusion.data.parsing import CAPTION_KEYS
from dpo_jax.diffusion.data.t5_states import T5States
from dpo_jax.diffusion.models.adapters import load_adapter
from dpo_jax.diffusion.models.folder import denoiser_name
from dpo_jax.diffusion.types import TextCondition
from dpo_jax.lora import merge, with_adapters
from dpo_jax.rows import RowError, json_records
from dpo_jax.types import PyTree


@dataclass(frozen=True)
class ImageGenerateConfig:
    """Images of prompts from the command line or a file."""

    model: str
    """Folder of a diffusers pipeline, a hub id, or the folder of a run (its export)."""
    prompt: tuple[str, ...] = ()
    """Prompts."""
    data: tuple[str, ...] = ()
    """Files of rows with a caption or prompt, JSONL or JSONL.gz; what else a row holds is not looked at."""
    out: str = ""
    """Folder to write: PROMPT_SAMPLE.png, grid.png with a row for each prompt, and images.jsonl."""
    adapter: str | None = None
    """File or folder of an adapter in diffusers' naming, which is merged into the model."""
    negative_model: str | None = None
    """Another pipeline, alike but for its weights, whose denoiser serves the negative branch of guidance (arXiv
    2505.11245)."""
    t5_states: str | None = None
    """File or folder of T5 states of the prompts and the negative prompt (`write_t5_states`), for SD3; else zeros."""
    samples: int = 1
    """Images of each prompt."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    seed: int = 0
    """Of all noise; image n of a prompt has the same noise whatever else is drawn with it."""
    batch_size: int = 8
    """Images at a time."""
    vae_tiling: bool = False
    """Decode images larger than the autoencoder's own size in tiles, which saves memory; seams are blended."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type that the denoiser computes in."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    output: OutputConfig = field(default_factory=OutputConfig)


def generate_images(config: ImageGenerateConfig) -> None:
    """Draw images, and write them.

    Raises:
      UsageError: options missing, out of range or without effect; a negative model that is not alike.
    """
    check_ranges(config)
    check_sampling(config.sampling, negative_model=config.negative_model is not None)
    require_adapter(config.adapter)
    if not config.out:
        raise UsageError("generate needs --out, a folder for the images")
    prompts = [*config.prompt, *read_prompts(config.data)]
    if not prompts:
        raise UsageError("generate needs prompts: give --prompt or --data")
    if config.mesh.distributed:
        join_processes()
    mesh = mesh_of(config.mesh)
    options = ImageModelConfig(dtype=config.dtype, param_dtype=config.dtype, vae_tiling=config.vae_tiling)
    model = open_images(config.model, options)
    other = None
    if config.negative_model is not None:
        other = open_images(config.negative_model, options)
        require_alike(model, other)
    t5 = open_t5(model, config.t5_states)
    sampler = ImageSampler(model, config.sampling, mesh, batch_size=config.batch_size, two_networks=other is not None)
    require_states(t5, [*prompts, config.sampling.negative_prompt])
    variables = load_with_adapter(model, config.adapter, mesh)
    negative = None if other is None else other.load(mesh)
    conditions, empty = conditions_of(model, prompts, config.sampling, t5)
    begun = time.perf_counter()
    repeated = [condition for condition in conditions for _ in range(config.samples)]
    # Numbered by sample, so that a prompt's images do not depend on the prompts before it.
    numbers = [sample for _ in conditions for sample in range(config.samples)]
    images = sampler(variables, repeated, empty, numbers, config.seed, negative=negative)
    seconds = time.perf_counter() - begun
    if is_first():
        write_images(Path(config.out), prompts, images, config.samples, config.seed)
        values = {"out": config.out, "images": len(images), "seconds": seconds}
        result(values, f"{len(images)} images in {config.out}, {seconds:.1f} s", as_json=config.output.json)


def require_adapter(adapter: str | None) -> None:
    """Raise UsageError for an adapter that is not there."""
    if adapter is not None and not Path(adapter).exists():
        raise UsageError(f"--adapter {adapter}: no such file or folder")


def load_with_adapter(model: OpenPipeline, adapter: str | None, mesh: Mesh) -> PyTree:
    """The denoiser's variables, an adapter merged into them."""
    variables = model.load(mesh)
    if adapter is None:
        return variables
    prefix = denoiser_name(model.pipeline.kind)
    return jax.jit(merge)(with_adapters(variables, load_adapter(adapter, model.table, model.abstract, prefix=prefix)))


def read_prompts(paths: Sequence[str]) -> list[str]:
    """Captions of rows.

    Raises:
      UsageError: a file that does not exist.
      RowError: a row without a caption.
    """
    prompts = []
    for path in paths:
        file = Path(path) / "metadata.jsonl" if Path(path).is_dir() else Path(path)
        if not file.exists():
            raise UsageError(f"no such file: {file}")
        for name, number, record in json_records(file):
            if isinstance(record, RowError):
                raise record
            found = [
                record[key] for key in CAPTION_KEYS if isinstance(record, dict) and isinstance(record.get(key), str)
            ]
            if not found:
                raise RowError(name, number, f"no caption; expected one of the keys {', '.join(CAPTION_KEYS)}")
            prompts.append(found[0])
    return prompts


def conditions_of(
    model: OpenPipeline, prompts: Sequence[str], config: SamplingConfig, t5: T5States | None = None
) -> tuple[list[TextCondition], TextCondition]:
    """Conditions of prompts and of the negative prompt (no text at all if it is empty), leaves [1, ...]."""
    encode, negative = text_encoder(model, t5), config.negative_prompt or None
    height, width = (config.height or model.resolution, config.width or model.resolution)
    sizes = np.array([[height, width, 0, 0, height, width]], np.float32) if model.wants_sizes else None
    unique = list(dict.fromkeys([*prompts, negative]))
    said: dict[str | None, TextCondition] = {}
    for start in range(0, len(unique), 16):
        some = unique[start : start + 16]
        for text, entry in zip(some, encode(some)):
            pooled = entry["pooled"][None] if "pooled" in entry else None
            said[text] = TextCondition(entry["states"][None], pooled, sizes)
    return [said[prompt] for prompt in prompts], said[negative]


def write_images(out: Path, prompts: Sequence[str], images: np.ndarray, samples: int, seed: int) -> None:
    """A PNG for each image, a grid with a row for each prompt, and images.jsonl that says which is which."""
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for place, image in enumerate(images):
        prompt, number = divmod(place, samples)
        name = f"{prompt:04d}_{number:02d}.png"
        Image.fromarray(image).save(out / name)
        lines.append({"file_name": name, "prompt": prompts[prompt], "sample": number, "seed": seed})
    Image.fromarray(grid_of(images, samples if samples > 1 else min(len(images), 8))).save(out / "grid.png")
    (out / "images.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

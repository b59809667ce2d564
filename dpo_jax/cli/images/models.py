"""Diffusion models as the commands use them: a pipeline's configs opened, its parts loaded when they are wanted."""

import hashlib
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dpo_jax.cli.console import UsageError
from dpo_jax.cli.images.configs import ImageModelConfig
from dpo_jax.diffusion.models import mmdit, unet
from dpo_jax.diffusion.models.folder import (
    Pipeline,
    denoiser_name,
    load_autoencoder,
    load_denoiser,
    open_pipeline,
    predict_function,
)
from dpo_jax.diffusion.models.mmdit import MMDiTConfig
from dpo_jax.diffusion.models.vae import autoencoder_function, from_latents, to_latents
from dpo_jax.diffusion.process import Process
from dpo_jax.sharding import BATCH_AXES, P, Rules, shard_batch
from dpo_jax.types import Array, PyTree

Entries = list[dict[str, np.ndarray]]
TILE_STEP = 4  # latents that a tile's side is a multiple of
_SHOWN = 4  # facts that an error names
_PASSED_OVER = {"autoencoder (sample_size)", "autoencoder (force_upcast)"}
HUB_ID = r"[\w.-]+/[\w.-]+"


@dataclass(frozen=True, eq=False)
class OpenPipeline:
    """A pipeline whose weights are read later.

    Attributes:
      pipeline: its configs; the denoiser's says how it runs.
      vae_tiling: whether images larger than the autoencoder's own size are encoded and decoded in tiles of that size.
    """

    pipeline: Pipeline
    vae_tiling: bool = False

    @property
    def config(self) -> Any:
        """Of the denoiser."""
        return self.pipeline.denoiser

    @property
    def process(self) -> Process:
        """What the denoiser was trained to undo."""
        return self.pipeline.noising.process

    @property
    def rules(self) -> Rules:
        """Of the denoiser's layout."""
        return self._module.RULES

    @property
    def abstract(self) -> PyTree:
        """Shapes of the denoiser's variables."""
        return self._module.abstract_variables(self.config)

    @property
    def table(self) -> Any:
        """The denoiser's weight table."""
        return self._module.weight_table(self.config)

    @property
    def _module(self) -> Any:
        return mmdit if isinstance(self.config, MMDiTConfig) else unet

    @property
    def factor(self) -> int:
        """Pixels to a side of a latent."""
        return 1 if self.pipeline.autoencoder is None else self.pipeline.autoencoder.factor

    @property
    def resolution(self) -> int:
        """Side of the images that the model was made for."""
        return (self.config.sample_size or 64) * self.factor

    @property
    def size_step(self) -> int:
        """Sides of images are multiples of this."""
        config = self.config
        deepest = config.patch_size if isinstance(config, MMDiTConfig) else 2 ** (len(config.block_out_channels) - 1)
        return self.factor * deepest

    @property
    def wants_sizes(self) -> bool:
        """Whether the model is told the sizes of images (SDXL)."""
        return self.pipeline.kind == "sdxl"

    @property
    def t5_width(self) -> int | None:
        """Of the states of a T5 that the model reads beside those of its encoders (SD3), or None."""
        return self.config.joint_attention_dim if isinstance(self.config, MMDiTConfig) else None

    @property
    def zeroes_no_text(self) -> bool:
        """Whether zeros stand for no text at all, and not the states of the empty text (SDXL)."""
        return self.pipeline.zero_empty

    def load(self, mesh: Mesh) -> PyTree:
        """The denoiser's variables, read straight into their layout on the mesh."""
        return load_denoiser(self.pipeline, mesh=mesh)

    def fingerprint(self) -> str:
        """Says which files the denoiser's variables come from: their names, sizes and times, but not their bytes."""
        return self._fingerprint(denoiser_name(self.pipeline.kind))

    def image_fingerprint(self) -> str:
        """Says what latents are made by."""
        if self.pipeline.autoencoder is None:
            return "pixels"
        return self._fingerprint("vae") + (" in tiles" if self.vae_tiling else "")

    def text_fingerprint(self) -> str:
        """Says what text states are made by."""
        return self._fingerprint("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")

    def _fingerprint(self, *parts: str) -> str:
        folder = self.pipeline.folder
        files = (p for part in parts for p in sorted((folder / part).glob("*")) if p.is_file())
        facts = [(str(p.relative_to(folder)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
        return hashlib.blake2b(repr((self.pipeline.kind, facts)).encode(), digest_size=12).hexdigest()


def open_images(model: str, options: ImageModelConfig) -> OpenPipeline:
    """Open a diffusers folder or hub id; reads configs and tokenizers, not yet weights.

    Raises:
      UsageError: a folder that does not exist or is no pipeline; tiles that its autoencoder cannot have.
      WeightsError: not a pipeline that can be read.
    """
    folder = Path(model)
    if not folder.exists() and not re.fullmatch(HUB_ID, model):
        raise UsageError(f"no such folder: {model}; give that of a diffusers pipeline, or a hub id")
    # A run's folder stands for what it exported.
    if (folder / "export" / "model_index.json").exists():
        folder = folder / "export"
    if folder.exists() and not (folder / "model_index.json").exists():
        raise UsageError(f"{folder} is no diffusers pipeline: it has no model_index.json")
    opened = open_pipeline(folder if folder.exists() else model)
    denoiser = replace(opened.denoiser, dtype=options.dtype, param_dtype=options.param_dtype, remat=options.remat)
    if options.vae_tiling:
        _check_tiles(opened)
    return OpenPipeline(replace(opened, denoiser=denoiser), options.vae_tiling)


def _check_tiles(pipeline: Pipeline) -> None:
    if pipeline.autoencoder is None:
        raise UsageError(f"--vae-tiling has no effect: {pipeline.folder} is a model of pixels")
    size, step = pipeline.autoencoder.sample_size, TILE_STEP * pipeline.autoencoder.factor
    if size % step:
        raise UsageError(
            f"--vae-tiling: the autoencoder of {pipeline.folder} has a size of {size}, no multiple of {step}"
        )


def require_alike(model: OpenPipeline, other: OpenPipeline) -> None:
    """Raise UsageError if another pipeline's denoiser cannot take the model's latents, noise and text states.

    The shapes of all parts and the noise that the denoisers undo have to be the same; weights may differ.
    """
    mine, theirs = _facts(model), _facts(other)
    differing = [name for name in {**mine, **theirs} if name not in mine or mine[name] != theirs.get(name)]
    if differing:
        rest = f" and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
        raise UsageError(
            f"{other.pipeline.folder} does not fit {model.pipeline.folder}; they differ in "
            f"{', '.join(differing[:_SHOWN])}{rest}"
        )


def _facts(model: OpenPipeline) -> dict[str, Any]:
    """Name -> all that two pipelines must agree in before one can stand beside the other."""
    pipeline, process = model.pipeline, model.process
    levels = None if process.schedule is None else process.schedule.alphas_cumprod.tolist()
    facts = {"kind": pipeline.kind, "prediction type": process.parameterisation, "noise": (levels, process.shift)}
    parts = {"denoiser": pipeline.denoiser, "autoencoder": pipeline.autoencoder}
    parts |= {f"text encoder {number}": encoder for number, encoder in enumerate(pipeline.encoders, 1)}
    for name, part in parts.items():
        facts |= {} if part is None else {f"{name} ({key})": value for key, value in asdict(part).items()}
    # The size that an autoencoder was trained at and the type that it computes in change nothing in its latents.
    return {name: value for name, value in facts.items() if name not in _PASSED_OVER}


def image_encoder(model: OpenPipeline, mesh: Mesh) -> Callable[[np.ndarray], Entries]:
    """`encode(images float32 [N, H, W, 3])` gives the cache's entries of this process's images.

    Latents of an autoencoder are its scaled mean beside the scaled standard deviation, in half precision; images of a
    model without one are their own latents.
    """
    config = model.pipeline.autoencoder
    if config is None:
        return lambda images: [{"latents": np.asarray(image, np.float32)} for image in images]
    variables, apply = load_autoencoder(model.pipeline, mesh=mesh), autoencoder_function(config)
    assert config is not None

    def moments(variables: PyTree, images: Array) -> tuple[Array, Array]:
        posterior = apply(variables, images, method="tiled_encode" if model.vae_tiling else "encode")
        spread = to_latents(config, jnp.exp(posterior.log_variance / 2)) - to_latents(config, jnp.zeros(()))
        return to_latents(config, posterior.mean), spread

    compiled = jax.jit(moments)

    def encode(images: np.ndarray) -> Entries:
        with jax.set_mesh(mesh):
            said = compiled(variables, shard_batch(images, mesh))
        own = multihost_utils.global_array_to_host_local_array(said, mesh, P(BATCH_AXES))
        latents, spread = (np.asarray(x).astype(np.float16) for x in own)
        return [{"latents": x, "spread": s} for x, s in zip(latents, spread)]

    return encode


def image_decoder(model: OpenPipeline, mesh: Mesh) -> Callable[[Array], Array]:
    """`decode(latents [N, h, w, C])` gives images float32 [N, H, W, 3] in [-1, 1]; to be called under the mesh."""
    config = model.pipeline.autoencoder
    if config is None:
        return lambda latents: jnp.clip(latents, -1, 1)
    variables, apply = load_autoencoder(model.pipeline, mesh=mesh), autoencoder_function(config)

    def decode(variables: PyTree, latents: Array) -> Array:
        method = "tiled_decode" if model.vae_tiling else "decode"
        return jnp.clip(apply(variables, from_latents(config, latents), method=method), -1, 1)

    compiled = jax.jit(decode)
    return lambda latents: compiled(variables, latents)


def denoiser_function(model: OpenPipeline, adapters: PyTree = None) -> Callable[..., Array]:
    """`predict(variables, latents, timesteps, condition)`, with adapters or without; videos frame by frame."""
    return frame_by_frame(predict_function(model.pipeline, adapters))


def frame_by_frame(predict: Callable[..., Array]) -> Callable[..., Array]:
    """The function of a model of images on videos [N, F, H, W, C] too: frames share their video's time and text."""

    def predict_frames(variables: PyTree, latents: Array, timesteps: Array, condition: PyTree) -> Array:
        if latents.ndim == 4:
            return predict(variables, latents, timesteps, condition)
        frames = latents.shape[1]
        flat = latents.reshape(-1, *latents.shape[2:])
        times, told = jax.tree.map(lambda leaf: jnp.repeat(leaf, frames, axis=0), (timesteps, condition))
        return predict(variables, flat, times, told).reshape(latents.shape)

    return predict_frames

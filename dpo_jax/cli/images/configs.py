"""Options of the commands that train and run diffusion models; what both wings share is in `configs`."""

from dataclasses import dataclass, field, make_dataclass
from typing import Literal

from dpo_jax.cli.catalogue import Method, options_class
from dpo_jax.cli.configs import LoopConfig, MeshConfig
from dpo_jax.cli.console import OutputConfig
from dpo_jax.diffusion.data.images import MAX_PIXELS, OnMode
from dpo_jax.optimizers import OptimizerConfig

ATTENTION = r".*/to_(q|k|v|out/0)/kernel"


@dataclass(frozen=True)
class ImageModelConfig:
    """The policy and its reference."""

    model: str = ""
    """Folder of a diffusers pipeline (safetensors), or a hub id."""
    reference_model: str | None = None
    """Folder or hub id of another reference; by default it is the policy at the start."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type that the model computes in; errors and losses are always float32."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the parameters and of the optimizer's moments; adapters are float32."""
    remat: Literal["none", "full"] = "none"
    """What a block's backward pass computes again to save memory: nothing, or everything."""
    vae_tiling: bool = False
    """Encode images larger than the autoencoder's own size in tiles, which saves memory; seams are blended."""
    start_noise: float | None = None
    """Noise on the policy's parameters at the start, as a share of their deviation; by default 0, or what a method
    needs that cannot start at its reference. With adapters it is on lora_b, as a share of the kernels' deviation."""


@dataclass(frozen=True)
class ImageAdapterConfig:
    """Low-rank adapters instead of the whole model; the frozen base is then the reference and costs no memory."""

    lora_rank: int = 0
    """Rank of the adapters; 0 trains the whole model. Adapters want about ten times its learning rate."""
    lora_alpha: float | None = None
    """Numerator of the adapters' scale; the rank by default."""
    lora_targets: str = ATTENTION
    """Regular expression of the path names of the kernels that are adapted; by default those of attention."""
    rslora: bool = False
    """Divide alpha by the root of the rank instead of the rank (arXiv 2312.03732)."""
    dora: bool = False
    """Learn each output's norm apart from its direction (arXiv 2402.09353)."""


@dataclass(frozen=True)
class ImageDataConfig:
    """Rows of images and how they become latents."""

    data: tuple[str, ...] = ()
    """Folders with metadata.jsonl, or files of rows: JSONL, JSONL.gz, Parquet or WebDataset tar."""
    eval_data: tuple[str, ...] = ()
    """Rows to evaluate on, instead of a held-out split."""
    held_out: float = 0.05
    """Share of the rows (or, from 1 on, their number) that is held out for evaluation; 0 holds out none."""
    on_bad_row: Literal["error", "skip"] = "skip"
    """Stop at the first bad row or image, or list them in the run's folder and go on."""
    on_mode: OnMode = "convert"
    """Images that are not plain 8-bit RGB or grey (palettes, CMYK, 16 bits, transparency): made RGB, or bad rows."""
    max_pixels: int = MAX_PIXELS
    """Larger images are bad rows, before they are decoded: a small file may hold a picture that fills the memory."""
    ties: Literal["drop", "keep"] = "drop"
    """Pairs without a winner: left out, or kept and marked by the column `tie`."""
    resolution: int | None = None
    """Images get about the area of a square of this side; by default that of the model."""
    buckets: Literal["square", "aspect"] = "square"
    """Crop all images to squares, or to the nearest of several ratios of sides."""
    flip: bool = False
    """Turn a random half of the images left to right; not for captions that tell left from right."""
    t5_states: str | None = None
    """File or folder of T5 states of all captions and of the empty one (`write_t5_states`), for SD3; else zeros."""
    caption_dropout: float = 0.0
    """Probability that a row's captions become empty in a step, which keeps guidance working; 0.2 is usual."""
    offset_noise: float = 0.0
    """Strength of one more Gaussian shift of each image and channel."""
    cache: str | None = None
    """Folder of latents and text states, which runs may share; OUT/cache by default."""
    encode_batch: int = 16
    """Images that the autoencoder takes at a time, on all devices."""


def image_train_config_class(chosen: Method) -> type:
    """Dataclass of all options of `dpo-jax train METHOD` for a method of the diffusion wing."""
    parts = {
        "model": ImageModelConfig,
        "adapters": ImageAdapterConfig,
        "data": ImageDataConfig,
        "loss": options_class(chosen),
        "optimizer": OptimizerConfig,
        "loop": LoopConfig,
        "mesh": MeshConfig,
        "output": OutputConfig,
    }
    fields = [(name, part, field(default_factory=part)) for name, part in parts.items()]
    return make_dataclass("ImageTrainConfig", fields, frozen=True, namespace={"__doc__": f"{chosen.summary}."})

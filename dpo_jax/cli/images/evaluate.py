"""`dpo-jax evaluate` for diffusion models: what rewards say of their images, before and after, on shared seeds."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from dpo_jax.cli.checks import check_ranges, mesh_of
from dpo_jax.cli.configs import MeshConfig
from dpo_jax.cli.console import OutputConfig, UsageError, result, say
from dpo_jax.cli.images.configs import ImageModelConfig
from dpo_jax.cli.images.generate import conditions_of, load_with_adapter, read_prompts, require_adapter, write_images
from dpo_jax.cli.images.models import HUB_ID, OpenPipeline, open_images
from dpo_jax.cli.images.sampling import ImageSampler, SamplingConfig, check_sampling
from dpo_jax.cli.images.texts import open_t5, require_states
from dpo_jax.cli.processes import is_first, join_processes
from dpo_jax.diffusion.rewards.load import check_reward, load_reward
from dpo_jax.diffusion.rewards.scores import win_rate
from dpo_jax.report import table
from dpo_jax.statistics import wilson_interval


@dataclass(frozen=True)
class ImageEvaluateConfig:
    """Rewards of a model's images, their diversity, and how often they beat another model's on the same seeds."""

    model: str
    """Folder of a diffusers pipeline, a hub id, or the folder of a run (its export)."""
    data: tuple[str, ...] = ()
    """Files of rows with a caption or prompt, JSONL or JSONL.gz, or folders with metadata.jsonl."""
    prompt: tuple[str, ...] = ()
    """Prompts."""
    reference_model: str | None = None
    """The model that it was trained from, or another one with latents of the same shape, for win rates."""
    adapter: str | None = None
    """File or folder of an adapter of the model, in diffusers' naming."""
    reward: tuple[Literal["pickscore", "hps", "clip", "aesthetic"], ...] = ()
    """Rewards, each of the folder in the same place of --reward-model."""
    reward_model: tuple[str, ...] = ()
    """Folders or files of the rewards' weights (safetensors), or hub ids."""
    reward_tokenizer: str | None = None
    """Folder or hub id of CLIP's tokenizer for all rewards that read text; by default each takes that of its folder."""
    t5_states: str | None = None
    """File or folder of T5 states of the prompts and the negative prompt (`write_t5_states`), for SD3; else zeros."""
    samples: int = 1
    """Images of each prompt; diversity needs at least 2."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    seed: int = 0
    """Of all noise, the same for both models."""
    out: str | None = None
    """Folder for the images; they are not kept without it."""
    batch_size: int = 8
    """Images at a time."""
    vae_tiling: bool = False
    """Decode images larger than the autoencoder's own size in tiles, which saves memory; seams are blended."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type that the denoisers compute in."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    output: OutputConfig = field(default_factory=OutputConfig)


def evaluate_images(config: ImageEvaluateConfig) -> None:
    """Draw, score and print.

    Raises:
      UsageError: options missing, out of range or without effect; a reference with latents of another shape.
    """
    check_ranges(config)
    check_sampling(config.sampling)
    require_adapter(config.adapter)
    if len(config.reward) != len(config.reward_model):
        raise UsageError(f"{len(config.reward)} rewards and {len(config.reward_model)} folders; give one for each")
    prompts = [*config.prompt, *read_prompts(config.data)]
    if not prompts:
        raise UsageError("evaluate needs prompts: give --prompt or --data")
    if not config.reward and config.samples < 2:
        raise UsageError("nothing to measure: give --reward with --reward-model, or --samples of at least 2")
    check_rewards(config)
    if config.mesh.distributed:
        join_processes()
    mesh = mesh_of(config.mesh)
    options = ImageModelConfig(dtype=config.dtype, param_dtype=config.dtype, vae_tiling=config.vae_tiling)
    model = open_images(config.model, options)
    folders = {"model": (model, config.adapter)}
    if config.reference_model is not None:
        other = open_images(config.reference_model, options)
        require_same_noise(model, other, config.sampling)
        folders["reference"] = (other, None)
    states = {name: open_t5(opened, config.t5_states) for name, (opened, _) in folders.items()}
    for t5 in states.values():
        require_states(t5, [*prompts, config.sampling.negative_prompt])
    samplers = {
        name: ImageSampler(opened, config.sampling, mesh, batch_size=config.batch_size)
        for name, (opened, _) in folders.items()
    }
    images: dict[str, np.ndarray] = {}
    for name, (opened, adapter) in folders.items():
        # Each with its own text encoders, process and autoencoder: the models are judged, not their denoisers.
        say(f"{len(prompts) * config.samples} images of {opened.pipeline.folder}")
        conditions, empty = conditions_of(opened, prompts, config.sampling, states[name])
        repeated = [condition for condition in conditions for _ in range(config.samples)]
        variables = load_with_adapter(opened, adapter, mesh)
        images[name] = samplers[name](variables, repeated, empty, range(len(repeated)), config.seed)
        if config.out is not None and is_first():
            write_images(Path(config.out) / name, prompts, images[name], config.samples, config.seed)
    texts = [prompt for prompt in prompts for _ in range(config.samples)]
    values: dict[str, float] = {"prompts": len(prompts), "images": len(texts)}
    for name, drawn in images.items():
        if config.samples > 1:
            values[f"{name}_diversity"] = diversity(drawn, config.samples)
    for name, folder in zip(config.reward, config.reward_model):
        reward = load_reward(name, folder, mesh, tokenizer=config.reward_tokenizer)
        scores = {which: reward.score(list(drawn), texts) for which, drawn in images.items()}
        for which, numbers in scores.items():
            values[f"{which}_{name}"] = float(np.mean(numbers))
        if "reference" in scores:
            values |= win_rates(name, scores["model"], scores["reference"])
    if is_first():
        text = table([(name, f"{value:.4f}") for name, value in values.items()], ("measure", "value"))
        result({"model": config.model, **values}, text, as_json=config.output.json)


def require_same_noise(model: OpenPipeline, other: OpenPipeline, config: SamplingConfig) -> None:
    """Raise UsageError if two pipelines' latents have other shapes, so that a seed gives them other noise."""

    def shape(one: OpenPipeline) -> list[int]:
        sides = (config.height or one.resolution, config.width or one.resolution)
        return [*(side // one.factor for side in sides), one.config.in_channels]

    if shape(other) != shape(model):
        raise UsageError(
            f"{other.pipeline.folder} has latents of {shape(other)} and {model.pipeline.folder} of {shape(model)}; "
            "win rates are of images from the same noise, which needs one shape"
        )


def check_rewards(config: ImageEvaluateConfig) -> None:
    """Find the files of all rewards before an image is drawn.

    Raises:
      UsageError: no such folder, a tokenizer that nothing reads.
      WeightsError: files that are missing or pickled.
    """
    places = [("--reward-model", folder) for folder in config.reward_model]
    if config.reward_tokenizer is not None:
        if not set(config.reward) - {"aesthetic"}:
            raise UsageError("--reward-tokenizer has no effect: no --reward reads text")
        places.append(("--reward-tokenizer", config.reward_tokenizer))
    for option, place in places:
        if not Path(place).exists() and not re.fullmatch(HUB_ID, place):
            raise UsageError(f"{option} {place}: no such file or folder; give one, or a hub id")
    for name, folder in zip(config.reward, config.reward_model):
        check_reward(name, folder, tokenizer=config.reward_tokenizer)


def diversity(images: np.ndarray, samples: int) -> float:
    """Mean root mean squared difference, in units of the range of colours, between two images of one prompt.

    Args:
      images: uint8 [N * samples, H, W, 3], those of a prompt being neighbours.
      samples: at least 2.
    """
    several = images.reshape(-1, samples, int(np.prod(images.shape[1:]))).astype(np.float64) / 255
    pairs = [(i, j) for i in range(samples) for j in range(i)]
    gaps = [np.sqrt(np.square(several[:, i] - several[:, j]).mean(-1)) for i, j in pairs]
    return float(np.mean(gaps))


def win_rates(name: str, scores: np.ndarray, others: np.ndarray) -> dict[str, float]:
    """Share of images that score above the other model's of the same noise, ties counting half, and its interval."""
    compared = win_rate(scores, others)
    rate = compared.wins + compared.ties / 2
    low, high = wilson_interval(rate * len(scores), len(scores))
    return {f"{name}_win_rate": rate, f"{name}_win_rate_low": low, f"{name}_win_rate_high": high}

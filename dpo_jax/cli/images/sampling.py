"""Images of prompts: one jitted rollout for all of them, the same seeds for the same prompts whatever the batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dpo_jax.cli.checks import check_ranges
from dpo_jax.cli.console import UsageError
from dpo_jax.cli.images.models import OpenPipeline, denoiser_function, image_decoder
from dpo_jax.diffusion.models.scheduler import Noising
from dpo_jax.diffusion.sampler import Guidance, dpm_solver_steps, euler_steps, flow_euler_steps, guided, sample
from dpo_jax.diffusion.schedule import flow_sigmas
from dpo_jax.diffusion.transitions import ddim_steps, ddpm_steps
from dpo_jax.diffusion.types import Step, TextCondition
from dpo_jax.sharding import data_shards, shard_batch
from dpo_jax.types import PyTree

Sampler = Literal["auto", "ddim", "ddpm", "euler", "dpm-solver", "flow-euler"]


@dataclass(frozen=True)
class SamplingConfig:
    """How images are drawn."""

    sampler: Sampler = "auto"
    """Of the rollout; by default DDIM, and Euler on straight paths."""
    sampling_steps: int = 50
    """Calls of the model for an image."""
    eta: float = 0.0
    """Share of DDPM's noise that DDIM adds again in every step."""
    guidance: float = 7.5
    """Scale of classifier-free guidance; 1 is the model as it is."""
    guidance_rescale: float = 0.0
    """Share in which guided predictions get back the spread of unguided ones (arXiv 2305.08891)."""
    negative_prompt: str = ""
    """What guidance leads away from."""
    height: int | None = None
    """Of the images; by default that of the model."""
    width: int | None = None
    """Of the images; by default that of the model."""


def check_sampling(config: SamplingConfig, *, negative_model: bool = False) -> None:
    """Raise UsageError for options that are out of range, and for those of guidance where there is none."""
    check_ranges(config)
    given = {
        "--negative-prompt": bool(config.negative_prompt),
        "--negative-model": negative_model,
        "--guidance-rescale": config.guidance_rescale > 0,
    }
    if config.guidance == 1 and (idle := [name for name, used in given.items() if used]):
        raise UsageError(f"{', '.join(idle)} has no effect with --guidance 1")


def steps_of(model: OpenPipeline, config: SamplingConfig) -> Step:
    """The sampler's table.

    Raises:
      UsageError: a sampler that the model's process does not have, or an eta that it does not read.
    """
    noising, count = model.pipeline.noising, config.sampling_steps
    flow = model.process.schedule is None
    name = config.sampler if config.sampler != "auto" else "flow-euler" if flow else "ddim"
    if flow != (name == "flow-euler"):
        kind = "straight paths" if flow else "a noise schedule"
        raise UsageError(f"--sampler {name}: the model was trained on {kind}; leave the option out")
    if config.eta and name != "ddim":
        raise UsageError(f"--eta has no effect with --sampler {name}")
    try:
        if model.process.schedule is None:
            return flow_euler_steps(flow_sigmas(count, shift=model.process.shift))
        schedule, grid = model.process.schedule, _timesteps_of(noising, name, count)
        if name == "ddim":
            last = 1.0 if noising.clean_end else None
            return ddim_steps(schedule, grid, eta=config.eta, last_alpha_cumprod=last)
        makers = {"ddpm": ddpm_steps, "euler": euler_steps, "dpm-solver": dpm_solver_steps}
        return makers[name](schedule, grid)
    except ValueError as error:
        raise UsageError(f"--sampling-steps {count}: {error}") from error


def _timesteps_of(noising: Noising, sampler: str, count: int) -> np.ndarray:
    """The sampler's falling grid [count], where diffusers' scheduler of the same config has it."""
    assert noising.process.schedule is not None
    if sampler == "dpm-solver" and noising.timestep_spacing != "trailing":
        return noising.timesteps(count + 1)[:-1]  # its last step is longer, to clean latents
    if sampler == "euler" and noising.timestep_spacing == "linspace":
        return np.linspace(0, noising.process.schedule.timesteps - 1, count)[::-1]  # not rounded
    return noising.timesteps(count)


class ImageSampler:
    """A pipeline's sampler, compiled once for a batch size; made by `ImageSampler(...)`, called for prompts.

    Attributes:
      shape: of the latents of an image.
    """

    def __init__(
        self, model: OpenPipeline, config: SamplingConfig, mesh: Mesh, *, batch_size: int, two_networks: bool = False
    ):
        side, factor, step = model.resolution, model.factor, model.size_step
        sizes = (config.height or side, config.width or side)
        if any(size < step or size % step for size in sizes):
            raise UsageError(f"images of {sizes[0]} x {sizes[1]}; give multiples of {step}")
        channels = model.config.in_channels
        self.shape = (sizes[0] // factor, sizes[1] // factor, channels)
        self._mesh, self._batch = mesh, -(-batch_size // data_shards(mesh)) * data_shards(mesh)
        steps, process, apply = steps_of(model, config), model.process, denoiser_function(model)
        shape, scale, rescale = self.shape, config.guidance, config.guidance_rescale

        def draw(variables: PyTree, negative: PyTree, keys: Any, positive: TextCondition, empty: TextCondition):
            noise = jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
            predict, other = partial(apply, variables), partial(apply, negative) if two_networks else None
            model_of, condition = predict, positive
            if scale != 1 or two_networks:
                model_of = guided(predict, scale, negative_predict=other, rescale=rescale)
                condition = Guidance(positive, empty)
            later = jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys)
            kind = process.parameterisation
            return sample(model_of, noise, steps, condition, parameterisation=kind, key=later).latents

        self._draw, self._decode = jax.jit(draw), image_decoder(model, mesh)

    def __call__(
        self,
        variables: PyTree,
        prompts: Sequence[TextCondition],
        empty: TextCondition,
        numbers: Sequence[int],
        seed: int,
        *,
        negative: PyTree = None,
    ) -> np.ndarray:
        """Images uint8 [N, H, W, 3], on every process.

        Args:
          variables: of the denoiser.
          prompts: a condition for each image, leaves [1, ...].
          empty: what guidance leads away from, leaves [1, ...].
          numbers: of each image, of which the noise is made: the same number gives the same noise.
          seed: of all noise.
          negative: variables of the second network of `two_networks`.
        """
        count, parts = len(prompts), []
        keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(np.asarray(numbers, np.uint32))
        data = np.asarray(jax.random.key_data(keys))
        host, hosts = jax.process_index(), jax.process_count()
        share = self._batch // hosts
        for start in range(0, count, self._batch):
            places = [min(start + i, count - 1) for i in range(self._batch)][host * share : (host + 1) * share]
            positive = jax.tree.map(lambda *leaves: np.concatenate(leaves), *(prompts[place] for place in places))
            away = jax.tree.map(lambda leaf: np.repeat(leaf, share, axis=0), empty)
            with jax.set_mesh(self._mesh):
                rows = shard_batch((data[places], positive, away), self._mesh)
                latents = self._draw(variables, negative, jax.random.wrap_key_data(rows[0]), rows[1], rows[2])
                images = self._decode(latents)
            whole = images if images.is_fully_addressable else multihost_utils.process_allgather(images, tiled=True)
            parts.append(np.rint((np.asarray(whole) + 1) * 127.5).astype(np.uint8))
        return np.concatenate(parts)[:count]


def grid_of(images: np.ndarray, columns: int) -> np.ndarray:
    """Images [N, H, W, 3] as one, row by row, with a white line between them; uint8."""
    count, height, width = images.shape[:3]
    rows = -(-count // columns)
    whole = np.full((rows * (height + 2) - 2, columns * (width + 2) - 2, 3), 255, np.uint8)
    for place, image in enumerate(images):
        top, left = place // columns * (height + 2), place % columns * (width + 2)
        whole[top : top + height, left : left + width] = image
    return whole

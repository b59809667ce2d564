"""`dpo-jax demo --diffusion`: from random weights to an aligned image model on the shapes world, judged exactly.

A small UNet and a caption encoder learn from captioned shapes, whose colours are pale or pure, in the latents of an
autoencoder that is given (`worlds.halving`); the model draws images of its own, the judge pairs the most with the least
saturated one of each caption, Diffusion-DPO trains on the pairs against the frozen start, and fresh captions show how
many images are saturated now, and whether they still show what the captions say.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from dpo_jax.cli.console import OutputConfig, UsageError, result, say
from dpo_jax.cli.demo_training import open_folder, trained
from dpo_jax.cli.images.configs import ImageModelConfig
from dpo_jax.cli.images.generate import conditions_of
from dpo_jax.cli.images.models import OpenPipeline, denoiser_function, open_images
from dpo_jax.cli.images.sampling import ImageSampler, SamplingConfig, grid_of
from dpo_jax.cli.loop import Course
from dpo_jax.diffusion.data.batches import ImageExample, batches
from dpo_jax.diffusion.methods import diffusion_dpo_sft_loss, diffusion_sft_loss
from dpo_jax.diffusion.models.folder import save_pipeline
from dpo_jax.diffusion.models.scheduler import noising_from_dict
from dpo_jax.diffusion.objectives import from_loss
from dpo_jax.diffusion.types import DiffusionBatch, TextCondition
from dpo_jax.optimizers import OptimizerConfig
from dpo_jax.report import table
from dpo_jax.sharding import data_shards, make_mesh
from dpo_jax.statistics import wilson_interval
from dpo_jax.types import PyTree
from dpo_jax.worlds import halving, shape_models, shapes

SATURATED = 0.8  # from this saturation on, of 0.5 to 1 in the data, the judge is content
CHANNELS = (32, 64)
NO_CAPTION = 0.1  # share of captions that are left out, so that the model may be guided


@dataclass(frozen=True)
class ImageDemoConfig:
    """A small image model from scratch, own samples judged into pairs, Diffusion-DPO, judged before and after."""

    out: str
    """Folder of the run: the start as a pipeline, checkpoints, metrics, grids of images, the aligned pipeline."""
    seed: int = 0
    """Of everything random."""
    base_steps: int = 600
    """Steps of training on captioned shapes, 32 images each."""
    prompts: int = 300
    """Captions that the model draws images of for the pairs."""
    samples: int = 4
    """Images of each of them."""
    steps: int = 80
    """Steps of Diffusion-DPO, 16 pairs each."""
    beta: float = 1000.0
    """Strength of the constraint to the start."""
    sft_coef: float = 100.0
    """Weight of the chosen image's own error, which keeps it likely."""
    learning_rate: float = 2e-4
    """Of Diffusion-DPO, constant."""
    test_prompts: int = 300
    """Fresh captions that are judged before and after, one image each."""
    sampling_steps: int = 10
    """Calls of the model for an image."""
    output: OutputConfig = field(default_factory=OutputConfig)


def demo_images(config: ImageDemoConfig) -> None:
    """Run the demo and print what it gained.

    Raises:
      UsageError: the folder holds another run; no caption got images that differ.
    """
    begun, out = time.perf_counter(), open_folder(config, "diffusion-dpo")
    mesh = make_mesh()
    say(f"base: {config.base_steps} steps on captioned shapes of {shapes.SIZE} x {shapes.SIZE} pixels")
    train_base(config, out, mesh)
    model = open_images(str(out / "base"), ImageModelConfig())
    variables = model.load(mesh)
    sampling = SamplingConfig(sampling_steps=config.sampling_steps, guidance=1.0)
    sampler = ImageSampler(model, sampling, mesh, batch_size=100)
    before = judged(config, model, sampler, sampling, variables, out / "before.png")
    examples, store = own_pairs(config, model, sampler, sampling, variables)
    if not examples:
        raise UsageError("no caption got images of different saturation; give more --prompts or --samples")
    say(f"{len(examples)} pairs, from {config.prompts} captions x {config.samples} images")
    objective = from_loss(diffusion_dpo_sft_loss, model.process, beta=config.beta, sft_coef=config.sft_coef)
    size = -(-16 // data_shards(mesh)) * data_shards(mesh)
    stream = counted(batches(examples, store, batch_size=size, seed=config.seed))
    optimizer = OptimizerConfig(learning_rate=config.learning_rate, schedule="constant", warmup=10, weight_decay=0.0)
    course = Course(config.steps, 10, 0, 0, "diffusion-dpo", "images")
    function, rules = denoiser_function(model), model.rules
    aligned, _ = trained(
        out, course, objective, function, variables, stream, optimizer, mesh, rules, config, reference=True
    )
    after = judged(config, model, sampler, sampling, aligned, out / "after.png")
    save_pipeline(out / "export", model.pipeline, aligned)
    report(config, before, after, len(examples), time.perf_counter() - begun)


def train_base(config: ImageDemoConfig, out: Path, mesh: Mesh) -> None:
    """Train UNet and caption encoder from scratch, and write their moving average as the pipeline OUT/base."""
    autoencoder = halving.halving_config()
    shape = shape_models.denoiser_config(CHANNELS, size=shapes.SIZE // autoencoder.factor)
    captions = shapes.make_captions(8000, config.seed)
    latents = halving.latents_of(shapes.make_images(captions, config.seed))
    ids = shape_models.token_ids(captions)
    empty = shape_models.token_ids([""])
    size = -(-32 // data_shards(mesh)) * data_shards(mesh)

    def stream() -> Iterator[DiffusionBatch]:
        random = np.random.default_rng([config.seed, 1])
        while True:
            places = random.integers(len(latents), size=size)
            told = np.where(random.random(size)[:, None] < NO_CAPTION, empty, ids[places])
            yield DiffusionBatch(latents[places][:, None], told[:, None], np.ones(size, np.float32), {})

    objective = from_loss(diffusion_sft_loss, noising_from_dict(shape_models.SCHEDULER).process)
    optimizer = OptimizerConfig(learning_rate=2e-3, schedule="cosine", warmup=10, final_learning_rate=0.05, b2=0.99)
    course = Course(config.base_steps, 20, 0, 0, "base", "images")
    start = shape_models.init_variables(shape, jax.random.key(config.seed))
    function, rules = shape_models.joint_function(shape), shape_models.RULES
    run, images_of = out / "base_run", counted(stream())
    base, _ = trained(
        run, course, objective, function, start, images_of, optimizer, mesh, rules, config, ema_decay=0.99
    )
    whole = {**base, "vae": halving.halving_variables()}
    shape_models.save_shape_pipeline(out / "base", shape, whole, autoencoder)


def counted(stream: Iterable[DiffusionBatch]) -> Iterator[tuple[DiffusionBatch, int]]:
    """Batches, and the number of images in each."""
    return ((batch, batch.latents.shape[0] * batch.latents.shape[1]) for batch in stream)


def judged(
    config: ImageDemoConfig,
    model: OpenPipeline,
    sampler: ImageSampler,
    sampling: SamplingConfig,
    variables: PyTree,
    grid: Path,
) -> list[shapes.Verdict]:
    """Verdicts on one image of each fresh caption, from the same noise every time; a grid of the first images."""
    captions = shapes.make_captions(config.test_prompts, config.seed + 1_000_003)
    images, _ = draw(model, sampler, sampling, variables, captions, 1, config.seed)
    Image.fromarray(grid_of(images[:64], 8)).save(grid)
    return [shapes.judge(caption, image / 127.5 - 1) for caption, image in zip(captions, images)]


def draw(
    model: OpenPipeline,
    sampler: ImageSampler,
    sampling: SamplingConfig,
    variables: PyTree,
    captions: Sequence[str],
    samples: int,
    seed: int,
) -> tuple[np.ndarray, list[TextCondition]]:
    """Images uint8 of captions, those of one being neighbours, and each caption's condition."""
    conditions, empty = conditions_of(model, captions, sampling)
    repeated = [condition for condition in conditions for _ in range(samples)]
    return sampler(variables, repeated, empty, range(len(repeated)), seed), conditions


def own_pairs(
    config: ImageDemoConfig, model: OpenPipeline, sampler: ImageSampler, sampling: SamplingConfig, variables: PyTree
) -> tuple[list[ImageExample], dict[str, dict[str, np.ndarray]]]:
    """The most and the least saturated image of each caption, and what batches are made of.

    Images that show more shapes than the caption names count for less: stray colour is no merit.
    """
    captions = shapes.make_captions(config.prompts, config.seed + 2_000_003)
    images, conditions = draw(model, sampler, sampling, variables, captions, config.samples, config.seed + 1)
    pixels = images.astype(np.float32) / 127.5 - 1
    several, latents = (
        array.reshape(config.prompts, config.samples, *array.shape[1:])
        for array in (pixels, halving.latents_of(pixels))
    )
    examples, store = [], {}
    for number, (caption, condition) in enumerate(zip(captions, conditions)):
        verdicts = [shapes.judge(caption, image) for image in several[number]]
        scores = [verdict.count * verdict.saturation for verdict in verdicts]
        best, worst = int(np.argmax(scores)), int(np.argmin(scores))
        if scores[best] == scores[worst]:
            continue
        keys = f"{number}/chosen", f"{number}/rejected"
        store |= {key: {"latents": latents[number, place]} for key, place in zip(keys, (best, worst))}
        store[caption] = {"states": np.asarray(condition.states[0])}
        examples.append(ImageExample(keys, (caption,)))
    return examples, store


def report(
    config: ImageDemoConfig,
    before: Sequence[shapes.Verdict],
    after: Sequence[shapes.Verdict],
    pairs: int,
    seconds: float,
) -> None:
    """Print the share of saturated images before and after with intervals, and what the judge says besides."""
    total = config.test_prompts
    values: dict[str, Any] = {"seconds": seconds, "pairs": pairs, "out": config.out}
    rows = []
    for name, verdicts in (("before", before), ("after", after)):
        count = sum(verdict.saturation >= SATURATED for verdict in verdicts)
        low, high = wilson_interval(count, total)
        score = float(np.mean([verdict.score for verdict in verdicts]))
        values |= {f"saturated_{name}": count / total, f"saturated_{name}_interval": [low, high]}
        values |= {f"score_{name}": score, f"saturation_{name}": float(np.mean([v.saturation for v in verdicts]))}
        rows.append((name, f"{count / total:.3f}", f"{low:.3f} to {high:.3f}", f"{score:.3f}"))
    text = [
        f"images of {total} fresh captions from the same noise; the judge wants a saturation of {SATURATED} or more",
        table(rows, ("model", "saturated", "95% interval", "caption score")),
        f"{pairs} pairs of its own; {seconds:.0f} s; before.png, after.png, pipelines base and export in {config.out}",
    ]
    result(values, "\n".join(text), as_json=config.output.json)

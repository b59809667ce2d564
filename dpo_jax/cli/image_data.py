"""From image files to the examples of a run: rows, forms, latents and text states in the cache, every loss reported."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache as cache_call
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dpo_jax.cli.console import UsageError, say
from dpo_jax.cli.data import report_skipped
from dpo_jax.cli.image_configs import ImageDataConfig
from dpo_jax.cli.image_models import OpenPipeline, image_encoder, text_encoder
from dpo_jax.diffusion.data.batches import ImageExample, steps_per_epoch
from dpo_jax.diffusion.data.cache import Cache, Entry, content_key, fill
from dpo_jax.diffusion.data.forms import FormError, to_form
from dpo_jax.diffusion.data.images import Bucket, Prepared, make_buckets, prepare, size_conditions
from dpo_jax.diffusion.data.rows import ImageRow, check_images, load_images, read_rows
from dpo_jax.sharding import data_shards

T5_STATES = "t5_states"  # column of states that another program made of the caption, for models that read them
_SAID_EVERY = 30.0  # seconds between two lines of progress


@dataclass(frozen=True)
class PreparedImages:
    """The data of a run.

    Attributes:
      train, held_out: examples, whose arrays are in the cache.
      cache: latents and text states.
      empty: key of the empty caption.
      steps: optimizer steps of the run.
    """

    train: list[ImageExample]
    held_out: list[ImageExample]
    cache: Cache
    empty: str
    steps: int


def read_image_rows(
    paths: Sequence[str], config: ImageDataConfig, form: str, out: Path | None, seed: int
) -> list[ImageRow]:
    """Rows of a form whose images can all be decoded; says what was left out.

    Raises:
      RowError: a bad row or image, unless they are skipped.
      UsageError: files that do not exist, rows that cannot take the form.
      ValueError: no row is left.
    """
    if missing := [path for path in paths if not Path(path).exists()]:
        raise UsageError(f"no such file: {', '.join(missing)}")
    read = read_rows(paths, on_bad_row=config.on_bad_row, ties=config.ties)
    if read.ties:
        say(f"{len(read.ties)} pairs without a winner left out")
    checked = check_images(read.rows, on_bad_row=config.on_bad_row)
    if skipped := [*read.skipped, *checked.skipped]:
        report_skipped(skipped, out)
    if not checked.rows:
        raise ValueError(f"no row is left of {', '.join(paths)}")
    try:
        rows = to_form(checked.rows, form, seed=seed)
    except FormError as error:
        raise UsageError(str(error)) from error
    if checked.rows[0].form != form:
        say(f"{len(checked.rows)} rows of {checked.rows[0].form} give {len(rows)} of {form}")
    return rows


def prepare_images(config: Any, form: str, model: OpenPipeline, mesh: Mesh, out: Path) -> PreparedImages:
    """Examples with their latents and text states made, and the course of a training run.

    Raises:
      RowError, UsageError, ValueError: as `read_image_rows`; all rows held out.
    """
    data, seed = config.data, config.loop.seed
    rows = read_image_rows(data.data, data, form, out, seed)
    if data.eval_data:
        held = read_image_rows(data.eval_data, data, form, None, seed)
        train = rows
    else:
        order = np.random.default_rng(seed).permutation(len(rows))
        count = round(data.held_out * len(rows)) if data.held_out < 1 else int(data.held_out)
        held, train = [rows[i] for i in sorted(order[:count])], [rows[i] for i in sorted(order[count:])]
    if not train:
        raise ValueError(f"all {len(rows)} rows are held out; lower --held-out")
    cache = Cache(data.cache or out / "cache")
    if cache.broken:
        say(f"{len(cache.broken)} broken files of {cache.folder} are passed over; what they held is made again")
    examples, empty = encode_rows([*train, *held], data, model, mesh, cache)
    size = config.loop.batch_size
    train_examples, held_examples = examples[: len(train)], examples[len(train) :]
    steps = config.loop.steps or max(1, round(config.loop.epochs * steps_per_epoch(train_examples, size)))
    shapes = sorted({example.bucket for example in train_examples})
    say(
        f"{len(train)} rows of {form} to train on, {len(held)} held out; {steps} steps of {size}, "
        f"images of {', '.join(f'{height} x {width}' for height, width in shapes)}"
    )
    return PreparedImages(train_examples, held_examples, cache, empty, steps)


def encode_rows(
    rows: Sequence[ImageRow], config: ImageDataConfig, model: OpenPipeline, mesh: Mesh, cache: Cache
) -> tuple[list[ImageExample], str]:
    """Examples of rows, their latents and text states in the cache; and the key of the empty caption."""
    buckets = model_buckets(config, model)
    options = [tuple(bucket) for bucket in buckets]
    fingerprint = model.image_fingerprint()

    def prepared_images(row: ImageRow) -> Prepared:
        pixels = load_images(row)
        return prepare(pixels, buckets, random=_random(pixels, config), flip=0.5 if config.flip else 0.0)

    jobs: list[tuple[int, int]] = []  # row, image
    keys: list[str] = []
    by_bucket: dict[Bucket, list[int]] = {}
    shapes: list[Prepared] = []
    for number, row in enumerate(rows):
        prepared = prepared_images(row)
        shapes.append(prepared._replace(images=np.zeros(0, np.float32)))
        for place, pixels in enumerate(prepared.images):
            by_bucket.setdefault(prepared.bucket, []).append(len(jobs))
            jobs.append((number, place))
            keys.append(content_key(fingerprint, str(options), config.flip, pixels.tobytes()))

    encoder = cache_call(lambda: image_encoder(model, mesh))  # weights are read only if something is missing

    def maker(bucket_jobs: list[int]) -> Callable[[list[int]], Sequence[Entry]]:
        def make(places: list[int]) -> Sequence[Entry]:
            wanted = [jobs[bucket_jobs[place]] for place in places]
            return encoder()(np.stack([prepared_images(rows[number]).images[image] for number, image in wanted]))

        return make

    together = -(-config.encode_batch // data_shards(mesh)) * data_shards(mesh)
    for bucket, places in by_bucket.items():
        _fill(cache, [keys[place] for place in places], maker(places), together, f"latents of {tuple(bucket)}")
    text_keys = _encode_texts(rows, model, cache, together)
    examples, image_keys = [], iter(keys)
    for row, prepared, captions in zip(rows, shapes, text_keys.of_rows, strict=True):
        examples.append(
            ImageExample(
                images=tuple(next(image_keys) for _ in row.images),
                captions=captions,
                bucket=tuple(prepared.bucket),
                sizes=size_conditions(prepared) if model.wants_sizes else None,
                columns={name: value for name, value in row.columns.items() if name != T5_STATES},
            )
        )
    return examples, text_keys.empty


class _TextKeys(NamedTuple):
    """Keys of the captions of each row, and of the empty one."""

    of_rows: list[tuple[str, ...]]
    empty: str


def _encode_texts(rows: Sequence[ImageRow], model: OpenPipeline, cache: Cache, together: int) -> _TextKeys:
    """Text states of all captions in the cache, each text (with the T5 states that its row gives) once."""
    fingerprint, texts, keys = model.text_fingerprint(), [], []
    shape: tuple[int, ...] = ()

    def key(text: str, t5: np.ndarray | None) -> str:
        texts.append((text, t5))
        keys.append(content_key(fingerprint, text, b"" if t5 is None else t5.tobytes()))
        return keys[-1]

    of_rows = []
    for row in rows:
        t5 = None if T5_STATES not in row.columns else np.asarray(row.columns[T5_STATES], np.float32)
        shape = shape if t5 is None else t5.shape
        of_rows.append(tuple(key(caption, t5) for caption in (row.captions or (row.caption,))))
    empty = key("", np.zeros(shape, np.float32) if shape else None)
    encoder = cache_call(lambda: text_encoder(model))

    def make(places: list[int]) -> Sequence[Entry]:
        return encoder()(*zip(*(texts[place] for place in places)))

    _fill(cache, keys, make, together, "text states")
    return _TextKeys(of_rows, empty)


def model_buckets(config: ImageDataConfig, model: OpenPipeline) -> tuple[Bucket, ...]:
    """Sizes that images are cropped to.

    Raises:
      UsageError: a resolution that the model cannot take.
    """
    side, step = config.resolution or model.resolution, model.size_step
    if side % step or side < step:
        raise UsageError(f"--resolution is {side}; give a multiple of {step}")
    if config.buckets == "square":
        return (Bucket(side, side),)
    return make_buckets(side * side, step=max(step, side // 16 // step * step))


def _random(pixels: Sequence[np.ndarray], config: ImageDataConfig) -> np.random.Generator | None:
    """The same turns for the same images in every run: latents are made once."""
    if not config.flip:
        return None
    digest = content_key(*(image.tobytes() for image in pixels))
    return np.random.default_rng(int(digest, 16))


def _fill(cache: Cache, keys: list[str], make: Any, together: int, what: str) -> None:
    """Make what is missing, and say how far it is."""
    last, begun = time.perf_counter(), time.perf_counter()

    def progress(done: int, missing: int) -> None:
        nonlocal last
        if time.perf_counter() - last > _SAID_EVERY or (done == missing and missing > together):
            last = time.perf_counter()
            say(f"{what}: {done} of {missing} made, {last - begun:.0f} s")

    fill(cache, keys, make, together=together, host=jax.process_index(), hosts=jax.process_count(), progress=progress)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)
        cache.refresh()

"""From image files to the examples of a run: rows, forms, latents and text states in the cache, every loss reported."""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache as cache_call
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dpo_jax.cli.catalogue import Method
from dpo_jax.cli.console import UsageError, say
from dpo_jax.cli.data import report_skipped
from dpo_jax.cli.images.checks import check_columns, check_objective
from dpo_jax.cli.images.configs import ImageDataConfig
from dpo_jax.cli.images.models import OpenPipeline, image_encoder
from dpo_jax.cli.images.texts import halved, lacking, open_t5, require_states, text_encoder, text_key
from dpo_jax.cli.processes import agreed, from_all, true_everywhere
from dpo_jax.diffusion.data.batches import ImageExample, steps_per_epoch
from dpo_jax.diffusion.data.cache import Cache, Entry, content_key, fill
from dpo_jax.diffusion.data.decoding import THREADS, ImagesChecked, check_images, load_image
from dpo_jax.diffusion.data.forms import FormError, to_form
from dpo_jax.diffusion.data.images import Bucket, Framing, cut, frame, make_buckets, size_conditions
from dpo_jax.diffusion.data.parsing import ImageRow
from dpo_jax.diffusion.data.places import Place
from dpo_jax.diffusion.data.rows import RowsRead, read_rows
from dpo_jax.diffusion.data.seen import SeenImage, SeenRecord
from dpo_jax.diffusion.data.t5_states import T5States
from dpo_jax.rows import RowError
from dpo_jax.sharding import data_shards

Seen = Mapping[Place, SeenImage]

_SAID_EVERY = 30.0  # seconds between two lines of progress


@dataclass(frozen=True)
class PreparedImages:
    """The data of a run.

    Attributes:
      train, held_out: examples, whose arrays are in the cache.
      cache: latents and text states.
      empty: key of the empty caption, which stands for those that are dropped.
      no_text: key of no text at all, what guidance leads away from.
      steps: optimizer steps of the run.
    """

    train: list[ImageExample]
    held_out: list[ImageExample]
    cache: Cache
    empty: str
    no_text: str
    steps: int


def read_image_rows(
    paths: Sequence[str],
    config: ImageDataConfig,
    form: str,
    out: Path | None,
    seed: int,
    record: SeenRecord | None = None,
) -> tuple[list[ImageRow], Seen]:
    """Rows of a form whose images can all be decoded, and what was seen of them; says what was left out.

    Args:
      record: of what earlier starts found, whose images are not decoded again.

    Raises:
      RowError: a bad row or image, unless they are skipped.
      UsageError: files that do not exist, rows that cannot take the form.
      ValueError: no row is left.
    """
    read = agreed(lambda: _read(paths, config))
    if read.ties:
        say(f"{len(read.ties)} pairs without a winner left out")
    checked = _check_images(read.rows, config, record)
    if skipped := [*read.skipped, *checked.skipped]:
        report_skipped(skipped, out)
    if not checked.rows:
        raise ValueError(f"no good row is left of {', '.join(paths)}")
    try:
        rows = to_form(checked.rows, form, seed=seed)
    except FormError as error:
        raise UsageError(str(error)) from error
    if checked.rows[0].form != form:
        say(f"{len(checked.rows)} rows of {checked.rows[0].form} give {len(rows)} of {form}")
    pairs = zip(checked.rows, checked.images, strict=True)
    return rows, {place: image for row, images in pairs for place, image in zip(row.images, images, strict=True)}


def _read(paths: Sequence[str], config: ImageDataConfig) -> RowsRead:
    if missing := [path for path in paths if not Path(path).exists()]:
        raise UsageError(f"no such file: {', '.join(missing)}")
    return read_rows(paths, on_bad_row=config.on_bad_row, ties=config.ties)


def _check_images(rows: list[ImageRow], config: ImageDataConfig, record: SeenRecord | None) -> ImagesChecked:
    """`check_images`, of which each process does its share: decoding takes far longer than telling what was seen."""
    host, hosts = jax.process_index(), jax.process_count()
    digest = content_key(*[f"{row.number} {row.form} {row.caption} {_names(row)}" for row in rows])
    if len(set(from_all(digest))) > 1:
        raise UsageError("processes read other rows than process 0 does; --data must be the same files for all of them")
    # One after another, so that the error of the first process is the one that a single process would raise.
    share = rows[len(rows) * host // hosts : len(rows) * (host + 1) // hosts]
    options = _decode_options(config)
    mine = agreed(lambda: check_images(share, on_bad_row=config.on_bad_row, record=record, **options))
    seen = from_all((mine.images, mine.skipped))
    skipped = [row for _, some in seen for row in some]
    bad = {(row.file, row.number) for row in skipped}
    good = [row for row in rows if (row.file, row.number) not in bad]
    return ImagesChecked(good, [images for some, _ in seen for images in some], skipped)


def _names(row: ImageRow) -> list[str]:
    """What tells a row's images from others, wherever a process has its files."""
    return [Path(getattr(place, "file", "")).name + str(getattr(place, "offset", "")) for place in row.images]


def _decode_options(config: ImageDataConfig) -> dict[str, Any]:
    return {"on_mode": config.on_mode, "max_pixels": config.max_pixels}


def prepare_images(config: Any, method: Method, model: OpenPipeline, mesh: Mesh, out: Path) -> PreparedImages:
    """Examples with their latents and text states made, and the course of a training run.

    Raises:
      RowError, UsageError, ValueError: as `read_image_rows`; a column that the method needs is missing or has not one
        shape; all rows held out.
    """
    data, seed = config.data, config.loop.seed
    buckets = model_buckets(data, model)  # refused before the data is read
    t5 = agreed(lambda: open_t5(model, data.t5_states))
    folder = Path(data.cache or out / "cache")
    record = SeenRecord(folder / "seen", **_decode_options(data))
    if record.broken:
        say(f"{len(record.broken)} broken files of {record.folder} are passed over; their images are decoded again")
    rows, seen = read_image_rows(data.data, data, method.form, out, seed, record)
    if data.eval_data:
        held, more = read_image_rows(data.eval_data, data, method.form, None, seed, record)
        train, seen = rows, {**seen, **more}
    else:
        order = np.random.default_rng(seed).permutation(len(rows))
        count = round(data.held_out * len(rows)) if data.held_out < 1 else int(data.held_out)
        held, train = [rows[i] for i in sorted(order[:count])], [rows[i] for i in sorted(order[count:])]
    if not train:
        raise ValueError(f"held_out is {data.held_out:g}, which leaves none of the {len(rows)} rows to train on")
    check_columns(method, [*train, *held])
    if method.columns:
        row = max(train, key=lambda row: len(row.images))
        bucket = frame([seen[place].size for place in row.images], buckets).bucket
        size = (bucket.height // model.factor, bucket.width // model.factor)
        check_objective(method, config, model.process, row, size)
    cache = Cache(folder)
    if cache.broken:
        say(f"{len(cache.broken)} broken files of {cache.folder} are passed over; what they held is made again")
    encoded = encode_rows([*train, *held], seen, method.columns, data, model, mesh, cache, t5)
    size = config.loop.batch_size
    train_examples, held_examples = encoded.examples[: len(train)], encoded.examples[len(train) :]
    steps = config.loop.steps or max(1, round(config.loop.epochs * steps_per_epoch(train_examples, size)))
    shapes = sorted({example.bucket for example in train_examples})
    say(
        f"{len(train)} rows of {method.form} to train on, {len(held)} held out; {steps} steps of {size}, "
        f"images of {', '.join(f'{height} x {width}' for height, width in shapes)}"
    )
    return PreparedImages(train_examples, held_examples, cache, encoded.empty, encoded.no_text, steps)


class EncodedRows(NamedTuple):
    """Examples of rows, and the keys of the empty caption and of no text at all."""

    examples: list[ImageExample]
    empty: str
    no_text: str


def encode_rows(
    rows: Sequence[ImageRow],
    seen: Seen,
    columns: Sequence[str],
    config: ImageDataConfig,
    model: OpenPipeline,
    mesh: Mesh,
    cache: Cache,
    t5: T5States | None = None,
) -> EncodedRows:
    """Examples of rows, their latents and text states in the cache.

    Args:
      seen: sizes and contents of the images.
      columns: names of those that examples keep.
      t5: states of all captions and of the empty text, for a model that reads a T5.

    Raises:
      RowError: a caption without states; UsageError: the empty text without states.
    """
    texts = agreed(lambda: _text_keys(rows, model, t5))
    buckets, fingerprint = model_buckets(config, model), model.image_fingerprint()
    framings: list[Framing] = []
    jobs: list[tuple[int, int]] = []  # row, image
    keys: list[str] = []
    by_bucket: dict[Bucket, list[int]] = {}
    for number, row in enumerate(rows):
        looks = [seen[place] for place in row.images]
        framing = frame([look.size for look in looks], buckets)
        if config.flip:
            # An image is turned in every run or in none, so that its latents are made once.
            framing = framing._replace(flips=np.array([int(look.key, 16) % 2 == 1 for look in looks]))
        framings.append(framing)
        for place, look in enumerate(looks):
            by_bucket.setdefault(framing.bucket, []).append(len(jobs))
            jobs.append((number, place))
            keys.append(content_key(fingerprint, look.key, framing.bucket, bool(framing.flips[place])))

    encoder = cache_call(lambda: image_encoder(model, mesh))  # weights are read only if something is missing

    def pixels(job: int) -> np.ndarray:
        number, place = jobs[job]
        return cut(load_image(rows[number], place, **_decode_options(config)), framings[number], place)

    with ThreadPoolExecutor(THREADS) as pool:

        def maker(bucket_jobs: list[int]) -> Callable[[list[int]], Sequence[Entry]]:
            def make(places: list[int]) -> Sequence[Entry]:
                # Encoding is done by all processes together: one that cannot read its images must not leave them to it.
                images = agreed(lambda: list(pool.map(pixels, (bucket_jobs[place] for place in places))))
                return encoder()(np.stack(images))

            return make

        together = -(-config.encode_batch // data_shards(mesh)) * data_shards(mesh)
        for bucket, places in by_bucket.items():
            _fill(cache, [keys[place] for place in places], maker(places), together, f"latents of {tuple(bucket)}")
    _encode_texts(texts.by_key, model, t5, cache, together)
    examples, image_keys = [], iter(keys)
    for row, framing, captions in zip(rows, framings, texts.of_rows, strict=True):
        examples.append(
            ImageExample(
                images=tuple(next(image_keys) for _ in row.images),
                captions=captions,
                bucket=tuple(framing.bucket),
                sizes=size_conditions(framing) if model.wants_sizes else None,
                columns={name: row.columns[name] for name in columns},
                frames=row.frames,
            )
        )
    return EncodedRows(of_one_length(examples), texts.empty, texts.no_text)


def of_one_length(examples: Sequence[ImageExample]) -> list[ImageExample]:
    """Lists of several lengths filled up to the longest with their first image; the column `valid` is 0 there."""
    longest = max(len(example.images) for example in examples)
    if all(len(example.images) == longest for example in examples):
        return list(examples)

    def filled(example: ImageExample) -> ImageExample:
        count = len(example.images)
        short = longest - count
        several = len(example.captions) > 1
        sizes = example.sizes
        columns = {name: [*x, *[0] * short] if np.shape(x) == (count,) else x for name, x in example.columns.items()}
        return replace(
            example,
            images=example.images + example.images[:1] * short,
            captions=example.captions + example.captions[:1] * short if several else example.captions,
            sizes=None if sizes is None else np.concatenate([sizes, np.repeat(sizes[:1], short, axis=0)]),
            columns={**columns, "valid": [1] * count + [0] * short},
        )

    return [filled(example) for example in examples]


class _TextKeys(NamedTuple):
    """Keys of the captions of each row, of the empty one and of no text at all; and what each key stands for."""

    of_rows: list[tuple[str, ...]]
    empty: str
    no_text: str
    by_key: dict[str, str | None]


def _text_keys(rows: Sequence[ImageRow], model: OpenPipeline, t5: T5States | None) -> _TextKeys:
    """Keys of all texts, each text once; see `encode_rows`."""
    fingerprint = model.text_fingerprint()
    texts: dict[str, str | None] = {}

    def key(text: str | None) -> str:
        made = text_key(fingerprint, t5, text)
        texts[made] = text
        return made

    of_rows, several = [], any(row.captions for row in rows)
    for row in rows:
        captions = row.captions or (row.caption,) * (len(row.images) if several else 1)
        if missing := [caption for caption in captions if t5 is not None and caption not in t5]:
            assert t5 is not None
            raise RowError(row.file, row.number, lacking(t5, missing[0]))
        of_rows.append(tuple(map(key, captions)))
    require_states(t5, [""])
    empty = key("")
    return _TextKeys(of_rows, empty, key(None) if model.zeroes_no_text else empty, texts)


def _encode_texts(
    by_key: Mapping[str, str | None], model: OpenPipeline, t5: T5States | None, cache: Cache, together: int
) -> None:
    keys, texts = list(by_key), list(by_key.values())
    encoder = cache_call(lambda: text_encoder(model, t5))

    def make(places: list[int]) -> Sequence[Entry]:
        return agreed(lambda: [halved(entry) for entry in encoder()([texts[place] for place in places])])

    if len(set(from_all(content_key(*keys)))) > 1:
        raise UsageError("text encoders or T5 states are other files on other processes; give all of them the same")
    _fill(cache, keys, make, together, "text states")


def model_buckets(config: ImageDataConfig, model: OpenPipeline) -> tuple[Bucket, ...]:
    """Sizes that images are cropped to.

    Raises:
      UsageError: a resolution that the model cannot take.
    """
    side, step = model.resolution if config.resolution is None else config.resolution, model.size_step
    if side % step or side < step:
        raise UsageError(f"--resolution is {side}; give a multiple of {step}")
    if config.buckets == "square":
        return (Bucket(side, side),)
    return make_buckets(side * side, step=max(step, side // 16 // step * step))


def _fill(cache: Cache, keys: list[str], make: Any, together: int, what: str) -> None:
    """Make what is missing, and say how far it is."""
    last, begun = time.perf_counter(), time.perf_counter()

    def progress(done: int, missing: int) -> None:
        nonlocal last
        if time.perf_counter() - last > _SAID_EVERY or (done == missing and missing > together):
            last = time.perf_counter()
            say(f"{what}: {done} of {missing} made, {last - begun:.0f} s")

    hosts = jax.process_count()
    if hosts == 1:
        fill(cache, keys, make, together=together, progress=progress)
        return
    # Another run may write into the folder meanwhile: of what processes see, the first one's view counts.
    there = multihost_utils.broadcast_one_to_all(np.array([key in cache for key in keys]))
    fill(
        cache,
        keys,
        make,
        there=np.asarray(there).tolist(),
        together=together,
        host=jax.process_index(),
        hosts=hosts,
        progress=progress,
    )
    multihost_utils.sync_global_devices(what)
    cache.refresh()
    if not true_everywhere(all(key in cache for key in keys)):
        raise UsageError(
            f"{cache.folder} lacks what other processes made; --cache must be one folder that all of them see"
        )

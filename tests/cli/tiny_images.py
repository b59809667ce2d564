"""Tiny pipelines and folders of PNG files for the tests of the commands for diffusion models."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tiny_pipelines import make_tiny_pipeline
from tiny_runs import Answer, command, write_rows

from dpo_jax.checkpoint import open_checkpoints
from dpo_jax.diffusion.models.folder import Kind
from dpo_jax.worlds.shapes import WORDS, make_rows


class TinyImages(NamedTuple):
    """A pipeline, a folder of pairs, and a pipeline of the same shape with other weights."""

    model: Path
    rows: Path
    other: Path


def make_image_folder(folder: Path, form: str = "pairs", count: int = 20, seed: int = 0, size: int = 16) -> Path:
    """Rows of the shape world as metadata.jsonl and PNG files."""
    folder.mkdir(parents=True)
    rows = [_saved(folder, number, row) for number, row in enumerate(make_rows(form, count, seed, size))]
    write_rows(folder / "metadata.jsonl", rows)
    return folder


def _saved(folder: Path, number: int, row: dict[str, Any]) -> dict[str, Any]:
    def named(name: str, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            Image.fromarray(value).save(folder / f"{number}_{name}.png")
            return f"{number}_{name}.png"
        if isinstance(value, list):
            return [named(f"{name}{i}", item) for i, item in enumerate(value)]
        return value

    return {key: named(key, value) for key, value in row.items()}


def change_rows(folder: Path, change: Any) -> Path:
    """Another metadata file beside the images, with every row changed: `change(number, row)`."""
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    path = folder / f"changed{len(list(folder.glob('changed*')))}.jsonl"
    return write_rows(path, [change(number, row) for number, row in enumerate(rows)])


def make_tiny_images(folder: Path, kind: Kind = "sd") -> TinyImages:
    words = (*WORDS, "bad")
    first = make_tiny_pipeline(folder / "model", kind, words=words)
    return TinyImages(
        first, make_image_folder(folder / "rows"), make_tiny_pipeline(folder / "other", kind, words=words, seed=9)
    )


def train_words(
    tiny: TinyImages, out: Path, *words: object, method: str = "diffusion-dpo", steps: int = 4, batch_size: int = 4
) -> list[str]:
    """A command that trains with a rate at which a few steps are seen in the losses."""
    fixed = ("--model", tiny.model, "--data", tiny.rows, "--out", out, "--steps", steps, "--batch-size", batch_size)
    fixed = (*fixed, "--learning-rate", 0.01, "--log-every", 1, "--encode-batch", 8, "--json")
    return [str(word) for word in ("train", method, *fixed, *words)]


def train_images(tiny: TinyImages, out: Path, *words: object, **given: Any) -> Answer:
    """Run `train_words` in this process."""
    return command(*train_words(tiny, out, *words, **given))


def leaves(out: Path, step: int) -> dict[str, list]:
    """Dtype, shape and fingerprint of the bits of every array of a checkpoint."""
    with open_checkpoints(out / "checkpoints", read_only=True) as checkpoints:
        record, reason = checkpoints._read_record(step)
    assert record is not None, reason
    return record["leaves"]


def same_bytes(first: Path, second: Path, but: str) -> None:
    """All files of two pipelines are equal, but for one component."""
    names = [{str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} for folder in (first, second)]
    assert {n for n in names[0] if not n.startswith(but)} == {n for n in names[1] if not n.startswith(but)}
    for name in names[0]:
        if not name.startswith(but):
            assert (first / name).read_bytes() == (second / name).read_bytes(), name

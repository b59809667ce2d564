"""Tiny data, tiny checkpoints and commands in this process, for the tests of the command line."""

import io
import json
import random
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

from make_tiny_checkpoint import make_tiny_checkpoint, texts_of

from dpo_jax.cli import main

WORDS = ["red", "blue", "green", "cold", "warm", "small", "large", "open", "near", "quiet"]


class Tiny(NamedTuple):
    """A checkpoint, a file of pairs, and a checkpoint of the same shape with other weights."""

    model: Path
    rows: Path
    other: Path


class Answer(NamedTuple):
    """What a command returned and printed."""

    code: int
    out: str
    err: str

    @property
    def result(self) -> dict[str, Any]:
        """The one JSON object on standard output."""
        return json.loads(self.out)


def make_pairs(path: Path, count: int = 40, seed: int = 0) -> Path:
    """Pairs of ragged lengths whose chosen completions begin with one word and the rejected ones with another."""
    draw = random.Random(seed)

    def words(most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, most)))

    rows = [
        {"prompt": f"{words(5)} {i}", "chosen": f" good {words(4)}", "rejected": f" bad {words(4)}"}
        for i in range(count)
    ]
    return write_rows(path, rows)


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_tiny(folder: Path, rows: Path, **changes: Any) -> Path:
    """One layer, 16 hidden units, 300 tokens; weights large enough for log-probs that differ."""
    sizes = {
        "vocab_size": 300,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    return make_tiny_checkpoint(folder, texts=texts_of(rows), **{"scale": 0.2, **sizes, **changes})


def command(*words: object) -> Answer:
    """Run a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([str(word) for word in words])
    return Answer(code, out.getvalue(), err.getvalue())


def train(tiny: Tiny, out: Path, *words: object, method: str = "dpo", steps: int = 6, batch_size: int = 8) -> Answer:
    """Train on the tiny pairs with a rate at which a few steps are seen in the losses."""
    fixed = ("--model", tiny.model, "--data", tiny.rows, "--out", out, "--steps", steps, "--batch-size", batch_size)
    return command("train", method, *fixed, "--learning-rate", 0.01, "--log-every", 1, "--json", *words)


def losses(out: Path, split: str = "train") -> list[float]:
    """The losses in a run's metrics, step by step."""
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["split"] == split]

"""Twenty steps of any method on the digit world: the data it reads, the frozen models and the options it needs."""

import json
import math
from pathlib import Path
from typing import NamedTuple

from make_tiny_checkpoint import make_tiny_checkpoint
from tiny_runs import command, losses, write_rows

from dpo_jax.cli.catalogue import Method
from dpo_jax.cli.data import wanted_by
from dpo_jax.worlds import digits

STEPS = 20
# Form of the rows that a method reads -> form of the file it is given; what differs is turned into it on the way.
FILES = {
    "pairs": "pairs",
    "triples": "triples",
    "singles": "singles",
    "mismatched": "singles",
    "revisions": "pairs",
    "lists": "lists",
}


class World(NamedTuple):
    """Files of rows by form, a checkpoint, and another one of the same shape."""

    rows: dict[str, Path]
    model: Path
    other: Path


def make_world(folder: Path) -> World:
    """A tiny model of the digit world and files of every form."""
    rows = {
        form: write_rows(folder / f"{form}.jsonl", digits.make_rows(form, 48, seed=3)) for form in set(FILES.values())
    }
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": digits.VOCABULARY_SIZE}
    models = [
        make_tiny_checkpoint(folder / f"model{seed}", tokenizer=digits.make_tokenizer(), seed=seed, scale=0.2, **sizes)
        for seed in (0, 1)
    ]
    return World(rows, *models)


def options_for(method: Method, world: World) -> list[object]:
    """What a user has to give besides model, data and folder."""
    columns = wanted_by(method.loss).columns
    words: list[object] = []
    if "guidance_logps" in columns:
        words += ["--guidance-model", world.other]
    if "contrastive_logps" in columns:
        words += ["--positive-model", world.model, "--negative-model", world.other]
    if "semantic_distance" in columns or "step_similarity" in columns:
        words += ["--embedding-model", world.other]
    if "step_ids" in columns:
        words += ["--step-delimiter", ";"]
    if method.form == "revisions":
        words += ["--revision-instruction", ";"]
    return words


def check_training(method: Method, world: World, out: Path) -> None:
    """The command succeeds, every loss is finite, and the model has learned something or other."""
    answer = command(
        *("train", method.slug, "--model", world.model, "--data", world.rows[FILES[method.form]], "--out", out),
        *("--steps", STEPS, "--batch-size", 8, "--learning-rate", 3e-3, "--held-out", 8, "--eval-every", 0),
        *("--log-every", STEPS, "--save-every", 0, "--no-export", "--json"),
        *options_for(method, world),
    )
    assert answer.code == 0, answer.err
    found = losses(out)
    assert len(found) == STEPS and all(map(math.isfinite, found))
    assert len(set(found)) > STEPS // 2  # a constant loss would have no gradient
    assert all(math.isfinite(value) for value in answer.result["evaluation"].values()), answer.result["evaluation"]
    assert json.loads((out / "run.json").read_text())["method"] == method.slug

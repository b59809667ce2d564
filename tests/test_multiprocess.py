"""Two real processes of two devices each train as one process of four does, and stop and resume together."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_tiny_checkpoint import make_tiny_checkpoint
from real_processes import LIMIT, finish, result_of, start_two, starting
from safetensors.numpy import load_file

pytestmark = pytest.mark.slow
STEPS = 6


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(checkpoint, rows) of 16 hidden units and 24 pairs."""
    folder = tmp_path_factory.mktemp("tiny")
    rows = [
        {"prompt": f"word {'and ' * (i % 4)}{i}", "chosen": f" good {'x ' * (i % 3)}", "rejected": f" bad {i % 5}"}
        for i in range(24)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes: dict[str, Any] = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    texts = [value for row in rows for value in row.values()]
    return make_tiny_checkpoint(folder / "model", texts=texts, scale=0.2, **sizes, **heads), folder / "rows.jsonl"


@pytest.fixture
def start():
    with starting() as begin:
        yield begin


def words_of(tiny, out, *more) -> list:
    model, rows = tiny
    fixed = ["train", "dpo", "--model", model, "--data", rows, "--out", out, "--batch-size", 8, "--learning-rate", 0.01]
    return [*fixed, "--log-every", 1, "--held-out", 4.0, "--mesh-data", 2, "--mesh-fsdp", 2, "--json", "--debug", *more]


def losses(out: Path) -> list[float]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["split"] == "train"]


def test_two_processes_are_one_run(tiny, tmp_path, start):
    alone, both = tmp_path / "alone", tmp_path / "both"
    finish([start(4, words_of(tiny, alone, "--steps", STEPS, "--reference", "columns"))])
    words = words_of(tiny, both, "--steps", STEPS, "--reference", "columns")
    answers = finish(start_two(start, words))
    assert len(losses(both)) == STEPS
    np.testing.assert_allclose(losses(both), losses(alone), rtol=0, atol=1e-6)
    one, two = (load_file(out / "export" / "model.safetensors") for out in (alone, both))
    for name in one:
        np.testing.assert_allclose(two[name], one[name], rtol=0, atol=1e-6, err_msg=name)
    # The second process neither prints a result nor writes metrics of its own.
    assert result_of(answers[0])["steps"] == STEPS
    assert "{" not in answers[1][0]
    assert len(list((both / "tensorboard").glob("events.*"))) == 1
    assert len(list(both.glob("reference_logps_*.npz"))) == 2
    again = finish(start_two(start, words))
    assert result_of(again[0])["resumed_from"] == STEPS
    assert "read from" in again[0][1]


def test_sigterm_to_one_stops_both_and_the_same_command_resumes(tiny, tmp_path, start):
    steps = 4000
    words = words_of(tiny, tmp_path, "--steps", steps, "--save-every", 0, "--no-export", "--schedule", "constant")
    processes = start_two(start, words)
    limit = time.monotonic() + LIMIT
    metrics = tmp_path / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
        assert time.monotonic() < limit and all(process.poll() is None for process in processes)
        os.sched_yield()
    processes[1].send_signal(signal.SIGTERM)
    answers = finish(processes)
    result = result_of(answers[0])
    assert result["stopped"] and 3 <= result["steps"] < steps
    saved = [int(path.name) for path in (tmp_path / "checkpoints").glob("*") if path.name.isdigit()]
    assert saved == [result["steps"]] == [len(losses(tmp_path))]
    assert all(f"saved step {saved[0]} of {steps}" in err for _, err in answers)
    before = losses(tmp_path)
    processes = start_two(start, words)
    while len(metrics.read_text().splitlines()) < len(before) + 2:
        assert time.monotonic() < limit and all(process.poll() is None for process in processes)
        os.sched_yield()
    processes[0].send_signal(signal.SIGTERM)
    answers = finish(processes)
    assert result_of(answers[0])["resumed_from"] == saved[0]
    assert losses(tmp_path)[: len(before)] == before

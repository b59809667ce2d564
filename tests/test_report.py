"""Metrics files survive kills and resumes, progress shows what it should."""

import io
import json
import math
import subprocess
import sys

import numpy as np
import pytest

from dpo_jax.report import (
    human_bytes,
    open_metrics,
    progress,
    read_metrics,
    table,
)


def write_steps(folder, steps, **options):
    with open_metrics(folder, **options) as writer:
        for step in steps:
            writer.write(step, "train", {"loss": 1.0 / (step + 1)})


def test_metrics_come_back_with_nan_and_infinities(tmp_path):
    with open_metrics(tmp_path / "run") as writer:
        writer.write(1, "train", {"loss": np.float32(0.5), "margin": math.nan})
        writer.write(1, "eval", {"loss": math.inf, "accuracy": -math.inf})
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    first, second = (json.loads(line, parse_constant=pytest.fail) for line in lines)
    assert first == {"step": 1, "split": "train", "loss": 0.5, "margin": "nan"}
    one, two = read_metrics(tmp_path / "run")
    assert one["loss"] == 0.5 and math.isnan(one["margin"])
    assert two == {"step": 1, "split": "eval", "loss": math.inf, "accuracy": -math.inf}
    assert second["loss"] == "inf"


def test_tensorboard_gets_every_value(tmp_path, monkeypatch):
    seen, options = [], []

    class Board:
        def __init__(self, folder, **given):
            options.append((folder, given))

        def add_scalar(self, *scalar):
            seen.append(scalar)

        def close(self):
            seen.append("closed")

    monkeypatch.setattr("tensorboardX.SummaryWriter", Board)
    with open_metrics(tmp_path, resume_step=4) as writer:
        writer.write(5, "eval", {"loss": 0.25, "margin": 2})
    assert seen == [("eval/loss", 0.25, 5), ("eval/margin", 2.0, 5), "closed"]
    assert options == [(str(tmp_path / "tensorboard"), {"purge_step": 5})]


def test_event_files_are_written(tmp_path):
    write_steps(tmp_path, [1])
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes()


def test_lines_of_steps_done_again_are_dropped(tmp_path):
    write_steps(tmp_path, [0, 2, 4, 6])
    write_steps(tmp_path, [5], resume_step=4)
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [0, 2, 4, 5]
    write_steps(tmp_path, [0])
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_a_file_cut_anywhere_loses_only_its_last_line(tmp_path):
    write_steps(tmp_path / "whole", [1, 2])
    content = (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    second = content.index(b"\n") + 1
    (tmp_path / "cut").mkdir()
    path = tmp_path / "cut" / "metrics.jsonl"
    for length in range(second, len(content) - 1):
        path.write_bytes(content[:length])
        assert [entry["step"] for entry in read_metrics(tmp_path / "cut")] == [1]
    with open_metrics(tmp_path / "cut", resume_step=1) as writer:
        writer.write(2, "train", {"loss": 0.1})
    assert [entry["step"] for entry in read_metrics(tmp_path / "cut")] == [1, 2]
    path.write_bytes(content[: second - 1])  # whole but for its end of line
    write_steps(tmp_path / "cut", [2], resume_step=1)
    assert [entry["step"] for entry in read_metrics(tmp_path / "cut")] == [1, 2]


def test_a_broken_line_in_the_middle_is_an_error(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "split": "train"}\n{"step": \n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_metrics(tmp_path)
    assert read_metrics(tmp_path / "nowhere") == []


def test_inactive_writers_touch_nothing(tmp_path):
    write_steps(tmp_path / "run", [1], active=False)
    assert not (tmp_path / "run").exists()


def test_metrics_that_cannot_be_written(tmp_path):
    with open_metrics(tmp_path) as writer, pytest.raises(ValueError, match="step"):
        writer.write(1, "train", {"step": 2.0})
    with pytest.raises(ValueError, match="local folder"):
        open_metrics("gs://bucket/run")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_lines_at_intervals_and_at_both_ends():
    stream, now = io.StringIO(), [0.0]
    with progress(10, 2, description="train", stream=stream, interval=10, clock=lambda: now[0]) as bar:
        for step in range(3, 11):
            now[0] += 4
            bar.update(step, {"loss": 0.5, "margin": 1.25, "accuracy": 1.0, "tokens_per_second": 12345.6, "other": 3})
        bar.message("done")
    lines = stream.getvalue().splitlines()
    # 4 s a step: steps 3 (first), 6 and 9 (12 s later each), 10 (last).
    assert [line.split()[1] for line in lines[:-1]] == ["3/10", "6/10", "9/10", "10/10"]
    assert lines[0] == "train 3/10 (30%)  loss 0.5  margin 1.25  accuracy 1  tokens/s 12346  left 0:28"
    assert "left" not in lines[3] and lines[4] == "done"


def test_a_bar_on_a_terminal():
    stream = Terminal()
    with progress(10, 4, description="train", stream=stream) as bar:
        bar.update(7, {"loss": 0.123456})
        bar.message("saved")
        bar.update(10, {"tokens_per_second": 1500.0})
    text = stream.getvalue()
    assert "4/10" in text and "10/10" in text and "saved" in text and "tokens/s=1500" in text


def test_disabled_progress_is_silent():
    for stream in (io.StringIO(), Terminal()):
        with progress(3, description="x", stream=stream, disable=True) as bar:
            bar.update(1, {"loss": 1.0})
            bar.message("hidden")
        assert stream.getvalue() == ""


def test_table():
    text = table([["dpo", 0.123456, 3, None], ["reference_free", 1e6, 10, 2.0]], ["method", "loss", "n", "x"])
    assert text.splitlines() == [
        "method             loss   n  x",
        "--------------  -------  --  -",
        "dpo              0.1235   3",
        "reference_free  1000000  10  2",
    ]
    assert table([], ["a", "bc"]).splitlines() == ["a  bc", "-  --"]
    with pytest.raises(ValueError, match="2 cells"):
        table([[1, 2]], ["a"])


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (3 * 2**30, "3.0 GiB"),
        (2**61, "2048.0 PiB"),
        (-2048, "-2.0 KiB"),
    ],
)
def test_human_bytes(count, text):
    assert human_bytes(count) == text


def test_the_module_loads_without_jax():
    code = "import sys, dpo_jax.report; assert not {'jax', 'tensorboardX', 'tqdm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

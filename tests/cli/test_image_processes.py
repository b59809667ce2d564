"""Two real processes of one device each train on images as one process of two does, and fail together."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from real_processes import RUN, ended, finish, kill_at, result_of, shared_programs, start_two, starting
from safetensors.numpy import load_file
from tiny_images import leaves, make_tiny_images, train_words
from tiny_runs import losses

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
STEPS = 40
WORDS = ("--held-out", 3, "--caption-dropout", 0.5, "--save-every", 2, "--mesh-data", 2)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The layout that compiles fastest; one image of the second half of the rows is broken."""
    tiny = make_tiny_images(tmp_path_factory.mktemp("images"), "sd3")
    (tiny.rows / "17_rejected.png").write_bytes(b"no image")
    return tiny


class Runs(NamedTuple):
    """The same run by one process and by two, which were killed on the way.

    Attributes:
      alone, both: folders.
      before: losses of both when they were killed.
      made: names of the files that the cache of both had then.
      answers: what the two that went on printed.
    """

    alone: Path
    both: Path
    before: list[float]
    made: set[str]
    answers: list[tuple[str, str]]


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    folder, programs = tmp_path_factory.mktemp("runs"), shared_programs()
    alone, both = folder / "alone", folder / "both"
    with starting() as start:
        one = start(2, train_words(tiny, alone, *WORDS, steps=STEPS), programs)
        words = train_words(tiny, both, *WORDS, steps=STEPS)
        kill_at(start_two(start, words, devices=1, environment=programs), both, 2)
        before, made = losses(both), names_of(both / "cache")
        answers = finish([*start_two(start, words, devices=1, environment=programs), one])
    return Runs(alone, both, before, made, answers[:2])


def names_of(cache: Path) -> set[str]:
    return {path.name for path in cache.glob("*.safetensors")}


def files_of(cache: Path) -> list[dict[str, np.ndarray]]:
    return [load_file(path) for path in cache.glob("*.safetensors")]


def test_two_processes_are_one_run_and_both_go_on_after_a_kill(runs):
    assert 2 <= len(runs.before) < STEPS
    assert losses(runs.both)[: len(runs.before)] == runs.before
    np.testing.assert_allclose(losses(runs.both), losses(runs.alone), rtol=1e-5)
    np.testing.assert_allclose(losses(runs.both, "eval"), losses(runs.alone, "eval"), rtol=1e-5)
    assert leaves(runs.both, STEPS).keys() == leaves(runs.alone, STEPS).keys()
    one, two = (
        load_file(out / "export" / "transformer" / "diffusion_pytorch_model.safetensors")
        for out in (runs.alone, runs.both)
    )
    for name in one:
        np.testing.assert_allclose(two[name], one[name], rtol=0, atol=1e-5, err_msg=name)
    resumed = result_of(runs.answers[0])["resumed_from"]
    assert resumed >= 2 and all(f"going on from step {resumed}\n" in err for _, err in runs.answers)


def test_the_first_process_alone_writes(runs):
    assert "{" not in runs.answers[1][0]
    lines = [json.loads(line) for line in (runs.both / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["split"] == "train"] == list(range(1, STEPS + 1))
    assert len(list((runs.both / "tensorboard").glob("events.*"))) == 2  # one of each time that it was begun


def test_each_process_encodes_its_share_once(runs):
    alone, both = files_of(runs.alone / "cache"), files_of(runs.both / "cache")
    names = [name for file in both for name in file]
    given = {name: array for file in alone for name, array in file.items()}
    assert len(set(names)) == len(names) and set(names) == set(given)
    # A file holds two arrays of each entry that one process made in one call: eight entries, or four by each of two.
    assert [max(len(file) for file in files) for files in (alone, both)] == [2 * 8, 2 * 4]
    assert names_of(runs.both / "cache") == runs.made  # when they went on, nothing was missing
    for file in both:
        for name, array in file.items():
            np.testing.assert_allclose(array.astype(np.float32), given[name].astype(np.float32), atol=1e-3)


def test_a_broken_image_is_left_out_by_both(runs):
    skipped = [(out / "skipped_rows.jsonl").read_text() for out in (runs.alone, runs.both)]
    assert skipped[0] == skipped[1] and json.loads(skipped[0])["number"] == 18
    assert all("16 rows of pairs to train on, 3 held out" in err for _, err in runs.answers)


# The second process loses an image between the check and the encoding.
GONE = """
import os
from dpo_jax.cli.images import data as image_data
from dpo_jax.rows import RowError
def gone(row, number, **options):
    raise RowError(row.file, 3, "the image is gone")
if os.environ["JAX_PROCESS_ID"] == "1":
    image_data.load_image = gone
"""


@pytest.mark.parametrize(
    ("script", "options", "said"),
    [(RUN, ("--on-bad-row", "error"), "row 18: rejected image"), (GONE + RUN, (), "row 3: the image is gone")],
    ids=["checked", "encoded"],
)
def test_an_image_that_one_process_cannot_read_ends_both(tiny, tmp_path, script, options, said):
    words = train_words(tiny, tmp_path, *WORDS, *options)
    with starting() as start:
        processes = start_two(start, words, devices=1, environment=shared_programs(), script=script)
        answers = ended(processes)
    for process, (_, err) in zip(processes, answers):
        assert process.returncode == 1, err
        assert [said in line for line in err.splitlines() if line.startswith("dpo-jax")] == [True], err
        assert "Traceback" not in err
    assert not (tmp_path / "checkpoints").exists()

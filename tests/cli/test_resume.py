"""A run that is stopped, killed or damaged goes on bit for bit as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from tiny_runs import command, losses, train

from dpo_jax.checkpoint import open_checkpoints
from dpo_jax.cli import loop

STEPS = 7
OPTIONS = {
    "everything that a state holds": (
        *("--ema-decay", 0.9, "--reference-update-every", 2, "--reference-update-rate", 0.5),
        *("--mesh-fsdp", 2, "--mesh-model", 2),
    ),
    "reference columns": ("--reference", "columns"),
}
FIXED = ("--save-every", 2, "--no-export", "--keep", 2, "--held-out", 4.0)


def fingerprints(out, step: int = STEPS) -> dict[str, list]:
    """Dtype, shape and fingerprint of the bits of every array of a checkpoint, as it keeps them itself."""
    with open_checkpoints(out / "checkpoints", read_only=True) as checkpoints:
        record, reason = checkpoints._read_record(step)
    assert record is not None, reason
    return record["leaves"]


@pytest.fixture(scope="module", params=OPTIONS.values(), ids=OPTIONS.keys())
def whole(request, tiny, tmp_path_factory):
    """(options, folder) of a run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    answer = train(tiny, out, *FIXED, *request.param, steps=STEPS)
    assert answer.code == 0, answer.err
    return request.param, out


@pytest.fixture
def stop_at(monkeypatch):
    """`stop_at(n)`: the next run gets SIGTERM while its n-th batch is laid out on the devices."""

    def arm(number: int) -> None:
        count = 0
        real = loop.shard_batch

        def shard_batch(batch, mesh):
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(batch, mesh)

        monkeypatch.setattr(loop, "shard_batch", shard_batch)

    return arm


def test_stopped_twice_by_sigterm_it_ends_as_if_never_stopped(whole, tiny, tmp_path, stop_at):
    options, out = whole
    before = signal.getsignal(signal.SIGTERM)
    done = 0
    for stop in (3, 2):
        stop_at(stop)
        answer = train(tiny, tmp_path, *FIXED, *options, steps=STEPS)
        assert answer.code == 0, answer.err
        assert answer.result["stopped"] and answer.result["resumed_from"] == done
        done += stop
        assert f"saved step {done} of {STEPS}" in answer.err
        with open_checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
            assert checkpoints.latest_step() == done
    assert signal.getsignal(signal.SIGTERM) is before
    stop_at(100)
    answer = train(tiny, tmp_path, *FIXED, *options, steps=STEPS)
    assert answer.result["resumed_from"] == done and not answer.result["stopped"]
    assert fingerprints(tmp_path) == fingerprints(out)
    assert losses(tmp_path) == losses(out)
    assert losses(tmp_path, "eval") == losses(out, "eval")


def test_a_run_goes_on_on_another_mesh(whole, tiny, tmp_path, stop_at):
    options, out = whole
    stop_at(3)
    train(tiny, tmp_path, *FIXED, *options, steps=STEPS)
    stop_at(100)
    sizes = ("--mesh-fsdp", 8, "--mesh-model", 1)
    answer = train(tiny, tmp_path, *FIXED, *options, *sizes, steps=STEPS)
    assert answer.code == 0, answer.err
    assert answer.result["resumed_from"] == 3
    np.testing.assert_allclose(losses(tmp_path), losses(out), atol=1e-5)


def test_the_state_holds_more_than_parameters(whole):
    options, out = whole
    names = fingerprints(out)
    kinds = {name.split("/")[0] for name in names}
    expected = {"step", "params", "opt_state", "key"}
    assert kinds == expected | ({"ema", "reference"} if "--ema-decay" in options else set())


def test_damaged_checkpoint_is_reported_and_the_one_before_it_is_used(whole, tiny, tmp_path, stop_at):
    options, out = whole
    stop_at(5)
    train(tiny, tmp_path, *FIXED, *options, steps=STEPS)
    newest = tmp_path / "checkpoints" / "5" / "state"
    files = [path for path in newest.rglob("*") if path.is_file()]
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    stop_at(100)
    answer = train(tiny, tmp_path, *FIXED, *options, steps=STEPS)
    assert answer.code == 0, answer.err
    assert "checkpoint of step 5 is damaged" in answer.err
    assert answer.result["resumed_from"] == 4
    assert fingerprints(tmp_path) == fingerprints(out)
    assert losses(tmp_path) == losses(out)


def test_a_finished_run_reports_its_result_again(whole, tiny):
    options, out = whole
    metrics, prints = (out / "metrics.jsonl").read_text(), fingerprints(out)
    answer = train(tiny, out, *FIXED, *options, steps=STEPS)
    assert answer.code == 0, answer.err
    first, *_, last = losses(out)
    assert answer.result["resumed_from"] == answer.result["steps"] == STEPS
    assert (answer.result["loss_first"], answer.result["loss_last"]) == (first, last)
    assert answer.result["evaluation"]["loss"] == losses(out, "eval")[-1]
    assert (out / "metrics.jsonl").read_text() == metrics
    assert fingerprints(out) == prints


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--beta", 0.3), "beta (was 0.1, now 0.3)"),
        (("--seed", 1), "loop.seed"),
        (("--layout", "padded"), "layout"),
    ],
)
def test_other_options_in_the_same_folder_are_refused(whole, tiny, options, said):
    given, out = whole
    before = (out / "run.json").read_text()
    answer = train(tiny, out, *FIXED, *given, *options, steps=STEPS)
    assert answer.code == 2 and said in answer.err
    assert (out / "run.json").read_text() == before


def test_another_method_in_the_same_folder_is_refused(whole, tiny):
    _, out = whole
    answer = train(tiny, out, method="ipo", steps=STEPS)
    assert answer.code == 2 and "train dpo" in answer.err


def test_killed_without_warning_it_goes_on_from_the_last_checkpoint(tiny, tmp_path):
    """A real process and kill -9, somewhere in the middle of its steps."""
    steps = 60
    script = (
        "import sys; from dpo_jax.cli import main; sys.exit(main(sys.argv[1:]))",
        *("train", "dpo", "--model", tiny.model, "--data", tiny.rows, "--out", tmp_path, "--steps", steps),
        *("--batch-size", 8, "--learning-rate", 0.001, "--log-every", 1, "--save-every", 3, "--no-export", "--json"),
        *("--mesh-data", 8),  # the same bits need the same programs
    )
    words = [sys.executable, "-c", *map(str, script)]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        limit = time.monotonic() + 120
        while not any(path.name.isdigit() and int(path.name) >= 6 for path in (tmp_path / "checkpoints").glob("*")):
            assert process.poll() is None and time.monotonic() < limit
            os.sched_yield()
        process.kill()
        process.wait(10)
    finally:
        process.kill()
    done = len(losses(tmp_path))
    assert 6 <= done < steps
    before = losses(tmp_path)
    answer = command(*script[1:])
    assert answer.code == 0, answer.err
    resumed = answer.result["resumed_from"]
    assert resumed % 3 == 0 and 3 <= resumed <= done
    after = losses(tmp_path)
    assert len(after) == steps
    # The same steps done again by another process give the same losses.
    np.testing.assert_array_equal(after[: len(before)], before)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["split"] == "train"] == list(range(1, steps + 1))

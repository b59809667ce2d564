"""The demonstration of images runs from end to end; what it gains is measured by running it at its own size."""

import json

import pytest
from tiny_runs import command

from dpo_jax.diffusion.models.folder import open_pipeline
from dpo_jax.worlds.halving import halving_config


@pytest.mark.slow
def test_a_tiny_demonstration_leaves_two_pipelines_and_two_grids(tmp_path):
    out = tmp_path / "demo"
    words = ("demo", "--diffusion", "--out", out, "--base-steps", 2, "--prompts", 4, "--samples", 2, "--steps", 2)
    answer = command(*words, "--test-prompts", 4, "--sampling-steps", 2, "--json")
    assert answer.code == 0, answer.err
    found = answer.result
    assert 0 < found["pairs"] <= 4
    for name in ("before", "after"):
        low, high = found[f"saturated_{name}_interval"]
        assert low <= found[f"saturated_{name}"] <= high
        assert (out / f"{name}.png").stat().st_size
    assert [open_pipeline(out / name).autoencoder for name in ("base", "export")] == [halving_config()] * 2
    assert json.loads((out / "run.json").read_text())["method"] == "diffusion-dpo"
    assert command(*words, "--json").code == 2  # the folder holds a run

"""Mixtures of experts on the command line: a mesh of experts, the router in the metrics, what is exported."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from tiny_runs import Tiny, losses, train

from dpo_jax.language.models.decoder import init_variables
from dpo_jax.language.models.folder import config_from_hf, read_config
from dpo_jax.language.models.weights import load_hf, save_hf


@pytest.fixture(scope="module")
def mixture(tiny, tmp_path_factory) -> Tiny:
    """The tiny checkpoint's tokenizer with a decoder of four experts."""
    folder = tmp_path_factory.mktemp("mixture")
    dense = config_from_hf(read_config(tiny.model))
    experts = {"experts": 4, "experts_per_token": 2, "expert_intermediate_size": 8, "query_key_norm": True}
    config = replace(dense, family="qwen3_moe", initializer_range=0.2, **experts)
    save_hf(folder, config, init_variables(config, jax.random.key(0)), source=tiny.model)
    return tiny._replace(model=folder)


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_mesh_of_experts_changes_nothing_and_the_export_has_moved(mixture, tmp_path):
    options = ("--router-loss", 0.01, "--held-out", 0.0)
    runs = {"alone": ("--mesh-data", 1, "--mesh-fsdp", 8), "spread": ("--mesh-fsdp", 2, "--mesh-expert", 4)}
    for name, sizes in runs.items():
        answer = train(mixture, tmp_path / name, *options, *sizes, steps=3)
        assert answer.code == 0, answer.err
    np.testing.assert_allclose(losses(tmp_path / "spread"), losses(tmp_path / "alone"), atol=1e-5)
    last = [line for line in lines(tmp_path / "spread") if line["split"] == "train"][-1]
    assert 0 < last["router_entropy"] <= np.log(4) and last["router_load_balance"] > 1.9
    assert sum(last[f"expert_share_{number}"] for number in range(4)) == pytest.approx(1)
    (config, before), (same, after) = load_hf(mixture.model), load_hf(tmp_path / "spread" / "export")
    assert config == same
    for part in ("gate", "up", "down"):
        moved = after["layers"]["experts"][part]["kernels"] - before["layers"]["experts"][part]["kernels"]
        assert np.abs(moved).max() > 1e-3


def test_adapters_leave_experts_alone(mixture, tmp_path):
    answer = train(mixture, tmp_path, "--lora-rank", 2, "--held-out", 0.0, steps=2)
    assert answer.code == 0, answer.err
    (_, before), (_, after) = load_hf(mixture.model), load_hf(tmp_path / "export")
    np.testing.assert_array_equal(
        after["layers"]["experts"]["gate"]["kernels"], before["layers"]["experts"]["gate"]["kernels"]
    )
    moved = after["layers"]["attention"]["query"]["kernel"] - before["layers"]["attention"]["query"]["kernel"]
    assert np.abs(moved).max() > 1e-4


def test_a_dense_model_has_no_router(tiny, tmp_path):
    answer = train(tiny, tmp_path / "out", "--router-loss", 0.01)
    assert answer.code == 2 and "--router-loss is for mixtures of experts" in answer.err

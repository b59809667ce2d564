"""Families against numbers of torch transformers, committed; their checkpoints in and out."""

import json

import numpy as np
import pytest
from make_family_fixtures import FOLDER, VARIANTS, numbers, write_checkpoint
from safetensors.numpy import load_file
from test_decoder import assert_parity, ours

from dpo_jax.language.models.folder import config_from_hf, config_to_hf
from dpo_jax.language.models.weights import load_hf, save_hf


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_logps_and_gradients_are_those_of_torch(variant):
    expected = dict(np.load(FOLDER / variant / "expected.npz"))
    config, variables = load_hf(FOLDER / variant)
    assert_parity(ours(config, variables, expected), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_saved_reads_back_bit_by_bit(variant, tmp_path):
    config, variables = load_hf(FOLDER / variant)
    save_hf(tmp_path, config, variables)
    before, after = (load_file(folder / "model.safetensors") for folder in (FOLDER / variant, tmp_path))
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor, err_msg=name)
    assert config_from_hf(json.loads((tmp_path / "config.json").read_text())) == config
    assert config_from_hf(json.loads(json.dumps(config_to_hf(config)))) == config


@pytest.mark.parametrize("variant", VARIANTS)
def test_fixtures_are_what_torch_gives_today(variant, tmp_path):
    pytest.importorskip("torch")
    expected = dict(np.load(FOLDER / variant / "expected.npz"))
    today = numbers(write_checkpoint(tmp_path, variant))
    assert today.keys() == expected.keys()
    for name, value in today.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-5, err_msg=name)

"""Families against numbers of torch transformers, committed; their checkpoints in and out."""

import json

import jax
import numpy as np
import pytest
from make_decoder_fixtures import torch_numbers
from make_family_fixtures import FOLDER, VARIANTS, inputs, numbers, write_checkpoint
from safetensors.numpy import load_file
from test_decoder import assert_parity, jit, jitted_logits, ours, padded_rows

from dpo_jax.language.models.decoder import decoder_function
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
    pytest.importorskip("torch", reason="compares the committed numbers with torch's")
    expected = dict(np.load(FOLDER / variant / "expected.npz"))
    today = numbers(write_checkpoint(tmp_path, variant))
    assert today.keys() == expected.keys()
    for name, value in today.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_torch_reads_an_export_and_gives_equal_logits(variant, tmp_path):
    pytest.importorskip("torch", reason="compares logits of an export with torch's")
    config, variables = load_hf(FOLDER / variant)
    changed = jax.tree.map(lambda leaf: leaf * 1.05 + 0.01, variables)
    # Without the source, so that the settings of config_to_hf alone decide; but the padding word that the class of a
    # Phi 3 has by default is none of these few words.
    source = FOLDER / variant if config.family == "phi3" else None
    save_hf(tmp_path, config, changed, source=source, max_shard_bytes=9000)
    given = inputs()
    kept = np.arange(given["tokens"].shape[1]) < given["lengths"][:, None]
    got = jitted_logits(config, changed, *padded_rows(given["tokens"], given["lengths"])) * kept[..., None]
    np.testing.assert_allclose(got, torch_numbers(tmp_path, given)["logits"], rtol=0, atol=1e-4)
    assert np.abs(got - np.load(FOLDER / variant / "expected.npz")["logits"]).max() > 0.05


REWARDS = ("qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "phi", "gpt_neox", "gpt2", "qwen3_moe", "mixtral")


@pytest.mark.parametrize("variant", REWARDS)
def test_reward_models_give_torchs_rewards_both_ways(variant, tmp_path):
    torch = pytest.importorskip("torch", reason="compares rewards with torch's")
    from transformers import AutoModelForSequenceClassification

    config, variables = load_hf(write_checkpoint(tmp_path / "theirs", variant, reward=True))
    assert config.reward
    save_hf(tmp_path / "ours", config, variables, source=tmp_path / "theirs")
    tokens = inputs()["tokens"][:1]
    answer = jit(decoder_function(config))(variables, *padded_rows(tokens, np.array([tokens.shape[1]])))
    got = float(answer.hidden[0, -1] @ answer.head[0])
    assert answer.softcap is None and answer.bias is None
    for folder in (tmp_path / "theirs", tmp_path / "ours"):
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
        assert model.config.num_labels == 1
        with torch.no_grad():
            want = float(model(torch.tensor(tokens, dtype=torch.long)).logits[0, 0])
        assert got == pytest.approx(want, abs=1e-4), folder

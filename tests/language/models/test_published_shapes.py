"""Checkpoints of full size: the tables name exactly the published tensors, with their shapes, without making any."""

import json

import pytest
from make_published_shapes import FILE, PUBLISHED, packed, shapes_of, unpacked

from dpo_jax.language.models.folder import config_from_hf, config_to_hf
from dpo_jax.language.models.weights import tensor_shapes

KNOWN = json.loads(FILE.read_text())


@pytest.mark.parametrize("name", KNOWN)
def test_tensors_are_the_published_ones(name):
    config = config_from_hf(KNOWN[name]["config"], place=name)
    assert tensor_shapes(config) == unpacked(KNOWN[name]["tensors"])
    assert config_from_hf(config_to_hf(config)) == config


def test_features_of_published_configs():
    configs = {name.split("/")[1]: config_from_hf(entry["config"]) for name, entry in KNOWN.items()}
    gemma = configs["gemma-3-1b-it"]
    assert [layer for layer, local in enumerate(gemma.local_layers) if not local] == [5, 11, 17, 23]
    assert gemma.window == 512 and gemma.rope.theta == 1e6 and gemma.local_rope.theta == 1e4
    assert configs["gemma-2-2b"].local_layers[:2] == (True, False) and configs["gemma-2-2b"].logit_softcap == 30
    assert configs["phi-2"].rotary_dim == 32 and configs["pythia-160m"].rotary_dim == 16
    assert configs["Mistral-7B-v0.1"].window == 4096 and configs["Mistral-7B-v0.1"].local_layers == ()
    assert configs["Qwen2.5-7B-Instruct"].window is None and configs["Qwen2.5-7B-Instruct"].qkv_bias
    assert configs["gpt2"].tie_embeddings and configs["gpt2"].intermediate_size == 3072


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_file_is_what_transformers_has_today(name):
    pytest.importorskip("torch", reason="compares the committed shapes with those of transformers' models")
    assert KNOWN[name] == {"config": PUBLISHED[name], "tensors": packed(shapes_of(PUBLISHED[name]))}

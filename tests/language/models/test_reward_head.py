"""Reward heads: new on a language model, in and out of sequence-classification folders, equal to torch's rewards."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_tiny_checkpoint import make_tiny_checkpoint

from dpo_jax.language.models.decoder import decoder_function
from dpo_jax.language.models.folder import WeightsError, config_from_hf, read_config
from dpo_jax.language.models.weights import load_hf, save_hf
from dpo_jax.tree import named_leaves

SIZES = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1}


def as_reward_model(folder):
    config = config_from_hf(read_config(folder))
    return load_hf(folder, config=type(config)(**{**vars(config), "reward": True}))


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    return make_tiny_checkpoint(tmp_path_factory.mktemp("lm"), scale=0.2, **SIZES)


@pytest.fixture(scope="module")
def reward_folder(language_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rm")
    config, variables = as_reward_model(language_model)
    save_hf(folder, config, variables, source=language_model)
    return folder


def test_a_language_model_gets_a_new_head_and_keeps_the_rest(language_model):
    _, variables = as_reward_model(language_model)
    leaves = named_leaves(variables)
    before = named_leaves(load_hf(language_model)[1])
    assert leaves.keys() - before.keys() == {"score/weight"} and before.keys() - leaves.keys() == {"head/embedding"}
    for name in leaves.keys() & before.keys():
        np.testing.assert_array_equal(leaves[name], before[name])
    head = np.asarray(leaves["score/weight"])
    assert head.shape == (1, 16) and 0.1 < head.std() * np.sqrt(17) < 3
    np.testing.assert_array_equal(head, named_leaves(as_reward_model(language_model)[1])["score/weight"])


def test_the_folder_is_a_sequence_classifier_and_comes_back(language_model, reward_folder):
    written = json.loads((reward_folder / "config.json").read_text())
    assert written["architectures"] == ["LlamaForSequenceClassification"] and len(written["id2label"]) == 1
    config, variables = load_hf(reward_folder)
    assert config.reward
    first = named_leaves(as_reward_model(language_model)[1])
    for name, leaf in named_leaves(variables).items():
        np.testing.assert_array_equal(leaf, first[name])


def test_several_labels_are_no_reward():
    with pytest.raises(WeightsError, match="3 labels"):
        labels = {str(i): str(i) for i in range(3)}
        architecture = ["LlamaForSequenceClassification"]
        keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        config_from_hf(
            {**dict.fromkeys(keys, 8), "num_attention_heads": 4, "architectures": architecture, "id2label": labels}
        )


def test_rewards_equal_those_of_torch(reward_folder):
    torch = pytest.importorskip("torch", reason="compares rewards with torch's")
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(reward_folder, dtype=torch.float32).eval()
    config, variables = load_hf(reward_folder)
    apply_fn = partial(decoder_function(config), variables)
    rng = np.random.default_rng(0)
    for length in (3, 9):
        ids = rng.integers(3, 300, size=(2, length))
        with torch.no_grad():
            expected = model(torch.tensor(ids)).logits.numpy()[:, 0]
        positions = jnp.broadcast_to(jnp.arange(length), ids.shape)
        answer = jax.jit(apply_fn)(jnp.asarray(ids), positions, jnp.full(ids.shape, length))
        np.testing.assert_allclose(answer.hidden[:, -1] @ answer.head[0], expected, atol=1e-5)

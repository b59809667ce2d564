"""Broken checkpoints: whatever is wrong comes out as one WeightsError that names it, never as something else."""

import shutil

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from make_decoder_fixtures import FOLDER, inputs
from make_tiny_checkpoint import llama_config

from dpo_jax import weights as files
from dpo_jax.language.models import weights
from dpo_jax.language.models.decoder import decoder_function
from dpo_jax.language.models.folder import WeightsError, config_from_hf, read_config
from dpo_jax.language.models.rope import rope_frequencies
from dpo_jax.language.models.weights import load_hf, save_hf
from dpo_jax.tree import named_leaves

PLAIN = FOLDER / "plain"
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"hidden_size": "big"}, "hidden_size is 'big'"),
        ({"hidden_size": 64.0}, "hidden_size is 64.0"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_attention_heads": -4}, "num_attention_heads is -4"),
        ({"intermediate_size": None}, "intermediate_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3"),
        ({"head_dim": 15}, "head_dim is 15"),
        ({"head_dim": None, "num_attention_heads": 5}, "num_attention_heads is 5"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ({"architectures": "LlamaForCausalLM"}, "architecture LlamaForCausalLM"),
        ({"architectures": [["LlamaForCausalLM"]]}, "architecture"),
        ({"hidden_act": ["silu"]}, "hidden_act"),
        ({"rope_parameters": [1]}, "rope_parameters is"),
        ({"rope_parameters": None, "rope_scaling": "linear"}, "rope_scaling is 'linear'"),
        ({"rope_parameters": {"rope_theta": -1e4}}, "rope_theta is -10000.0"),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, "rope type"),
        ({"rope_parameters": {**YARN, "rope_theta": 1}}, "rope_theta is 1"),
        ({"rope_parameters": {**LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor is 1.0"),
        ({"rope_parameters": {**LLAMA3, "factor": "8"}}, "factor is '8'"),
        ({"rope_parameters": {**YARN, "original_max_position_embeddings": -1}}, "original_max_position_embeddings"),
        ({"rope_parameters": {**YARN, "mscale": "a", "mscale_all_dim": 1.0}}, "mscale is 'a'"),
        ({"rope_parameters": {**YARN, "truncate": 1}}, "truncate is 1"),
    ],
)
def test_a_wrong_value_is_named_with_its_key(changes, named):
    with pytest.raises(WeightsError) as error:
        config_from_hf(llama_config(**changes), place="here/config.json")
    assert str(error.value).startswith("here/config.json: ") and named in str(error.value)


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["default", "linear", "llama3", "yarn", "silu"]),
    st.lists(st.integers() | st.text(max_size=3), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
ROPE_KEYS = [
    *YARN,
    *LLAMA3,
    "type",
    "rope_theta",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
    "beta_fast",
    "beta_slow",
    "truncate",
    "partial_rotary_factor",
]
KEYS = [*llama_config(), "rope_theta", "rope_scaling", "max_position_embeddings", "initializer_range"]


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    changes=st.dictionaries(st.sampled_from(KEYS), ODD, max_size=3),
    start=st.sampled_from([{}, {"rope_type": "linear", "factor": 2.0}, LLAMA3, YARN]),
    rope=st.none() | st.dictionaries(st.sampled_from(ROPE_KEYS), ODD, max_size=3),
    place=st.sampled_from(["rope_scaling", "rope_parameters"]),
)
def test_any_config_is_read_or_refused(changes, start, rope, place):
    config = llama_config(rope_parameters=None)
    config |= {place: {**start, **rope} if rope is not None else None} | changes
    try:
        read = config_from_hf(config)
    except WeightsError:
        return
    # What is accepted can be computed with.
    assert read.heads % read.key_value_heads == 0 and read.head_dim % 2 == 0
    if read.head_dim <= 512:
        assert np.all(np.isfinite(rope_frequencies(read.rope, read.head_dim)))


def test_a_base_in_the_wrong_place_would_be_noticed():
    given = inputs()
    columns = np.broadcast_to(np.arange(given["tokens"].shape[1]), given["tokens"].shape)
    ends = np.where(columns < given["lengths"][:, None], given["lengths"][:, None], 0)
    _, variables = load_hf(PLAIN)
    before = {key: value for key, value in read_config(PLAIN).items() if key != "rope_parameters"}
    base = read_config(PLAIN)["rope_parameters"]["rope_theta"]
    layouts = {
        "new": ({"rope_parameters": {"rope_type": "default", "rope_theta": base}}, base),
        "old": ({"rope_theta": base, "rope_scaling": None}, base),
        "none": ({}, 10000.0),
    }
    expected = np.load(PLAIN / "expected.npz")["logits"]
    for name, (keys, theta) in layouts.items():
        config = config_from_hf({**before, **keys})
        assert config.rope.theta == theta, name
        answer = jax.jit(decoder_function(config))(variables, given["tokens"], columns, ends)
        error = np.abs(np.asarray(answer.hidden @ answer.head.T) * (ends > 0)[..., None] - expected).max()
        assert error < 1e-4 if theta == base else error > 1e-2, name


@pytest.mark.parametrize("text", ["{", "[]", '"x"', "", "\udcff", "[" * 100_000, "1" * 5000])
def test_a_config_file_that_is_no_object_is_refused(text, tmp_path):
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(WeightsError, match=r"config\.json"):
        load_hf(tmp_path)


@pytest.mark.parametrize(
    "index",
    [
        "{",
        "[]",
        "{}",
        '{"weight_map": {}}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": "../plain.safetensors"}}',
    ],
)
def test_an_index_that_cannot_be_used_is_refused(index, tmp_path):
    folder = shutil.copytree(PLAIN, tmp_path / "copy")
    (folder / weights.INDEX_FILE).write_text(index)
    with pytest.raises(WeightsError, match=r"index\.json"):
        load_hf(folder)


@pytest.mark.parametrize("kept", [0, 7, 500, -64])
def test_a_file_that_is_cut_off_is_refused(kept, tmp_path):
    folder = shutil.copytree(PLAIN, tmp_path / "copy")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(WeightsError, match=r"model\.safetensors: not a safetensors file"):
        load_hf(folder)


def test_an_export_that_fails_on_the_way_is_no_checkpoint(monkeypatch, tmp_path):
    config, variables = load_hf(PLAIN)

    def fails(after):
        calls, write = [], files.save_file

        def limited(*arguments, **options):
            calls.append(None)
            if len(calls) > after:
                raise OSError("no space left")
            write(*arguments, **options)

        return limited

    with monkeypatch.context() as patch:
        patch.setattr(files, "save_file", fails(after=2))
        with pytest.raises(OSError, match="no space"):
            save_hf(tmp_path / "new", config, variables, max_shard_bytes=9000)
    with pytest.raises(WeightsError):
        load_hf(tmp_path / "new")
    # A second try with fewer files leaves nothing of the first.
    save_hf(tmp_path / "new", config, variables)
    assert {file.name for file in (tmp_path / "new").iterdir()} == {"config.json", "model.safetensors"}
    folder = shutil.copytree(PLAIN, tmp_path / "old")
    with monkeypatch.context() as patch:

        def breaks(*_):
            raise OSError("no space left")

        patch.setattr(weights, "_write_configs", breaks)
        with pytest.raises(OSError, match="no space"):
            save_hf(folder, config, jax.tree.map(lambda leaf: leaf + 1, variables))
    with pytest.raises(WeightsError, match=r"no model\.safetensors"):
        load_hf(folder)
    kept = shutil.copytree(PLAIN, tmp_path / "kept")
    with pytest.raises(WeightsError, match=r"config\.json"):
        save_hf(kept, config, variables, source=tmp_path / "nowhere")
    for name, leaf in named_leaves(load_hf(kept)[1]).items():
        np.testing.assert_array_equal(leaf, named_leaves(variables)[name])

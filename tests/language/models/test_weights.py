"""Checkpoints in and out: both layouts of configs, shards, types, errors that name everything, torch as the judge."""

import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from make_decoder_fixtures import FOLDER, VARIANTS, inputs, torch_numbers, write_checkpoint
from make_tiny_checkpoint import llama_config
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from dpo_jax import weights as files
from dpo_jax.language.models.decoder import DecoderConfig, RopeConfig, decoder_function
from dpo_jax.language.models.folder import WeightsError, config_from_hf, config_to_hf
from dpo_jax.language.models.weights import load_hf, save_hf
from dpo_jax.sharding import P, make_mesh
from dpo_jax.tree import named_leaves

PLAIN, TIED = FOLDER / "plain", FOLDER / "tied"


def copied(tmp_path, source=PLAIN, **changes):
    """A copy of a fixture with other keys in its config.json (None takes one away)."""
    folder = shutil.copytree(source, tmp_path / "copy")
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


def logits(folder):
    given = inputs()
    config, variables = load_hf(folder)
    columns = np.broadcast_to(np.arange(given["tokens"].shape[1]), given["tokens"].shape)
    ends = np.where(columns < given["lengths"][:, None], given["lengths"][:, None], 0)
    answer = jax.jit(decoder_function(config))(variables, given["tokens"], columns, ends)
    return np.asarray(answer.hidden @ answer.head.T) * (ends > 0)[..., None]


def assert_same(got, want):
    got, want = named_leaves(got), named_leaves(want)
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def test_tensors_stand_where_they_belong():
    config, variables = load_hf(PLAIN)
    tensors = load_file(PLAIN / "model.safetensors")
    np.testing.assert_array_equal(variables["embed"]["embedding"], tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(variables["head"]["embedding"], tensors["lm_head.weight"])
    for layer in range(config.layers):
        kernel = variables["layers"]["feed_forward"]["down"]["kernel"][layer]
        np.testing.assert_array_equal(kernel, tensors[f"model.layers.{layer}.mlp.down_proj.weight"].T)
        scale = variables["layers"]["feed_forward_norm"]["scale"][layer]
        np.testing.assert_array_equal(scale, tensors[f"model.layers.{layer}.post_attention_layernorm.weight"])


@pytest.mark.parametrize("variant", ["biased", "tied"])
def test_what_is_saved_reads_back_bit_by_bit(variant, tmp_path):
    config, variables = load_hf(FOLDER / variant)
    save_hf(tmp_path, config, variables, source=FOLDER / variant, max_shard_bytes=9000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    again, loaded = load_hf(tmp_path)
    assert again == config
    assert_same(loaded, variables)
    before, after = load_file(FOLDER / variant / "model.safetensors"), {}
    for file in tmp_path.glob("*.safetensors"):
        after |= load_file(file)
        with safe_open(file, framework="numpy") as opened:
            assert opened.metadata() == {"format": "pt"}
        assert file.stat().st_size < 9000 + 2000
    assert_same(after, before)


RUN = {"layers": 2, "heads": 4, "key_value_heads": 2, "head_dim": 8}


@pytest.mark.parametrize(
    "rope",
    [
        RopeConfig(5e5),
        RopeConfig(1e4, "linear", 4.0),
        RopeConfig(5e5, "llama3", 8.0, 8192, 1.5, 5.0),
        RopeConfig(1e6, "yarn", 4.0, 4096, beta_fast=16.0, beta_slow=2.0, attention_factor=1.25, truncate=False),
    ],
)
def test_configs_survive_the_way_there_and_back(rope):
    config = DecoderConfig(64, 16, 24, **RUN, norm_epsilon=3e-6, rope=rope, tie_embeddings=True, attention_bias=True)
    assert config_from_hf(json.loads(json.dumps(config_to_hf(config)))) == config


def test_both_layouts_of_rope_settings_mean_the_same():
    band = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    old = llama_config(rope_parameters=None, rope_theta=5e5, rope_scaling={"rope_type": "llama3", **band})
    new = llama_config(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **band})
    want = RopeConfig(5e5, "llama3", 8.0, 8192, 1.0, 4.0)
    assert config_from_hf(old).rope == config_from_hf(new).rope == want
    assert config_from_hf(llama_config(rope_parameters=None, rope_theta=5e5)).rope == RopeConfig(5e5)
    assert config_from_hf(llama_config(rope_parameters=None)).rope == RopeConfig(10000.0)
    bare = {key: value for key, value in llama_config().items() if key not in ("head_dim", "num_key_value_heads")}
    assert (config_from_hf(bare).head_dim, config_from_hf(bare).key_value_heads) == (16, 4)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"architectures": ["FalconForCausalLM"]}, "MixtralForCausalLM"),
        ({"architectures": None}, "not given"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "'longrope'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor, high_freq_factor"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ],
)
def test_a_config_that_the_decoder_cannot_be_is_refused_by_name(changes, named):
    with pytest.raises(WeightsError, match=named):
        config_from_hf(llama_config(**changes))


def test_one_error_names_all_tensors_that_do_not_fit(tmp_path):
    folder = copied(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_norm.weight"] = np.ones(8, np.float32)
    tensors["model.embed_tokens.weight"] = np.ones((63, 16), np.float32)
    # Transposed: the number of elements alone would not tell.
    tensors["model.layers.0.self_attn.o_proj.weight"] = np.ones((32, 16), np.float32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(WeightsError) as error:
        load_hf(folder)
    for part in (
        "2 missing: model.layers.1.mlp.up_proj.weight, model.norm.weight",
        "1 surplus: model.layers.0.self_attn.q_norm.weight",
        "model.embed_tokens.weight is [63, 16], expected [64, 16]",
        "model.layers.0.self_attn.o_proj.weight is [32, 16], expected [16, 32]",
    ):
        assert part in str(error.value)


def test_a_head_that_is_tied_may_be_stored_and_old_buffers_are_passed_over(tmp_path):
    folder = copied(tmp_path, TIED)
    tensors = load_file(folder / "model.safetensors")
    tensors |= {
        "lm_head.weight": tensors["model.embed_tokens.weight"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
    }
    save_file(tensors, folder / "model.safetensors")
    assert_same(load_hf(folder)[1], load_hf(TIED)[1])
    del tensors["lm_head.weight"]
    untied = copied(tmp_path / "untied", TIED, tie_word_embeddings=False)
    with pytest.raises(WeightsError, match=r"1 missing: lm_head\.weight"):
        load_hf(untied)


def test_folders_without_readable_weights_are_refused(tmp_path):
    folder = copied(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"pytorch_model\.bin.*safetensors"):
        load_hf(folder)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="model-00001-of-00002"):
        load_hf(folder)
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"nothing of use")
    with pytest.raises(WeightsError, match="not a safetensors file"):
        load_hf(folder)
    with pytest.raises(WeightsError, match="nobody/no-such-model"):
        load_hf("nobody/no-such-model")  # the tests run with the hub switched off


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_types_of_files_and_of_parameters(stored, wanted, tmp_path):
    folder = copied(tmp_path)
    tensors = {k: v.astype(stored) for k, v in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    config = replace(config_from_hf(json.loads((folder / "config.json").read_text())), param_dtype=wanted)
    _, variables = load_hf(folder, config=config)
    assert all(leaf.dtype == wanted for leaf in jax.tree.leaves(variables))
    want = tensors["model.layers.1.self_attn.k_proj.weight"].astype(wanted).T
    np.testing.assert_array_equal(variables["layers"]["attention"]["key"]["kernel"][1], want)
    save_hf(tmp_path / "out", config, variables, dtype=jnp.bfloat16)
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_each_device_reads_its_own_part_of_one_tensor_at_a_time(monkeypatch, tmp_path):
    read, make = [], jax.make_array_from_callback

    def watched(shape, sharding, part):
        def counted(index):
            values = part(index)
            read.append((int(np.prod(shape)), values.size))
            return values

        return make(shape, sharding, counted)

    monkeypatch.setattr(files.jax, "make_array_from_callback", watched)
    mesh = make_mesh(fsdp=4, model=2)
    config, variables = load_hf(PLAIN, mesh=mesh)
    leaves = named_leaves(variables)
    assert leaves["layers/attention/query/kernel"].sharding.spec == P(None, "fsdp", "model")
    assert leaves["layers/feed_forward/down/kernel"].sharding.spec == P(None, "model", "fsdp")
    assert leaves["embed/embedding"].sharding.spec == P("model", "fsdp")
    # Never a stack of layers, and of a matrix an eighth at a time; only the norms' scales are whole everywhere.
    largest = max(load_file(PLAIN / "model.safetensors").values(), key=np.size).size
    assert max(whole for whole, _ in read) == largest
    assert all(part * 8 == whole for whole, part in read if whole > 16)
    monkeypatch.undo()
    assert_same(variables, load_hf(PLAIN)[1])
    save_hf(tmp_path, config, variables)
    assert_same(load_file(tmp_path / "model.safetensors"), load_file(PLAIN / "model.safetensors"))


def test_what_belongs_to_the_source_is_carried_along(tmp_path):
    source = copied(tmp_path, rope_scaling=None, eos_token_id=[2, 7])
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "notes.md",
    ):
        (source / name).write_text(name)
    config, variables = load_hf(source)
    out = tmp_path / "out"
    save_hf(out, config, variables, source=source)
    left = {"notes.md", "expected.npz"}
    assert {file.name for file in out.iterdir()} == {file.name for file in source.iterdir()} - left
    written = json.loads((out / "config.json").read_text())
    assert written["eos_token_id"] == [2, 7] and written["max_position_embeddings"] == 128


def test_writing_that_fails_leaves_the_weights_that_were_there(monkeypatch, tmp_path):
    folder = copied(tmp_path)
    config, variables = load_hf(folder)

    def full(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match="no space"):
        save_hf(folder, config, variables, source=folder)
    assert_same(load_hf(folder)[1], variables)
    monkeypatch.undo()
    save_hf(folder, config, jax.tree.map(lambda leaf: leaf + 1, variables), source=folder, max_shard_bytes=9000)
    assert not (folder / "model.safetensors").exists() and not list(folder.glob("*.partial"))
    assert_same(load_hf(folder)[1], jax.tree.map(lambda leaf: leaf + 1, variables))


@pytest.mark.parametrize("variant", VARIANTS)
def test_fixtures_are_what_torch_gives_today(variant, tmp_path):
    pytest.importorskip("torch", reason="compares the committed numbers with torch's")
    expected = dict(np.load(FOLDER / variant / "expected.npz"))
    today = torch_numbers(write_checkpoint(tmp_path, variant))
    assert today.keys() == expected.keys()
    for name, value in today.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_torch_reads_an_export_and_gives_equal_logits(variant, tmp_path):
    pytest.importorskip("torch", reason="compares logits of an export with torch's")
    config, variables = load_hf(FOLDER / variant)
    changed = jax.tree.map(lambda leaf: leaf * 1.05 + 0.01, variables)
    # Without the source, so that the settings of config_to_hf alone decide.
    save_hf(tmp_path, config, changed, max_shard_bytes=9000)
    got = torch_numbers(tmp_path)["logits"]
    np.testing.assert_allclose(got, logits(tmp_path), rtol=0, atol=1e-4)
    assert np.abs(got - np.load(FOLDER / variant / "expected.npz")["logits"]).max() > 0.1

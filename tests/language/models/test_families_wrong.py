"""Configs and tensors of families that the decoder cannot be, and published oddities that it can."""

import shutil

import numpy as np
import pytest
from make_family_fixtures import FOLDER
from safetensors.numpy import load_file, save_file

from dpo_jax.language.models.folder import WeightsError, config_from_hf, read_config
from dpo_jax.language.models.rope import RopeConfig
from dpo_jax.language.models.weights import load_hf
from dpo_jax.tree import named_leaves


def changed(variant, **changes):
    """A fixture's config.json with other keys; None takes one away."""
    return {key: value for key, value in {**read_config(FOLDER / variant), **changes}.items() if value is not None}


@pytest.mark.parametrize(
    "variant, changes, named",
    [
        ("qwen2", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("qwen2_tied_window", {"layer_types": ["sliding_attention"]}, "layer_types is ['sliding_attention']"),
        ("qwen2_tied_window", {"layer_types": ["full_attention", "mamba"]}, "layer_types is"),
        ("qwen2_tied_window", {"sliding_window": 0}, "sliding_window is 0"),
        ("qwen3", {"head_dim": 7}, "head_dim is 7"),
        ("mistral", {"layer_types": ["full_attention"] * 2}, "layer_types ['full_attention', 'full_attention']"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation is 'gelu'"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        ("gemma2", {"attn_logit_softcapping": -1.0}, "attn_logit_softcapping is -1.0"),
        ("gemma3", {"rope_parameters": {"rope_theta": 1e4}}, "full_attention, sliding_attention"),
        ("gemma3", {"rope_parameters": {"full_attention": 3}}, "full_attention are no object"),
        ("gemma3", {"rope_parameters": {"full_attention": {"partial_rotary_factor": 0.5}}}, "partial_rotary_factor"),
        ("phi3", {"rope_parameters": {"rope_type": "llama3"}}, "rope type 'llama3' of a Phi 3 model"),
        ("phi3", {"rope_parameters": None, "rope_scaling": {"type": "su"}}, "short_factor is None; expected 2 numbers"),
        (
            "phi3",
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [1.0, -2.0]}},
            "long_factor[1] is -2.0",
        ),
        ("phi", {"qk_layernorm": True}, "qk_layernorm True: not supported"),
        ("phi", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("gpt_neox", {"rope_parameters": {"partial_rotary_factor": 0.4}}, "rotary_pct is 0.4"),
        ("gpt_neox", {"rope_parameters": {"partial_rotary_factor": 2}}, "rotary_pct is 2"),
        ("gpt_neox", {"num_attention_heads": 3}, "num_attention_heads is 3"),
        (
            "qwen3_moe",
            {"decoder_sparse_step": 2, "mlp_only_layers": [0]},
            "decoder_sparse_step 2, mlp_only_layers [0]: not supported",
        ),
        ("qwen3_moe", {"num_experts_per_tok": 0}, "num_experts_per_tok is 0"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise 0.1: not supported"),
        ("gpt2", {"n_head": 3}, "n_head is 3"),
        ("gpt2", {"n_embd": None, "n_layer": None}, "the keys n_embd, n_layer are missing"),
        (
            "gpt2",
            {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
            "scale_attn_weights False, scale_attn_by_inverse_layer_idx True: not supported",
        ),
        ("gpt2", {"architectures": ["GPT2ForSequenceClassification"]}, "with 2 labels"),
    ],
)
def test_what_the_decoder_cannot_be_is_refused_by_name(variant, changes, named):
    with pytest.raises(WeightsError) as error:
        config_from_hf(changed(variant, **changes), place="here/config.json")
    assert str(error.value).startswith("here/config.json: ") and named in str(error.value)


def test_a_missing_window_is_named():
    given = {**read_config(FOLDER / "gemma2"), "sliding_window": None}
    with pytest.raises(WeightsError, match="sliding_window is null"):
        config_from_hf(given)


def test_layouts_before_transformers_5():
    # A key that names the base or the rotated part in its own way, a pattern instead of a list of layers.
    neox = config_from_hf(changed("gpt_neox", rope_parameters=None, rotary_pct=0.5, rotary_emb_base=700))
    assert neox.rotary_dim == 4 and neox.rope == RopeConfig(700.0)
    assert config_from_hf(changed("gpt_neox", rope_parameters=None)).rotary_dim == 2
    phi = config_from_hf(changed("phi", rope_parameters=None, rope_theta=300.0, partial_rotary_factor=0.25))
    assert phi.rotary_dim == 2 and phi.rope == RopeConfig(300.0)
    old = {"rope_theta": 900.0, "rope_local_base_freq": 30.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    pattern = {"layer_types": None, "sliding_window_pattern": 2}
    gemma = config_from_hf(changed("gemma3", rope_parameters=None, **old, **pattern))
    assert (gemma.rope, gemma.local_rope) == (RopeConfig(900.0, "linear", 4.0), RopeConfig(30.0))
    assert gemma.local_layers == (True, False, True)
    assert config_from_hf(changed("gemma3", rope_parameters=None)).rope == RopeConfig(1e6)
    assert config_from_hf(changed("gemma2", layer_types=None)).local_layers == (True, False)
    late = config_from_hf(changed("qwen2_tied_window", layer_types=None, max_window_layers=0))
    assert late.window == 5 and late.local_layers == ()
    assert config_from_hf(changed("qwen2", use_sliding_window=False, layer_types=None)).window is None


def copied(tmp_path, variant, change):
    """A fixture whose tensors went through `change`."""
    folder = shutil.copytree(FOLDER / variant, tmp_path / variant)
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")
    return folder


def test_a_model_without_its_head_has_shorter_names_and_old_buffers(tmp_path):
    def published(tensors):
        names = {name: name.removeprefix("transformer.") for name in tensors}
        return {names[name]: tensor for name, tensor in tensors.items()} | {
            "h.0.attn.bias": np.ones((1, 1, 24, 24), np.float32),
            "h.1.attn.masked_bias": np.ones(1, np.float32),
        }

    folder = copied(tmp_path, "gpt2", published)
    want = named_leaves(load_hf(FOLDER / "gpt2")[1])
    for name, leaf in named_leaves(load_hf(folder)[1]).items():
        np.testing.assert_array_equal(leaf, want[name])


def test_one_error_names_all_fused_tensors_that_do_not_fit(tmp_path):
    def broken(tensors):
        del tensors["model.layers.1.mlp.gate_up_proj.weight"]
        tensors["model.layers.0.self_attn.qkv_proj.weight"] = np.ones((16, 16), np.float32)
        tensors["model.layers.0.self_attn.q_proj.weight"] = np.ones((16, 16), np.float32)
        return tensors

    with pytest.raises(WeightsError) as error:
        load_hf(copied(tmp_path, "phi3", broken))
    for part in (
        "1 missing: model.layers.1.mlp.gate_up_proj.weight",
        "1 surplus: model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.qkv_proj.weight is [16, 16], expected [32, 16]",
    ):
        assert part in str(error.value)


def test_biases_where_a_family_has_none_are_surplus(tmp_path):
    def biased(tensors):
        return tensors | {"model.layers.0.self_attn.o_proj.bias": np.ones(16, np.float32)}

    with pytest.raises(WeightsError, match=r"1 surplus: model\.layers\.0\.self_attn\.o_proj\.bias"):
        load_hf(copied(tmp_path, "qwen2", biased))

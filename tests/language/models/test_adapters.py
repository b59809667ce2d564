"""Adapter folders against numbers of PEFT, both ways; what is refused; adapters in the scanned decoder."""

import json
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_adapter_fixtures import BASE, FOLDER, VARIANTS, base_model, base_of, torch_numbers
from safetensors.numpy import load_file, save_file

from dpo_jax.language.models.adapters import load_adapter, save_adapter
from dpo_jax.language.models.decoder import DecoderConfig, decoder_function, init_variables
from dpo_jax.language.models.folder import WeightsError
from dpo_jax.language.models.weights import checkpoint_tensors, load_hf
from dpo_jax.lora import LoraConfig, adapter_sites, combine_adapters, init_adapters, merge, with_adapters
from dpo_jax.tree import map_named

# Tests compile much and compute little.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(scope="module")
def base():
    return load_hf(BASE)


def trained(variables, config, seed=1):
    """Adapters as training leaves them: no factor is zero and no norm is that of the kernel."""
    draw = np.random.default_rng(seed)

    def moved(name, leaf):
        if name.endswith("lora_b"):
            return jnp.asarray(draw.normal(size=leaf.shape) * 0.3, jnp.float32)
        return leaf * draw.uniform(0.5, 1.5, leaf.shape) if name.endswith("magnitude") else leaf

    return map_named(moved, jit(init_adapters, static_argnums=2)(jax.random.key(seed), variables, config))


def logits(config, base, adapters, tokens):
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    ends = np.full_like(tokens, tokens.shape[1])
    function = decoder_function(config, adapters)
    answer = jit(function)(with_adapters(base, adapters or {}), tokens, positions, ends)
    return jnp.einsum("rld,vd->rlv", answer.hidden, answer.head)


def assert_those_of_peft(config, base, adapters, expected):
    got = logits(config, base, adapters, expected["tokens"])
    np.testing.assert_allclose(got, expected["logits"], rtol=0, atol=1e-5 * np.abs(expected["logits"]).max())
    before, after = (
        dict(checkpoint_tensors(config, variables)) for variables in (base, jit(merge)(with_adapters(base, adapters)))
    )
    changed = {name: value for name, value in after.items() if np.any(value != before[name])}
    assert {f"merged:{name}" for name in changed} == expected.keys() - {"tokens", "logits"}
    for name, value in changed.items():
        np.testing.assert_allclose(value, expected[f"merged:{name}"], rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_folders_of_peft_give_what_peft_gives(variant):
    config, variables = load_hf(base_of(variant))
    loaded = load_adapter(FOLDER / variant, config)
    assert loaded.rslora == (variant in ("rslora", "gpt_neox")) and loaded.base == base_of(variant).name
    assert_those_of_peft(config, variables, loaded.adapters, dict(np.load(FOLDER / variant / "expected.npz")))


@pytest.mark.parametrize("variant", VARIANTS)
def test_read_and_written_the_tensors_are_the_same(variant, tmp_path):
    config, _ = load_hf(base_of(variant))
    loaded = load_adapter(FOLDER / variant, config)
    save_adapter(tmp_path, config, loaded.adapters, rslora=loaded.rslora, base=loaded.base)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (FOLDER / variant, tmp_path))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        # A lower rank beside a higher one is filled up with zeros.
        kept = tuple(slice(size) for size in tensor.shape)
        np.testing.assert_array_equal(after[name][kept], tensor)
        assert np.abs(after[name]).sum() == pytest.approx(np.abs(tensor).sum(), rel=1e-6)
    again = load_adapter(tmp_path, config)
    assert jax.tree.all(jax.tree.map(np.array_equal, again.adapters, loaded.adapters))
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["fan_in_fan_out"] == variant.startswith("gpt2")


KINDS = {
    "lora": LoraConfig(rank=3, alpha=7.0),
    "rslora": LoraConfig(rank=3, alpha=5.0, rslora=True, alpha_pattern=((".*/down/.*", 0.1),)),
    "dora": LoraConfig(rank=2, dora=True, targets=".*(query|down)/kernel", rank_pattern=((".*query.*", 5),)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_exported_and_imported_nothing_is_lost(kind, base, tmp_path):
    config, variables = base
    adapters = trained(variables, KINDS[kind])
    save_adapter(tmp_path, config, adapters, rslora=KINDS[kind].rslora)
    loaded = load_adapter(tmp_path, config)
    assert jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), loaded[0], adapters))
    options = json.loads((tmp_path / "adapter_config.json").read_text())
    assert options["r"] in (3, 2, 5) and options["use_rslora"] == KINDS[kind].rslora
    assert (options["alpha_pattern"] != {}) == (kind == "rslora")
    assert options["lora_alpha"] == KINDS[kind].alpha


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, "upper_layer"])
def test_peft_loads_what_is_written(kind, base, tmp_path):
    config, variables = base
    if kind == "upper_layer":
        adapters, rslora = load_adapter(FOLDER / kind, config).adapters, False
    else:
        adapters, rslora = trained(variables, KINDS[kind]), KINDS[kind].rslora
    assert_peft_gives_the_same(tmp_path, BASE, base, adapters, rslora=rslora)


def assert_peft_gives_the_same(folder, base, opened, adapters, **options):
    pytest.importorskip("torch", reason="compares logits of adapted models with peft's")
    peft = pytest.importorskip("peft", reason="compares logits of adapted models with peft's")
    config, variables = opened
    save_adapter(folder, config, adapters, base=str(base), **options)
    model = peft.PeftModel.from_pretrained(base_model(base), folder).eval()
    assert_those_of_peft(config, variables, adapters, torch_numbers(model))


FUSED = ("gpt2", "gpt_neox", "phi3")
SEVERAL = {
    # Scales, ranks and kernels that have none differ inside the modules.
    "lora": LoraConfig(
        rank=2,
        targets=".*/(query|value|up|down)/kernel",
        rank_pattern=((".*value.*", 3),),
        alpha_pattern=((".*(query|up).*", 5.0),),
    ),
    "dora": LoraConfig(rank=2, alpha=3.0, dora=True, rank_pattern=((".*(key|gate).*", 1),)),
}


@pytest.mark.parametrize("kind", SEVERAL)
@pytest.mark.parametrize("family", FUSED)
def test_adapters_of_one_module_are_exported_as_one(family, kind, tmp_path):
    folder = base_of(family)
    config, variables = load_hf(folder)
    adapters = trained(variables, SEVERAL[kind])
    save_adapter(tmp_path, config, adapters)
    loaded = load_adapter(tmp_path, config).adapters
    sites, again = adapter_sites(adapters), adapter_sites(loaded)
    for path, site in sites.items():
        products = [jnp.matmul(s["lora_a"], s["lora_b"]) * s["lora_scale"][:, None, None] for s in (again[path], site)]
        np.testing.assert_allclose(*products, rtol=0, atol=1e-6, err_msg=path)
        if kind == "dora":
            np.testing.assert_array_equal(again[path]["lora_magnitude"], site["lora_magnitude"])
    for path in again.keys() - sites.keys():
        assert not np.any(again[path]["lora_b"]), path
    query = {"lora": 2 + 3, "dora": 2 + 1 + 2}[kind]
    assert again["layers/attention/query"]["lora_a"].shape[-1] == query
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
    want = logits(config, variables, adapters, tokens)
    got = logits(config, variables, loaded, tokens)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.slow
@pytest.mark.parametrize("kind", SEVERAL)
@pytest.mark.parametrize("family", FUSED)
def test_peft_loads_adapters_of_one_module(family, kind, tmp_path):
    opened = load_hf(base_of(family))
    assert_peft_gives_the_same(tmp_path, base_of(family), opened, trained(opened[1], SEVERAL[kind]))


def test_dora_on_part_of_a_module_is_refused(tmp_path):
    config, variables = load_hf(base_of("gpt2"))
    adapters = trained(variables, LoraConfig(rank=2, dora=True, targets=".*(query|value)/kernel"))
    with pytest.raises(WeightsError, match="adapt layers/attention/key too"):
        save_adapter(tmp_path, config, adapters)


def test_a_reward_models_head_travels_with_its_adapters(base, tmp_path):
    config = DecoderConfig(**{**vars(base[0]), "reward": True, "tie_embeddings": False})
    variables = jit(init_variables, static_argnums=0)(config, jax.random.key(0))
    adapters = trained(variables, LoraConfig(rank=2))
    save_adapter(tmp_path, config, adapters, learned={"score": variables["score"]})
    loaded = load_adapter(tmp_path, config)
    np.testing.assert_array_equal(loaded.learned["score"]["weight"], variables["score"]["weight"])
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    with pytest.raises(WeightsError, match=r"modules_to_save \['score'\]"):
        load_adapter(tmp_path, base[0])
    with pytest.raises(WeightsError, match="norm/scale was trained whole"):
        save_adapter(tmp_path, config, adapters, learned={"norm": variables["norm"]})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"peft_type": "IA3"}, "'LORA'"),
        ({"bias": "all"}, "bias 'all'"),
        ({"lora_bias": True}, "lora_bias True"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"target_parameters": ["mlp.experts"]}, "target_parameters"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"modules_to_save": ["lm_head"]}, "lm_head"),
        ({"something_new": {"on": 1}, "use_qalora": True}, "use_qalora True, something_new"),
        ({"r": 0}, "r is 0"),
        ({"lora_alpha": "big"}, "lora_alpha is 'big'"),
        ({"alpha_pattern": {"q_proj": -1}}, "alpha_pattern of 'q_proj' is -1"),
        ({"rank_pattern": [3]}, "rank_pattern is"),
        ({"r": 4}, "q_proj has lora_a [3, 16], lora_b [32, 3], expected lora_a [4, 16]"),
        ({"use_dora": True}, "lora_magnitude [32]"),
    ],
)
def test_what_is_not_supported_is_named(change, said, base, tmp_path):
    folder = shutil.copytree(FOLDER / "lora", tmp_path / "adapter")
    options = json.loads((folder / "adapter_config.json").read_text()) | change
    (folder / "adapter_config.json").write_text(json.dumps(options))
    with pytest.raises(WeightsError) as error:
        load_adapter(folder, base[0])
    assert said in str(error.value) and str(folder) in str(error.value)


PREFIX = "base_model.model.model.layers.0."


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({f"{PREFIX}mlp.router.lora_A.weight": np.zeros((3, 16), np.float32)}, "mlp.router"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": np.zeros((3, 64), np.float32)}, "lora_embedding_A"),
        ({f"{PREFIX}self_attn.q_proj.lora_A.weight": np.zeros((3, 5), np.float32)}, "lora_a [3, 5]"),
        ({f"{PREFIX}mlp.up_proj.lora_A.weight": np.zeros((3, 16), np.float32)}, "lora_b [24, 3]"),
        ({f"{PREFIX}self_attn.q_proj.lora_A.weight": np.zeros((3, 16), np.int8)}, "I8"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, said, base, tmp_path):
    folder = shutil.copytree(FOLDER / "lora", tmp_path / "adapter")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(WeightsError, match="no adapter_model"):
        load_adapter(folder, base[0])
    save_file(load_file(FOLDER / "lora" / "adapter_model.safetensors") | change, folder / "adapter_model.safetensors")
    with pytest.raises(WeightsError) as error:
        load_adapter(folder, base[0])
    assert said in str(error.value)


def test_half_a_dora_adapter_is_refused(base, tmp_path):
    adapters = trained(base[1], LoraConfig(rank=2, dora=True, targets=".*query/kernel"))
    plain = trained(base[1], LoraConfig(rank=2, targets=".*key/kernel"))
    with pytest.raises(WeightsError, match="1 of them DoRA"):
        save_adapter(tmp_path, base[0], with_adapters(adapters, plain))
    save_adapter(tmp_path, base[0], adapters)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "layers.0." in name}
    save_file(kept, tmp_path / "adapter_model.safetensors")
    with pytest.raises(WeightsError, match="DoRA in 1 of"):
        load_adapter(tmp_path, base[0])


def test_adapters_of_another_model_are_refused(base):
    with pytest.raises(ValueError, match="layers/attention/gate/lora_a"):
        decoder_function(base[0], {"layers": {"attention": {"gate": {"lora_a": jnp.zeros((2, 3, 4))}}}})


def test_weighted_adapters_in_the_decoder_add_up(base):
    config, variables = base
    tokens = np.load(FOLDER / "lora" / "expected.npz")["tokens"]
    named = {name: load_adapter(FOLDER / name, config).adapters for name in ("lora", "upper_layer")}
    both = combine_adapters(named, {"lora": 0.5, "upper_layer": 2.0})
    sites = adapter_sites(both)
    assert sites["layers/attention/query"]["lora_a"].shape[-1] == 3 + 2
    halved = combine_adapters(named, {"lora": 0.5})
    merged = jit(merge)(with_adapters(variables, halved))
    after = jit(merge)(with_adapters(merged, combine_adapters(named, {"upper_layer": 2.0})))
    want = logits(config, after, None, tokens)
    np.testing.assert_allclose(logits(config, variables, both, tokens), want, rtol=0, atol=1e-5 * np.abs(want).max())
    off = combine_adapters(named, {"lora": 0.0, "upper_layer": 0.0})
    np.testing.assert_array_equal(logits(config, variables, off, tokens), logits(config, variables, None, tokens))


@pytest.mark.parametrize("remat", ["none", "full"])
def test_zero_factors_change_no_bit(remat, base):
    config, variables = base
    config = DecoderConfig(**{**vars(config), "remat": remat, "dtype": "bfloat16"})
    adapters = jit(init_adapters, static_argnums=2)(jax.random.key(0), variables, LoraConfig(rank=2))
    tokens = np.load(FOLDER / "lora" / "expected.npz")["tokens"]
    np.testing.assert_array_equal(logits(config, variables, adapters, tokens), logits(config, variables, None, tokens))

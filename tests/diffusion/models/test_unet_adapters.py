"""Adapters of the UNet: files that diffusers wrote give its numbers, every spelling reads the same, ours go back."""

import json
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_unet_adapter_fixtures import ADAPTERS, BASE, FOLDER, output_of
from make_unet_fixtures import inputs, torch_model
from safetensors.numpy import load_file, save_file
from test_unet import QUICK, condition_of, near, variables_of

from dpo_jax.diffusion.models.adapters import FILE, load_adapter, save_adapter
from dpo_jax.diffusion.models.table import LINEAR, Place
from dpo_jax.diffusion.models.unet import abstract_variables, config_from_dict, unet_function, weight_table
from dpo_jax.keys import WeightsError
from dpo_jax.lora import LoraConfig, adapter_sites, init_adapters, with_adapters
from dpo_jax.tree import map_named, named_leaves

CONFIG = config_from_dict(BASE)
SITE = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@cache
def base():
    """Weight table and shapes of the base."""
    return weight_table(CONFIG), abstract_variables(CONFIG)


def deltas(adapters):
    """Path of each adapted layer -> s A B."""
    return {
        path: site["lora_scale"][..., None, None] * np.matmul(site["lora_a"], site["lora_b"])
        for path, site in adapter_sites(adapters).items()
    }


def same(got, want):
    got, want = deltas(got), deltas(want)
    assert got.keys() == want.keys()
    for path, delta in got.items():
        np.testing.assert_allclose(delta, want[path], rtol=1e-5, atol=1e-6, err_msg=path)


def predicted(adapters):
    given = inputs(BASE)
    predict = jax.jit(unet_function(CONFIG, adapters), compiler_options=QUICK)
    variables = with_adapters(variables_of(CONFIG), adapters)
    return predict(variables, given["latents"], given["timesteps"], condition_of(given))


@pytest.mark.parametrize("name", ["lora", pytest.param("dora", marks=pytest.mark.slow)])
def test_adapters_of_diffusers_give_its_numbers(name):
    near(predicted(load_adapter(FOLDER / name, *base())), np.load(FOLDER / name / "expected.npz")["output"])


def test_scales_and_ranks_are_those_of_the_metadata():
    sites = adapter_sites(load_adapter(FOLDER / "lora" / FILE, *base()))
    start = "mid_block/attentions/0/"
    scales = {
        "proj_in": 5 / 2,
        "transformer_blocks/0/attn1/to_q": 3 / 2,
        "transformer_blocks/0/attn2/to_q": 3 / 3,
        "transformer_blocks/0/attn2/to_out/0": 0.5 / 2,
    }
    for path, scale in scales.items():
        np.testing.assert_allclose(sites[start + path]["lora_scale"], scale, rtol=1e-6)
    assert sites[start + "transformer_blocks/0/attn2/to_q"]["lora_a"].shape == (12, 3)
    rooted = adapter_sites(load_adapter(FOLDER / "dora", *base()))[start + "proj_in"]
    np.testing.assert_allclose(rooted["lora_scale"], 2 / np.sqrt(2), rtol=1e-6)


def without_metadata():
    """The tensors of `lora` with scales that need no metadata: alphas are beside them."""
    tensors, sites = load_file(FOLDER / "lora" / FILE), adapter_sites(load_adapter(FOLDER / "lora", *base()))
    for name in [name for name in tensors if name.endswith("lora_A.weight")]:
        module = name.removesuffix(".lora_A.weight")
        scale = sites[module.removeprefix("unet.").replace(".", "/")]["lora_scale"]
        tensors[f"{module}.alpha"] = np.asarray(scale * tensors[name].shape[0], np.float32)
    return tensors


def kohya(name):
    module, _, end = name.partition(".lora_") if ".lora_" in name else name.partition(".alpha")
    end = f".lora_{end}".replace("lora_A", "lora_down").replace("lora_B", "lora_up") if ".lora_" in name else ".alpha"
    return f"lora_{module.replace('.', '_')}{end}"


def processors(name):
    for place in ("to_q", "to_out.0"):
        name = name.replace(f".{place}.lora_A.", f".processor.{place.removesuffix('.0')}_lora.down.")
        name = name.replace(f".{place}.lora_B.", f".processor.{place.removesuffix('.0')}_lora.up.")
    return name


SPELLINGS = {
    "alphas": str,
    "no prefix": lambda name: name.removeprefix("unet."),
    "kohya": kohya,
    "lora_down": lambda name: name.replace("lora_A", "lora_down").replace("lora_B", "lora_up"),
    "lora.down": lambda name: name.replace("lora_A", "lora.down").replace("lora_B", "lora.up"),
    "linear_layer": lambda name: name.replace("A.w", "linear_layer.down.w").replace("B.w", "linear_layer.up.w"),
    "processors": processors,
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_reads_the_same(spelling, tmp_path):
    save_file({SPELLINGS[spelling](name): tensor for name, tensor in without_metadata().items()}, tmp_path / FILE)
    same(load_adapter(tmp_path, *base()), load_adapter(FOLDER / "lora", *base()))


@pytest.mark.parametrize("name", ADAPTERS)
def test_folders_of_peft_read_the_same(name, tmp_path):
    options = {**ADAPTERS[name], "peft_type": "LORA", "bias": "none", "init_lora_weights": True, "megatron_core": "m"}
    tensors = load_file(FOLDER / name / FILE)
    renamed = {f"base_model.model.{key.removeprefix('unet.')}": tensor for key, tensor in tensors.items()}
    save_file(renamed, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(options))
    got, want = load_adapter(tmp_path, *base()), load_adapter(FOLDER / name, *base())
    jax.tree.map(np.testing.assert_array_equal, got, want)


TARGETS = "mid_block.*(to_k|net/2|proj_out|time_emb_proj)/kernel"


def random_adapters(**options):
    """Adapters none of whose leaves is trivial."""
    config = LoraConfig(rank=3, alpha=5.0, targets=TARGETS, rank_pattern=((".*to_k/kernel", 2),), **options)
    shapes = jax.eval_shape(lambda v: init_adapters(jax.random.key(1), v, config), base()[1])
    rng = np.random.default_rng(1)

    def value(path, leaf):
        if path.endswith("scale"):
            return jnp.asarray(config.scale_of(path.replace("lora_scale", "kernel")), jnp.float32)
        return jnp.asarray(path.endswith("magnitude") + 0.4 * rng.standard_normal(leaf.shape), jnp.float32)

    return map_named(value, shapes)


@pytest.mark.parametrize("dora", [False, True])
def test_written_adapters_come_back(dora, tmp_path):
    adapters = random_adapters(dora=dora)
    save_adapter(tmp_path, *base(), adapters)
    back = load_adapter(tmp_path, *base())
    same(back, adapters)
    norms = {path: leaf for path, leaf in named_leaves(adapters).items() if path.endswith("magnitude")}
    for path, leaf in norms.items():
        np.testing.assert_array_equal(named_leaves(back)[path], leaf)
    tensors = load_file(tmp_path / FILE)
    assert tensors["unet.mid_block.attentions.0.proj_out.lora_A.weight"].shape == (3, 12, 1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("dora", [False, True])
def test_diffusers_reads_what_we_write(dora, tmp_path):
    pytest.importorskip("torch", reason="compares with torch itself")
    pytest.importorskip("peft", reason="compares with peft itself")
    diffusers = pytest.importorskip("diffusers", reason="compares with diffusers itself")
    adapters = random_adapters(dora=dora)
    save_adapter(tmp_path, *base(), adapters)
    want, model = predicted(adapters), torch_model(BASE)
    plain = output_of(model)
    model.load_lora_adapter(tmp_path / FILE, prefix="unet")
    near(output_of(model), want)
    assert np.abs(plain - want).max() > 0.1
    scheduler = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
    pipeline = diffusers.StableDiffusionPipeline(
        *(None, None, None, torch_model(BASE), scheduler, None, None), requires_safety_checker=False
    )
    pipeline.load_lora_weights(tmp_path)
    near(output_of(pipeline.unet), want)


def test_stacked_layers_are_one_module_each(tmp_path):
    table = {"blocks/to_q/kernel": Place("blocks.{layer}.to_q.weight", LINEAR, layers=range(3))}
    shapes = {"blocks": {"to_q": {"kernel": jax.ShapeDtypeStruct((3, 4, 5), jnp.float32)}}}
    variables = {"blocks": {"to_q": {"kernel": jnp.ones((3, 4, 5))}}}
    adapters = init_adapters(jax.random.key(0), variables, LoraConfig(2, 3.0, targets=".*kernel"))
    adapters = jax.tree.map(lambda leaf: leaf + 0.5, adapters)
    save_adapter(tmp_path, table, shapes, adapters, prefix="transformer")
    same(load_adapter(tmp_path, table, shapes, prefix="transformer"), adapters)
    tensors = load_file(tmp_path / FILE)
    assert tensors["transformer.blocks.1.to_q.lora_B.weight"].shape == (5, 2)
    kept = {name: tensor for name, tensor in tensors.items() if ".1." not in name}
    save_file(kept, tmp_path / FILE)
    part = deltas(load_adapter(tmp_path, table, shapes, prefix="transformer"))["blocks/to_q"]
    np.testing.assert_array_equal(part[1], 0)
    np.testing.assert_allclose(part[::2], deltas(adapters)["blocks/to_q"][::2], rtol=1e-5)


def changed(change):
    tensors = load_file(FOLDER / "lora" / FILE)
    change(tensors)
    return tensors


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(f"unet.{SITE}.lora_B.weight"), f"{SITE} has lora_a .2, 8.; expected"),
        (lambda t: t.update({f"unet.{SITE}.lora_A.weight": np.ones((2, 9), np.float32)}), "lora_a .2, 9."),
        (lambda t: t.update({"unet.conv_in.lora_A.weight": np.ones((2, 4, 3, 3), np.float32)}), "conv_in.lora_A"),
        (lambda t: t.update({"text_encoder.x.lora_A.weight": np.ones((2, 9), np.float32)}), "text_encoder.x"),
        (lambda t: t.update({f"unet.{SITE}.lokr_w1": np.ones((2, 9), np.float32)}), "lokr_w1"),
        (lambda t: t.clear(), "linear layers: none"),
        (lambda t: t.update({f"unet.{SITE}.alpha": np.ones((), np.int32)}), "unknown type"),
    ],
)
def test_wrong_tensors_are_named(change, message, tmp_path):
    save_file(changed(change), tmp_path / FILE)
    with pytest.raises(WeightsError, match=message):
        load_adapter(tmp_path, *base())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lora_alpha": 2, "bias": "all"}, "not supported: bias 'all'"),
        ({"lora_alpha": 2, "init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"lora_alpha": 0}, "lora_alpha is 0"),
        ({"lora_alpha": 2, "alpha_pattern": {"to_q": "x"}}, "alpha_pattern of 'to_q' is 'x'"),
        ({"peft_type": "LOKR"}, "peft_type"),
    ],
)
def test_wrong_options_are_named(options, message, tmp_path):
    packed = json.dumps({f"unet.{key}": value for key, value in options.items()})
    save_file(load_file(FOLDER / "lora" / FILE), tmp_path / FILE, metadata={"lora_adapter_metadata": packed})
    with pytest.raises(WeightsError, match=message):
        load_adapter(tmp_path, *base())


def test_wrong_places_are_named(tmp_path):
    with pytest.raises(WeightsError, match=f"no {FILE}"):
        load_adapter(tmp_path, *base())
    (tmp_path / FILE).write_text("no tensors")
    with pytest.raises(WeightsError, match="not a safetensors file"):
        load_adapter(tmp_path, *base())
    with pytest.raises(WeightsError, match="elsewhere: no linear layer"):
        site = {"lora_a": jnp.ones((3, 2)), "lora_b": jnp.ones((2, 3)), "lora_scale": jnp.ones(())}
        save_adapter(tmp_path, *base(), {"elsewhere": site})
    with pytest.raises(ValueError, match="no linear layer there"):
        unet_function(CONFIG, {"conv_in": {"lora_a": jnp.ones((3, 2))}})

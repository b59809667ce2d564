"""CLIP against transformers: states, gradients, names; where a text ends; what is refused."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formula_weights import by_tensor, chirp, read, read_published, tensor
from make_clip_fixtures import END, FOLDER, PUBLISHED, VARIANTS, ids, images, published, torch_numbers

from dpo_jax.diffusion.models import clip
from dpo_jax.diffusion.models.clip_config import VIT_H_14, VIT_L_14, config_from_dict, config_to_dict
from dpo_jax.diffusion.models.clip_weights import is_buffer
from dpo_jax.diffusion.models.layers import Types
from dpo_jax.diffusion.models.table import tensor_shapes
from dpo_jax.diffusion.models.weights import TRANSFORMERS, load_model, save_model
from dpo_jax.keys import WeightsError

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
EXPECTED = np.load(FOLDER / "expected.npz")
KNOWN = read_published(FOLDER / "published.txt.gz")


def shapes(config):
    return tensor_shapes(clip.weight_table(config), clip.abstract_variables(config))


def model(variant):
    config = config_from_dict(VARIANTS[variant])
    tensors = {name: tensor(name, shape) for name, shape in shapes(config).items()}
    return config, read(clip.abstract_variables(config), clip.weight_table(config), tensors)


def states(config, variables, apply):
    found = {}
    for tower, given in (("text", ids()), ("vision", images())):
        if getattr(config, tower) is not None:
            said = apply(variables, given, method=tower)._asdict()
            found |= {f"{tower}/{name}": value for name, value in said.items() if value is not None}
    return found | ({"logit_scale": variables["logit_scale"]} if "logit_scale" in variables else {})


def ours(variant, expected, **changes):
    config, variables = model(variant)
    apply = clip.clip_function(replace(config, **changes))

    def objective(variables):
        found = states(config, variables, apply)
        kept = {name: value for name, value in found.items() if name in expected}
        return sum(jnp.sum(value * chirp(name, value.shape)) for name, value in kept.items()), found

    slopes, found = jax.jit(jax.grad(objective, has_aux=True))(variables)
    return found | {"gradients": by_tensor(slopes, clip.weight_table(config))}


def agree(found, expected):
    assert expected.keys() <= found.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, **CLOSE, err_msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_fixtures(variant):
    expected = {name.removeprefix(f"{variant}/"): EXPECTED[name] for name in EXPECTED if name.startswith(f"{variant}/")}
    agree(ours(variant, expected), expected)
    if variant == "both":
        agree(ours(variant, expected, remat=True), expected)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_installed_library(variant):
    pytest.importorskip("torch", reason="compares with torch")
    expected = torch_numbers(VARIANTS[variant])
    agree(ours(variant, expected), expected)


@pytest.mark.parametrize("name", PUBLISHED)
def test_tensors_are_the_published_ones(name):
    config = config_from_dict(PUBLISHED[name], name)
    assert shapes(config) == KNOWN[name]
    assert config_from_dict(config_to_dict(config)) == config


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_names_are_the_installed_librarys(name):
    pytest.importorskip("torch", reason="compares with torch")
    assert published(PUBLISHED[name]) == KNOWN[name]


@pytest.mark.parametrize(("ours", "name"), [(VIT_L_14, "clip_l14"), (VIT_H_14, "clip_h14")])
def test_sizes_without_a_config_file(ours, name):
    theirs = config_from_dict(PUBLISHED[name])
    assert theirs.text is not None and ours.text is not None
    # Published configs are older than the end token's own key.
    assert replace(theirs, text=replace(theirs.text, end_token=49407)) == ours


def test_old_files_say_a_tower_twice():
    keys = VARIANTS["both"]
    doubled = {**keys, "text_config": {"hidden_size": 64}, "text_config_dict": keys["text_config"]}
    assert config_from_dict(doubled) == config_from_dict(keys)


def test_what_stands_behind_the_end_has_no_influence():
    config, variables = model("text_projected")
    apply, rows = clip.clip_function(config), ids()
    expected = apply(variables, rows, method="text").projected
    rows[0, 4:], rows[1, 5:] = 3, END
    np.testing.assert_allclose(apply(variables, rows, method="text").projected, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(
        apply(variables, rows[:2, :5], method="text").projected, expected[:2], rtol=1e-5, atol=1e-6
    )


def test_layers_are_skipped_before_the_last_norm():
    config, variables = model("text")
    apply = clip.clip_function(config)
    said = apply(variables, ids(), method="text")
    np.testing.assert_allclose(apply(variables, ids(), 0, method="skipped"), said.last, rtol=1e-6, atol=1e-6)
    assert config.text is not None
    shorter = replace(config, text=replace(config.text, layers=2))
    fewer = {
        **variables["text_model"],
        "layers": jax.tree.map(lambda leaf: leaf[:2], variables["text_model"]["layers"]),
    }
    expected = clip.clip_function(shorter)({"text_model": fewer}, ids(), method="text")
    np.testing.assert_allclose(apply(variables, ids(), 1, method="skipped"), expected.last, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(said.layers[-2], expected.layers[-1], rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="4 layers to be skipped; there are 3"):
        apply(variables, ids(), 4, method="skipped")


def test_the_wrong_activation_changes_features():
    config, variables = model("both")
    assert config.text is not None and config.text.activation == "quick_gelu"
    other = replace(config, text=replace(config.text, activation="gelu"))
    found = clip.clip_function(other)(variables, ids(), method="text").projected
    assert np.abs(found - EXPECTED["both/text/projected"]).max() > 1e-3


def test_half_precision():
    config, variables = model("both")
    found = states(config, variables, clip.clip_function(config, Types(compute=jnp.bfloat16)))
    for name in ("text/projected", "vision/projected"):
        np.testing.assert_allclose(found[name], EXPECTED[f"both/{name}"], atol=0.1)


def test_wrong_inputs_are_refused():
    config, variables = model("both")
    apply = clip.clip_function(config)
    with pytest.raises(ValueError, match="texts of 10 tokens; this tower knows 9"):
        apply(variables, np.zeros((1, 10), np.int32), method="text")
    with pytest.raises(ValueError, match="images of 8 x 12 pixels; this tower sees 12 x 12"):
        apply(variables, np.zeros((1, 8, 12, 3)), method="vision")
    config, variables = model("text")
    with pytest.raises(ValueError, match="no image tower"):
        clip.clip_function(config)(variables, images(), method="vision")


@pytest.mark.parametrize(
    ("variant", "keys", "message"),
    [
        ("text", {"architectures": ["SiglipModel"]}, r"\['SiglipModel'\]; there is CLIPTextModel"),
        ("text", {"architectures": None}, "not given"),
        ("text", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("text", {"num_attention_heads": 3}, "hidden_size 8 is no multiple"),
        ("text", {"eos_token_id": [1, 2]}, r"eos_token_id is \[1, 2\]"),
        ("vision", {"patch_size": 13}, "patch_size is 13"),
        ("vision", {"attention_dropout": 0.1}, "attention_dropout 0.1"),
        ("both", {"text_config": 3}, "text_config is 3"),
    ],
)
def test_wrong_configs_are_refused(variant, keys, message):
    with pytest.raises(WeightsError, match=f"^here: .*{message}"):
        config_from_dict({**VARIANTS[variant], **keys}, "here")


def test_adapters_of_a_tower():
    from dpo_jax.lora import LoraConfig, init_adapters, with_adapters

    config, variables = model("text")
    adapters = init_adapters(jax.random.key(0), variables, LoraConfig(rank=2, targets=".*/(q|v)_proj/kernel"))
    adapters = jax.tree.map(lambda leaf: leaf + 0.1, adapters)
    apply = clip.clip_function(config, adapters=adapters)
    found = jax.jit(functools.partial(apply, method="text"))(with_adapters(variables, adapters), ids())
    base = clip.clip_function(config)(variables, ids(), method="text")
    assert np.abs(found.last - base.last).max() > 1e-3


# Files


def write_file(folder, variant):
    """A folder as older releases have it: half precision, and a buffer beside the weights."""
    from safetensors.numpy import save_file

    config = config_from_dict(VARIANTS[variant])
    tensors = {name: tensor(name, shape).astype(np.float16) for name, shape in shapes(config).items()}
    buffer = {"text_model.embeddings.position_ids": np.arange(9)[None]}
    save_file(tensors | buffer, folder / "model.safetensors")
    return config


@pytest.mark.parametrize("variant", ["text", "both"])
def test_files_are_read_and_written(variant, tmp_path):
    config = write_file(tmp_path, variant)
    table, abstract = clip.weight_table(config), clip.abstract_variables(config)
    found = load_model(tmp_path, abstract, table, rules=clip.RULES, passed_over=is_buffer)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), found, model(variant)[1])
    save_model(tmp_path / "out", found, table, config_to_dict(config), stem=TRANSFORMERS)
    again = load_model(tmp_path / "out", abstract, table)
    jax.tree.map(np.testing.assert_array_equal, again, found)
    with pytest.raises(WeightsError, match=r"1 surplus: text_model.embeddings.position_ids"):
        load_model(tmp_path, abstract, table)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_installed_library_reads_what_is_written(variant, tmp_path):
    torch = pytest.importorskip("torch", reason="compares with torch")
    import transformers

    config, variables = model(variant)
    save_model(tmp_path, variables, clip.weight_table(config), config_to_dict(config), stem=TRANSFORMERS)
    theirs = getattr(transformers, VARIANTS[variant]["architectures"][0]).from_pretrained(tmp_path)
    apply = clip.clip_function(config)
    with torch.no_grad():
        if config.text is not None:
            call = theirs.get_text_features if config.vision is not None else theirs
            last = call(torch.tensor(ids(), dtype=torch.long)).last_hidden_state
            np.testing.assert_allclose(apply(variables, ids(), method="text").last, last, **CLOSE)
        if config.vision is not None:
            call = theirs.get_image_features if config.text is not None else theirs
            last = call(torch.tensor(images()).permute(0, 3, 1, 2)).last_hidden_state
            np.testing.assert_allclose(apply(variables, images(), method="vision").layers[-1], last, **CLOSE)

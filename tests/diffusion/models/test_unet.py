"""The UNet against numbers of torch diffusers, its config in and out, names and shapes of the published models."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_unet_fixtures import (
    FOLDER,
    PUBLISHED,
    VARIANTS,
    gradient_sums,
    inputs,
    read_published,
    tensor_values,
    torch_numbers,
)

from dpo_jax.diffusion.models.table import tensor_shape
from dpo_jax.diffusion.models.unet import (
    UNetConfig,
    abstract_variables,
    config_from_dict,
    config_to_dict,
    unet_function,
    weight_table,
)
from dpo_jax.diffusion.types import TextCondition
from dpo_jax.keys import WeightsError
from dpo_jax.tree import map_named, named_leaves

# Tests compile much and compute little.
QUICK = {"xla_backend_optimization_level": 0}
SMALL = config_from_dict(VARIANTS["sd1"])


def variables_of(config):
    """The weights that the fixtures were made with."""
    table = weight_table(config)

    def value(path, leaf):
        place = table[path]
        tensor = tensor_values(place.name, tensor_shape(place, leaf))
        tensor = tensor if place.axes is None else tensor.reshape(tensor.shape[: len(place.axes)]).transpose(place.axes)
        return jnp.asarray(tensor)

    return map_named(value, abstract_variables(config))


def tensors_of(config, variables):
    """Name in the checkpoint -> tensor."""
    table, tensors = weight_table(config), {}
    for path, leaf in named_leaves(variables).items():
        place, array = table[path], np.asarray(leaf)
        array = array if place.axes is None else array.transpose(np.argsort(place.axes))
        tensors[place.name] = array.reshape(tensor_shape(place, leaf))
    return tensors


def condition_of(given):
    return TextCondition(given["states"], given.get("pooled"), given.get("sizes"), given.get("mask"))


def numbers_of(config, given):
    """Output and gradients of the inputs; gradients of the tensors by name."""
    predict = unet_function(config)

    def weighted(variables, latents, states):
        condition = condition_of(given)._replace(states=states)
        output = predict(variables, latents, given["timesteps"], condition)
        return jnp.sum(output * given["weights"]), output

    function = jax.jit(jax.value_and_grad(weighted, (0, 1, 2), has_aux=True), compiler_options=QUICK)
    (_, output), (of_variables, of_latents, of_states) = function(
        variables_of(config), given["latents"], given["states"]
    )
    values = {"output": output, "latents_gradient": of_latents, "states_gradient": of_states}
    return values, tensors_of(config, of_variables)


def near(got, want, name=""):
    """Within 1e-4, or 1e-4 of the largest entry where there are larger ones."""
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * max(1.0, np.abs(want).max()), err_msg=name)


@pytest.mark.parametrize("name", ["sd2", "sdxl", "pixels"])
def test_outputs_are_those_of_diffusers(name):
    expected, config = dict(np.load(FOLDER / f"{name}.npz")), config_from_dict(VARIANTS[name])
    predict = jax.jit(unet_function(config), compiler_options=QUICK)
    near(
        predict(variables_of(config), expected["latents"], expected["timesteps"], condition_of(expected)),
        expected["output"],
    )


@pytest.mark.parametrize("name", ["sd1", *(pytest.param(n, marks=pytest.mark.slow) for n in ("sd2", "sdxl", "pixels"))])
def test_gradients_are_those_of_diffusers(name):
    expected = dict(np.load(FOLDER / f"{name}.npz"))
    values, gradients = numbers_of(config_from_dict(VARIANTS[name]), expected)
    for key, value in values.items():
        near(value, expected[key], key)
    assert sorted(gradients) == expected["tensors"].tolist()
    for tensor, sums in zip(expected["tensors"], expected["sums"]):
        near(gradient_sums(tensor, gradients[tensor]), sums, tensor)


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_diffusers_says_the_same_at_other_sizes(name):
    pytest.importorskip("torch", reason="compares with torch itself")
    pytest.importorskip("diffusers", reason="compares with diffusers itself")
    given = inputs(VARIANTS[name], batch=4, height=7, width=9)
    want, want_gradients = torch_numbers(VARIANTS[name], given)
    values, gradients = numbers_of(config_from_dict(VARIANTS[name]), given)
    for key, value in values.items():
        near(value, want[key], key)
    assert gradients.keys() == want_gradients.keys()
    for tensor, gradient in gradients.items():
        near(gradient, want_gradients[tensor], tensor)


@pytest.mark.parametrize(
    "name", [n if n.endswith("v1-5") else pytest.param(n, marks=pytest.mark.slow) for n in PUBLISHED]
)
def test_published_models_have_these_tensors(name):
    keys, shapes = read_published(name)
    config = config_from_dict(keys)
    table, leaves = weight_table(config), named_leaves(abstract_variables(config))
    assert {table[path].name: tensor_shape(table[path], leaf) for path, leaf in leaves.items()} == shapes
    written = json.loads(json.dumps(config_to_dict(config)))
    assert config_from_dict(written) == config
    for key, value in keys.items():
        if key not in ("dual_cross_attention", "addition_embed_type_num_heads"):
            assert written[key] == ([value] * 4 if key == "attention_head_dim" and value == 8 else value), key


@pytest.mark.slow
@pytest.mark.parametrize("name", [*VARIANTS, *PUBLISHED])
def test_diffusers_reads_our_config_as_its_own(name):
    diffusers = pytest.importorskip("diffusers", reason="compares with diffusers itself")
    torch = pytest.importorskip("torch", reason="compares with torch itself")
    keys = (VARIANTS | PUBLISHED)[name]
    with torch.device("meta"):
        ours, theirs = (
            diffusers.UNet2DConditionModel.from_config(c) for c in (config_to_dict(config_from_dict(keys)), keys)
        )
    shapes = [{n: tuple(p.shape) for n, p in model.named_parameters()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]
    if name in PUBLISHED:
        assert read_published(name)[1] == shapes[1]
    full = json.loads(theirs.to_json_string())
    assert config_from_dict(full) == config_from_dict(keys)


@pytest.mark.parametrize(
    "key, value",
    [
        ("addition_embed_type", "image"),
        ("attention_head_dim", [2]),
        ("block_out_channels", [8, 10]),
        ("block_out_channels", [8]),
        ("block_out_channels", 8.5),
        ("class_embed_type", "projection"),
        ("cross_attention_dim", [6, 7]),
        ("down_block_types", ["AttnDownBlock2D", "DownBlock2D"]),
        ("dual_cross_attention", True),
        ("encoder_hid_dim", 4),
        ("mid_block_type", "UNetMidBlock2D"),
        ("norm_num_groups", 3),
        ("resnet_time_scale_shift", "scale_shift"),
        ("sample_size", [8, 9]),
        ("time_cond_proj_dim", 256),
        ("transformer_layers_per_block", [[1], [1, 2]]),
        ("up_block_types", ["UpBlock2D"]),
        ("use_linear_projection", "yes"),
    ],
)
def test_other_unets_are_refused_by_key_and_value(key, value):
    with pytest.raises(WeightsError) as caught:
        config_from_dict({**VARIANTS["sd1"], key: value}, "unet/config.json")
    assert str(caught.value).startswith("unet/config.json: ")
    assert key in str(caught.value) or key == "norm_num_groups"


def test_a_condition_that_lacks_what_the_model_reads_is_refused():
    config = config_from_dict(VARIANTS["sdxl"])
    given = inputs(VARIANTS["sdxl"])
    condition = condition_of(given)
    predict = unet_function(config)
    for lacking, message in (
        (condition._replace(pooled=None), "no pooled"),
        (condition._replace(pooled=None, sizes=None), "no pooled and no sizes"),
        (condition._replace(sizes=given["sizes"][:, :5]), "this model reads 29"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(predict, abstract_variables(config), given["latents"], given["timesteps"], lacking)


def test_blocks_are_computed_again_if_asked():
    few = replace(SMALL, down_attention=(False, False), up_attention=(False, False))
    given, variables = inputs(VARIANTS["sd1"]), abstract_variables(few)

    def convolutions(config):
        def loss(variables):
            output = unet_function(config)(variables, given["latents"], given["timesteps"], condition_of(given))
            return jnp.sum(output**2)

        return str(jax.make_jaxpr(jax.grad(loss))(variables)).count("conv_general")

    assert convolutions(replace(few, remat="full")) > convolutions(few)


def test_bfloat16_is_close_and_predicts_in_float32():
    config = replace(SMALL, dtype="bfloat16", param_dtype="bfloat16")
    expected = dict(np.load(FOLDER / "sd1.npz"))
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables_of(SMALL))
    predict = jax.jit(unet_function(config), compiler_options=QUICK)
    got = predict(half, expected["latents"], expected["timesteps"], condition_of(expected))
    assert got.dtype == jnp.float32
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(abstract_variables(config)))
    assert np.linalg.norm(got - expected["output"]) < 0.03 * np.linalg.norm(expected["output"])


def test_sizes_that_do_not_fit_are_refused():
    for wrong, message in (
        ({"heads": (8,)}, "4 resolutions"),
        ({"heads": (8, 8, 8, 7)}, "7 heads"),
        ({"pooled_dim": 2816}, "belong together"),
    ):
        with pytest.raises(ValueError, match=message):
            UNetConfig(**wrong)

"""The multimodal transformer against diffusers: predictions, gradients, names, files; adapters, layouts, types."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formula_weights import chirp, read_published, tensor
from make_mmdit_fixtures import FOLDER, PUBLISHED, VARIANTS, digest, inputs, published, torch_model, torch_numbers

from dpo_jax import lora
from dpo_jax.diffusion.models import mmdit
from dpo_jax.diffusion.models.table import tensor_shapes
from dpo_jax.diffusion.models.weights import load_model, model_tensors, save_model
from dpo_jax.diffusion.types import TextCondition
from dpo_jax.keys import WeightsError, read_object
from dpo_jax.sharding import P, make_mesh, shard_batch
from dpo_jax.tree import combine, named_leaves, partition

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
EXPECTED = np.load(FOLDER / "expected.npz")
_POSITIONS = "pos_embed.pos_embed"


def shapes(config):
    return tensor_shapes(mmdit.weight_table(config), mmdit.abstract_variables(config))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Name of a variant -> (config, variables), read from folders."""
    made = {}
    for name, keys in VARIANTS.items():
        config, folder = mmdit.config_from_dict(keys), tmp_path_factory.mktemp(name)
        abstract, table = mmdit.abstract_variables(config), mmdit.weight_table(config)
        tensors = {n: tensor(n, shape) for n, shape in shapes(config).items()}
        tensors[_POSITIONS] = np.asarray(mmdit.position_table(config))
        by_path = {}
        for path, leaf in named_leaves(abstract).items():
            place = table[path]
            parts = [tensors[place.name.format(layer=i)] for i in place.layers or [0]]
            parts = [np.transpose(part, place.axes or range(part.ndim)) for part in parts]
            by_path[path] = jnp.asarray(np.stack(parts) if place.layers else parts[0])
            assert by_path[path].shape == leaf.shape
        paths = iter(by_path.values())
        variables = jax.tree.map(lambda _, paths=paths: next(paths), abstract)
        save_model(folder, variables, table, mmdit.config_to_dict(config), max_shard_bytes=9000)
        assert len(list(folder.glob("diffusion_pytorch_model-*.safetensors"))) > 1
        read = mmdit.config_from_dict(read_object(folder / "config.json"))
        assert read == config
        made[name] = (config, load_model(folder, abstract, table), folder)
        jax.tree.map(np.testing.assert_array_equal, made[name][1], variables)
    return made


def condition(given=None, **more):
    given = given or inputs()
    return TextCondition(given["states"], given["pooled"], **more)


def numbers(config, variables, given=None):
    given = given or inputs()
    apply = mmdit.mmdit_function(config)

    def objective(variables, states):
        told = TextCondition(states, given["pooled"])
        found = apply(variables, given["latents"], given["timesteps"], told)
        repeated = np.concatenate([chirp("prediction", inputs()["latents"].shape)] * (len(found) // 2))
        return jnp.sum(found * repeated), found

    slopes = jax.jit(jax.grad(objective, argnums=(0, 1), has_aux=True))
    (weights, states), found = slopes(variables, given["states"])
    gradients = dict(model_tensors(weights, mmdit.weight_table(config)))
    assert not np.any(gradients.pop(_POSITIONS))
    return {"prediction": np.asarray(found), "states": np.asarray(states), "gradients": gradients}


@pytest.fixture(scope="module")
def found(models):
    """Name of a variant -> `numbers`."""
    return {name: numbers(*models[name][:2]) for name in VARIANTS}


@pytest.mark.parametrize("name", VARIANTS)
def test_fixtures(name, found):
    for key, value in {**found[name], "gradients": digest(found[name]["gradients"])}.items():
        np.testing.assert_allclose(value, EXPECTED[f"{name}/{key}"], **CLOSE, err_msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_installed_library(name, models, found):
    torch = pytest.importorskip("torch", reason="compares with torch")
    pytest.importorskip("diffusers", reason="compares with diffusers")
    config, _, folder = models[name]
    model = torch_model(VARIANTS[name])
    expected, found = torch_numbers(model, inputs()), found[name]
    buffer = model.pos_embed.pos_embed.numpy()
    np.testing.assert_allclose(mmdit.position_table(config), buffer, atol=1e-6)
    assert found["gradients"].keys() == expected["gradients"].keys()
    for key, value in expected["gradients"].items():
        np.testing.assert_allclose(found["gradients"][key], value, **CLOSE, err_msg=key)
    for key in ("prediction", "states"):
        np.testing.assert_allclose(found[key], expected[key], **CLOSE)
        np.testing.assert_allclose(expected[key], EXPECTED[f"{name}/{key}"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(digest(expected["gradients"]), EXPECTED[f"{name}/gradients"], rtol=1e-4, atol=1e-5)
    again = type(model).from_pretrained(folder).state_dict()
    assert all(torch.equal(again[key], value) for key, value in model.state_dict().items() if key != _POSITIONS)
    np.testing.assert_allclose(again[_POSITIONS], buffer, atol=1e-6)


@pytest.mark.parametrize("name", PUBLISHED)
def test_tensors_are_the_published_ones(name):
    config = mmdit.config_from_dict(PUBLISHED[name], name)
    assert shapes(config) == read_published(FOLDER / "published.txt.gz")[name]
    assert mmdit.config_from_dict(mmdit.config_to_dict(config)) == config


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_names_are_the_installed_librarys(name):
    pytest.importorskip("torch", reason="compares with torch")
    pytest.importorskip("diffusers", reason="compares with diffusers")
    assert published(PUBLISHED[name]) == read_published(FOLDER / "published.txt.gz")[name]


def test_the_program_does_not_grow_with_depth():
    given, sizes = inputs(), []
    for layers in (4, 40):
        config = mmdit.config_from_dict({**VARIANTS["sd35"], "num_layers": layers})
        traced = jax.jit(mmdit.mmdit_function(config)).lower(
            mmdit.abstract_variables(config), given["latents"], given["timesteps"], condition()
        )
        sizes.append(len(traced.as_text()))
    assert sizes[1] < 1.01 * sizes[0]


def test_states_that_may_not_be_seen_change_nothing(models):
    config, variables, _ = models["sd35"]
    given, apply = inputs(), jax.jit(mmdit.mmdit_function(config))
    mask = np.arange(5) < 3 * np.ones((2, 1))

    def predict(states, mask):
        return apply(variables, given["latents"], given["timesteps"], TextCondition(states, given["pooled"], mask=mask))

    wanted = predict(given["states"][:, :3], None)
    np.testing.assert_allclose(predict(given["states"], mask), wanted, rtol=1e-5, atol=1e-5)
    assert np.abs(predict(given["states"], None) - wanted).max() > 1e-3


@pytest.mark.slow
def test_remat_and_types(models, found):
    config, variables, _ = models["sd3"]
    kept, again = found["sd3"], numbers(replace(config, remat="full"), variables)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), again, kept)
    given, rough = inputs(), replace(config, dtype="bfloat16", param_dtype="bfloat16")
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), variables)
    assert mmdit.abstract_variables(rough) == jax.eval_shape(lambda: narrow)
    found = jax.jit(mmdit.mmdit_function(rough))(narrow, given["latents"], given["timesteps"], condition())
    assert found.dtype == jnp.float32 and 1e-4 < np.abs(found - kept["prediction"]).max() < 0.1


@pytest.mark.slow
def test_adapters_are_learned_and_merged(models):
    config, variables, _ = models["sd3"]
    given = inputs()
    chosen = lora.LoraConfig(rank=2, alpha=4.0, dora=True, targets=r"(?!pos_embed).*kernel")
    adapters = jax.jit(lambda base: lora.init_adapters(jax.random.key(0), base, chosen))(variables)
    sites = lora.adapter_sites(adapters)
    assert len(sites) == sum(name.endswith("kernel") for name in named_leaves(variables)) - 1
    apply, joined = mmdit.mmdit_function(config, adapters=adapters), lora.with_adapters(variables, adapters)
    answer = jax.jit(lambda v: apply(v, given["latents"], given["timesteps"], condition()))
    np.testing.assert_allclose(answer(joined), EXPECTED["sd3/prediction"], **CLOSE)
    learned, frozen = partition(joined, lora.is_trainable)

    @jax.jit
    def step(learned):
        slopes = jax.grad(lambda p: jnp.sum(jnp.square(answer(combine(p, frozen)))))(learned)
        return slopes, jax.tree.map(lambda leaf, slope: leaf - 0.02 * jnp.sign(slope), learned, slopes)

    slopes, moved = step(learned)
    after = combine(moved, frozen)
    assert np.abs(answer(after) - answer(joined)).max() > 1e-2
    # The text of the last block asks nothing.
    still = {name for name, slope in named_leaves(slopes).items() if name.endswith("lora_b") and not np.any(slope)}
    assert still == {"last/attn/add_q_proj/lora_b"}
    base = mmdit.mmdit_function(config)
    plain = jax.jit(lambda v: base(lora.merge(v), given["latents"], given["timesteps"], condition()))(after)
    np.testing.assert_allclose(answer(after), plain, **CLOSE)
    with pytest.raises(ValueError, match="pos_embed/proj"):
        mmdit.mmdit_function(config, adapters={"pos_embed": {"proj": {"lora_a": jnp.ones((2, 2))}}})


@pytest.mark.slow
def test_one_and_eight_devices_have_equal_numbers(models, found):
    config, _, folder = models["sd35"]
    mesh, given = make_mesh(fsdp=4, model=2), {name: np.concatenate([value] * 2) for name, value in inputs().items()}
    table = mmdit.weight_table(config)
    spread = load_model(folder, mmdit.abstract_variables(config), table, mesh=mesh, rules=mmdit.RULES)
    leaves = named_leaves(spread)
    assert leaves["blocks/attn/to_q/kernel"].sharding.spec == P(None, "fsdp", "model")
    assert leaves["last/ff/down/kernel"].sharding.spec == P("model", "fsdp")
    assert leaves["dual_blocks/norm1/linear/kernel"].sharding.spec == P(None, ("fsdp", "model"), None)
    with jax.set_mesh(mesh):
        answer = numbers(config, spread, shard_batch(given, mesh))
    for key in ("prediction", "states"):
        np.testing.assert_allclose(answer[key], np.concatenate([found["sd35"][key]] * 2), rtol=1e-5, atol=1e-5)
    for key, value in found["sd35"]["gradients"].items():
        np.testing.assert_allclose(answer["gradients"][key], 2 * value, **CLOSE, err_msg=key)


def test_every_adapter_has_a_layout():
    abstract = mmdit.abstract_variables(mmdit.config_from_dict(VARIANTS["sd3"]))
    for name in named_leaves(abstract):
        if name.endswith("kernel") and "pos_embed" not in name:
            site = name.removesuffix("kernel")
            rows = next(spec for pattern, spec in mmdit.RULES if re.search(pattern, f"{site}lora_a"))
            assert len(rows) == (3 if name.startswith("blocks") else 2)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"_class_name": "UNet2DConditionModel"}, "_class_name 'UNet2DConditionModel'"),
        ({"qk_norm": "layer_norm"}, "qk_norm is 'layer_norm'"),
        ({"dual_attention_layers": [1]}, r"dual_attention_layers is \[1\]"),
        ({"dual_attention_layers": [0, 1, 2]}, r"dual_attention_layers is \[0, 1, 2\]"),
        ({"caption_projection_dim": 12}, "caption_projection_dim is 12"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"force_zeros": True}, "force_zeros"),
    ],
)
def test_wrong_configs_are_named(changes, named):
    with pytest.raises(WeightsError, match=f"there/config.json: .*{named}"):
        mmdit.config_from_dict({**VARIANTS["sd3"], **changes}, "there/config.json")


def test_wrong_inputs_are_named(models):
    config, variables, _ = models["sd3"]
    apply, given = mmdit.mmdit_function(config), inputs()
    with pytest.raises(ValueError, match="14 x 4"):
        apply(variables, np.ones((1, 14, 4, 3)), np.ones(1), condition())
    with pytest.raises(ValueError, match="no pooled"):
        apply(variables, given["latents"], given["timesteps"], TextCondition(given["states"]))

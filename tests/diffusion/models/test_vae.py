"""The autoencoder against diffusers: images, moments, tiles, gradients, names; what it adds to them."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formula_weights import by_tensor, chirp, read, read_published, tensor
from make_vae_fixtures import FOLDER, PUBLISHED, TILED, VARIANTS, blocks, inputs, published, torch_numbers

from dpo_jax.diffusion.models import vae
from dpo_jax.diffusion.models.layers import Types
from dpo_jax.diffusion.models.table import tensor_shapes
from dpo_jax.diffusion.models.weights import load_model, save_model
from dpo_jax.keys import WeightsError

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
EXPECTED = np.load(FOLDER / "expected.npz")


def shapes(config):
    return tensor_shapes(vae.weight_table(config), vae.abstract_variables(config))


def model(keys):
    config = vae.config_from_dict(keys)
    tensors = {name: tensor(name, shape) for name, shape in shapes(config).items()}
    return config, read(vae.abstract_variables(config), vae.weight_table(config), tensors)


def tiled(keys, given):
    config, variables = model(keys)
    encode, decode = (
        jax.jit(functools.partial(vae.autoencoder_function(config), method=f"tiled_{name}"))
        for name in ("encode", "decode")
    )
    moments = jnp.concatenate(encode(variables, given["large_images"]), axis=-1)
    return {"tiled_moments": moments, "tiled_decoded": decode(variables, given["large_latents"])}


def ours(keys, given, *, gradients=True):
    config, variables = model(keys)
    apply = vae.autoencoder_function(config)

    def objective(variables):
        posterior = apply(variables, given["images"], method="encode")
        moments = jnp.concatenate(posterior, axis=-1)
        decoded = apply(variables, given["latents"], method="decode")
        values = {"moments": moments, "decoded": decoded}
        weights = {n: chirp(n, tuple(np.transpose(v, (0, 3, 1, 2)).shape)) for n, v in values.items()}
        return sum(jnp.sum(values[n] * np.transpose(w, (0, 2, 3, 1))) for n, w in weights.items()), values

    if not gradients:
        return dict(jax.jit(objective)(variables)[1])
    slopes, found = jax.jit(jax.grad(objective, has_aux=True))(variables)
    found["gradients"] = by_tensor(slopes, vae.weight_table(config))
    return found


def agree(found, expected):
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], **CLOSE, err_msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_fixtures(variant):
    found = ours(VARIANTS[variant], inputs(variant), gradients=variant != TILED)
    agree(found, {name: EXPECTED[f"{variant}/{name}"] for name in found})


def test_tiles():
    found = tiled(VARIANTS[TILED], inputs(TILED))
    agree(found, {name: EXPECTED[f"{TILED}/{name}"] for name in found})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd", "sd3", "no_attention"])
def test_installed_library(name):
    pytest.importorskip("torch", reason="compares with torch")
    pytest.importorskip("diffusers", reason="compares with diffusers")
    bare = {**VARIANTS["sd"], "mid_block_add_attention": False, "layers_per_block": 2}
    given = inputs("sd3" if name == "sd3" else "sd")
    keys = VARIANTS.get(name, bare)
    agree({**ours(keys, given), **tiled(keys, given)}, torch_numbers(keys, given))


@pytest.mark.parametrize("name", PUBLISHED)
def test_tensors_are_the_published_ones(name):
    config = vae.config_from_dict(PUBLISHED[name], name)
    assert shapes(config) == read_published(FOLDER / "published.txt.gz")[name]
    assert vae.config_from_dict(vae.config_to_dict(config)) == config
    assert config.factor == 8 and config.force_upcast


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_names_are_the_installed_librarys(name):
    pytest.importorskip("torch", reason="compares with torch")
    pytest.importorskip("diffusers", reason="compares with diffusers")
    assert published(PUBLISHED[name]) == read_published(FOLDER / "published.txt.gz")[name]


def test_early_files_name_attention_otherwise():
    config = vae.config_from_dict(VARIANTS["sd"])
    names = {place.name for place in vae.weight_table(config, old_names=True).values()}
    wanted = {f"encoder.mid_block.attentions.0.{n}.weight" for n in ("group_norm", "query", "key", "value")}
    assert wanted | {"decoder.mid_block.attentions.0.proj_attn.bias"} < names
    assert not any("to_" in name for name in names) and len(names) == len(shapes(config))


def test_scaled_latents():
    z = chirp("latents", (2, 3, 3, 4))
    plain = vae.AutoencoderConfig(scaling_factor=1.5, shift_factor=0.25)
    np.testing.assert_allclose(vae.to_latents(plain, z), (z - 0.25) * 1.5, rtol=1e-6, atol=1e-7)
    mean, std = (0.1, 0.2, -0.3, 0.0), (1.0, 2.0, 3.0, 4.0)
    each = vae.AutoencoderConfig(scaling_factor=0.5, latents_mean=mean, latents_std=std)
    np.testing.assert_allclose(
        vae.to_latents(each, z), (z - np.array(mean)) * 0.5 / np.array(std), rtol=1e-5, atol=1e-6
    )
    for config in (plain, each):
        np.testing.assert_allclose(vae.from_latents(config, vae.to_latents(config, z)), z, rtol=1e-5, atol=1e-6)


def test_samples_of_the_posterior():
    mean = jnp.full((64, 64), 3.0)
    posterior = vae.Posterior(mean, jnp.full_like(mean, np.log(0.25)))
    sample = vae.sample_posterior(jax.random.key(0), posterior)
    np.testing.assert_allclose([sample.mean(), sample.std()], [3.0, 0.5], atol=0.03)
    sure = vae.sample_posterior(jax.random.key(0), vae.Posterior(mean, jnp.full_like(mean, -30.0)))
    np.testing.assert_allclose(sure, mean, atol=1e-5)


@pytest.mark.slow
def test_remat_and_types():
    keys, given = VARIANTS["sd"], inputs("sd")
    config, variables = model(keys)

    def slopes(config, types=Types()):  # noqa: B008
        apply = vae.autoencoder_function(config, types)
        return jax.jit(jax.grad(lambda v: jnp.sum(apply(v, given["images"]) ** 2)))(variables)

    base, narrow = slopes(config), Types(compute=jnp.bfloat16)
    for found in (slopes(replace(config, remat=True)), slopes(config, narrow)):
        jax.tree.map(functools.partial(np.testing.assert_allclose, **CLOSE), found, base)
    decode = functools.partial(
        vae.autoencoder_function(replace(config, force_upcast=False), narrow), variables, method="decode"
    )
    rough, exact = decode(given["latents"]), EXPECTED["sd/decoded"]
    assert rough.dtype == jnp.float32 and 1e-4 < np.abs(rough - exact).max() < 0.2


@pytest.mark.slow
def test_tiles_of_one_image_are_the_image():
    config, variables = model(VARIANTS["sd"])
    apply, latents = vae.autoencoder_function(config), inputs("sd")["latents"]
    np.testing.assert_array_equal(
        apply(variables, latents, method="tiled_decode"), apply(variables, latents, method="decode")
    )


def test_tiles_that_would_not_meet_are_refused():
    config, variables = model(VARIANTS["sd"])
    with pytest.raises(ValueError, match="side of 40 pixels; give a multiple of 16"):
        vae.autoencoder_function(config)(variables, inputs("sd")["latents"], 40, method="tiled_decode")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"_class_name": "AutoencoderKLWan"}, "_class_name 'AutoencoderKLWan'"),
        ({"act_fn": "gelu"}, "act_fn 'gelu'"),
        ({"up_block_types": ["AttnUpDecoderBlock2D"] * 3}, "up_block_types"),
        ({"down_block_types": ["DownEncoderBlock2D"]}, "down_block_types"),
        ({"block_out_channels": [3, 4, 4]}, "holds 3, no multiple of norm_num_groups 2"),
        ({"block_out_channels": "many"}, "block_out_channels is 'many'"),
        ({"latents_mean": [0.0] * 4}, "belong together"),
        ({"latents_mean": [0.0] * 3, "latents_std": [1.0] * 3}, "latents_mean is .*expected 4"),
        ({"scaling_factor": 0}, "scaling_factor is 0"),
    ],
)
def test_wrong_configs_are_refused(keys, message):
    with pytest.raises(WeightsError, match=f"(?s)^here: .*{message}"):
        vae.config_from_dict({**blocks(2, 4, 4, norm_num_groups=2), **keys}, "here")


@pytest.mark.parametrize("old_names", [False, True])
def test_files_are_read_and_written(old_names, tmp_path):
    config, variables = model(VARIANTS["sd"])
    table = vae.weight_table(config, old_names=old_names)
    save_model(tmp_path, variables, table, vae.config_to_dict(config))
    found = load_model(tmp_path, vae.abstract_variables(config), table, rules=vae.RULES)
    jax.tree.map(np.testing.assert_array_equal, found, variables)


@pytest.mark.slow
@pytest.mark.parametrize("old_names", [False, True])
def test_installed_library_reads_what_is_written(old_names, tmp_path):
    torch = pytest.importorskip("torch", reason="compares with torch")
    diffusers = pytest.importorskip("diffusers", reason="compares with diffusers")
    config, variables = model(VARIANTS["sd"])
    save_model(tmp_path, variables, vae.weight_table(config, old_names=old_names), vae.config_to_dict(config))
    theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path)
    with torch.no_grad():
        decoded = theirs.decode(torch.tensor(inputs("sd")["latents"]).permute(0, 3, 1, 2)).sample.permute(0, 2, 3, 1)
    np.testing.assert_allclose(decoded, EXPECTED["sd/decoded"], **CLOSE)

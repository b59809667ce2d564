"""The UNet on meshes: what is split, and the numbers and gradients of one device, adapters included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.diffusion.models.unet import RULES, UNetConfig, abstract_variables, init_variables, unet_function
from dpo_jax.diffusion.types import TextCondition
from dpo_jax.lora import LoraConfig, init_adapters, with_adapters
from dpo_jax.sharding import P, make_mesh, shard_batch, tree_shardings
from dpo_jax.tree import map_named, named_leaves

# The middle alone has a transformer: the fewest modules that have every kind of layer.
CONFIG = UNetConfig(
    block_out_channels=(8, 16),
    layers=(1, 1),
    down_attention=(False, False),
    up_attention=(False, False),
    transformer_layers=(1, 1),
    heads=(2, 4),
    cross_attention_dim=8,
    norm_groups=4,
)
BLOCK = "mid_block/attentions/0/transformer_blocks/0/"


def adapters_of(variables):
    adapters = init_adapters(jax.random.key(1), variables, LoraConfig(2, 4.0, targets=".*(to_k|to_out/0|proj)/kernel"))
    return map_named(lambda path, leaf: leaf + 0.1 if path.endswith("lora_b") else leaf, adapters)


def test_heads_and_hidden_units_are_split_over_model_and_the_rest_over_fsdp():
    variables = abstract_variables(CONFIG)
    shapes = jax.eval_shape(lambda v: with_adapters(v, adapters_of(v)), variables)
    mesh = make_mesh(data=2, fsdp=2, model=2)
    specs = {path: sharding.spec for path, sharding in named_leaves(tree_shardings(shapes, mesh, RULES)).items()}
    expected = {
        "attn1/to_q/kernel": P("fsdp", "model"),
        "attn2/to_k/kernel": P("fsdp", "model"),
        "attn2/to_k/lora_a": P("fsdp", None),
        "attn2/to_k/lora_b": P(None, "model"),
        "attn2/to_out/0/kernel": P("model", "fsdp"),
        "attn2/to_out/0/lora_a": P("model", None),
        "attn2/to_out/0/lora_b": P(None, "fsdp"),
        "attn2/to_out/0/lora_scale": P(),
        "ff/net/0/proj/kernel": P("fsdp", "model"),
        "ff/net/2/kernel": P("model", "fsdp"),
        "norm1/scale": P(),
    }
    assert {path: specs[BLOCK + path] for path in expected} == expected
    wide = [path for path, leaf in named_leaves(variables).items() if len(leaf.shape) == 4]
    assert wide
    for path in wide:
        assert specs[path] == P(None, None, None, "fsdp"), path
    whole = [path for path, spec in specs.items() if path.endswith("kernel") and not any(spec)]
    assert not whole


@pytest.mark.slow
def test_meshes_give_the_numbers_of_one_device(capfd):
    rng = np.random.default_rng(0)
    batch = {
        "latents": rng.standard_normal((8, 4, 4, 4)).astype(np.float32),
        "timesteps": rng.uniform(0, 999, 8).astype(np.float32),
        "states": rng.standard_normal((8, 3, 8)).astype(np.float32),
        "weights": rng.standard_normal((8, 4, 4, 4)).astype(np.float32),
    }
    variables = init_variables(CONFIG, jax.random.key(0))
    adapters = adapters_of(variables)
    variables, predict = with_adapters(variables, adapters), unet_function(CONFIG, adapters)

    def loss(variables, batch):
        output = predict(variables, batch["latents"], batch["timesteps"], TextCondition(batch["states"]))
        return jnp.sum(output * batch["weights"]), output

    run = jax.value_and_grad(loss, has_aux=True)
    quick = {"xla_backend_optimization_level": 0}
    want = jax.jit(run, compiler_options=quick)(variables, batch)
    mesh = make_mesh(data=2, fsdp=2, model=2)
    shardings = tree_shardings(variables, mesh, RULES)
    capfd.readouterr()
    with jax.set_mesh(mesh):
        spread = jax.jit(run, compiler_options=quick, out_shardings=(None, shardings))
        got = spread(jax.device_put(variables, shardings), shard_batch(batch, mesh))
    assert "rematerialization" not in capfd.readouterr().err
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1.0, float(np.abs(b).max())))

"""Experts on meshes: the numbers of one device, whichever axes the experts, the rows and the parameters fall on."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_decoder import jit
from test_experts import CONFIG, all_experts, batch_of_pairs

from dpo_jax.language.methods.dpo import dpo_loss
from dpo_jax.language.models.decoder import RULES, decoder_function, init_variables
from dpo_jax.language.models.experts import mixture
from dpo_jax.language.models.weights import checkpoint_tensors, load_hf, save_hf
from dpo_jax.language.objectives import from_loss
from dpo_jax.sharding import P, make_mesh, shard_batch
from dpo_jax.train import compile_step, init_state, make_train_step, variables_of
from dpo_jax.tree import named_leaves

MESHES = [
    ({"expert": 4, "model": 2}, 8),
    ({"fsdp": 2, "expert": 2, "model": 2}, 8),
    ({"expert": 4, "model": 2}, 3),
]
MORE_MESHES = [
    ({"fsdp": 4, "expert": 2}, 8),
    ({"data": 2, "fsdp": 2, "model": 2}, 8),
    ({"fsdp": 8}, 3),
    # Too many shards for four experts, and for hidden units of 6: each then computes all of them.
    ({"expert": 8}, 8),
    ({"model": 8}, 8),
]


@pytest.mark.parametrize(
    "sizes, rows", [*MESHES, *(pytest.param(*mesh, marks=pytest.mark.slow) for mesh in MORE_MESHES)]
)
def test_a_mixture_is_the_same_on_every_mesh(sizes, rows):
    """Rows that do not fall evenly on the shards are computed by all of them."""
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = ((rows, 5, 6), (4, 6, 6), (4, 6, 6), (4, 6, 6))
    x, *kernels = (0.5 * jax.random.normal(key, shape) for key, shape in zip(keys, shapes))
    weights, chosen = jax.lax.top_k(jax.nn.softmax(3 * jax.random.normal(keys[4], (rows, 5, 4))), 2)

    def total(function):
        return jit(jax.value_and_grad(lambda *a: jnp.sum(jnp.sin(function(a[0], a[1], chosen, *a[2:]))), range(5)))

    want = total(all_experts)(x, weights, *kernels)
    with jax.set_mesh(make_mesh(**sizes)):
        got = total(partial(mixture, activation=jax.nn.silu))(x, weights, *kernels)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def one_step(mesh, microbatches=1):
    """Metrics, and the gradients as what plain descent of rate 1 subtracts; with the state after the step."""
    config = replace(CONFIG, router_loss=0.1, remat="full")
    policy, reference = (jit(init_variables, static_argnums=0)(config, jax.random.key(seed)) for seed in (0, 1))
    optimizer, before = optax.sgd(1.0), jax.device_get(policy)
    state = init_state(policy, optimizer, jax.random.key(2), reference=reference)
    step = make_train_step(
        from_loss(dpo_loss, beta=0.1), decoder_function(config), optimizer, microbatches=microbatches
    )
    step, state = compile_step(step, state, mesh, RULES)
    state, metrics = step(state, shard_batch(batch_of_pairs(8), mesh))
    gradients = jax.tree.map(lambda a, b: a - b, before, jax.device_get(variables_of(state)))
    return jax.device_get(metrics), gradients, state


@pytest.fixture(scope="module")
def alone():
    return one_step(make_mesh(devices=jax.devices()[:1]))[:2]


@pytest.mark.parametrize(
    "sizes", [{"fsdp": 2, "expert": 2, "model": 2}, pytest.param({"fsdp": 2, "expert": 4}, marks=pytest.mark.slow)]
)
def test_dpo_steps_on_meshes_with_experts_are_those_of_one_device(sizes, alone, capfd):
    capfd.readouterr()
    metrics, gradients, state = one_step(make_mesh(**sizes))
    assert "rematerialization" not in capfd.readouterr().err
    assert abs(float(metrics["loss"]) - np.log(2)) > 1e-2 and "router_entropy" in metrics
    for name, value in alone[0].items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
    want = named_leaves(alone[1])
    for name, value in named_leaves(gradients).items():
        np.testing.assert_allclose(value, want[name], rtol=0, atol=1e-5, err_msg=name)
        assert np.abs(want[name]).max() > 1e-5, name
    parts = sizes["fsdp"] * sizes["expert"] * sizes.get("model", 1)
    for tree in (variables_of(state), state.reference):
        for name, leaf in named_leaves(tree).items():
            if name.endswith("kernels"):
                assert leaf.addressable_shards[0].data.size * parts == leaf.size, name


def test_a_checkpoint_is_read_onto_shards_of_experts_and_written_from_them(tmp_path):
    mesh = make_mesh(fsdp=2, expert=2, model=2)
    made = replace(CONFIG, family="mixtral", intermediate_size=8, expert_intermediate_size=None)
    whole = jit(init_variables, static_argnums=0)(made, jax.random.key(0))
    save_hf(tmp_path, made, whole)
    config, spread = load_hf(tmp_path, mesh=mesh)
    assert spread["layers"]["experts"]["gate"]["kernels"].sharding.spec == P(None, "expert", "fsdp", "model")
    assert spread["layers"]["experts"]["down"]["kernels"].sharding.spec == P(None, "expert", "model", "fsdp")
    for ours, theirs in zip(jax.tree.leaves(spread), jax.tree.leaves(whole)):
        np.testing.assert_array_equal(ours, theirs)
    written, expected = (dict(checkpoint_tensors(config, tree)) for tree in (spread, whole))
    for name, tensor in expected.items():
        np.testing.assert_array_equal(written[name], tensor, err_msg=name)

"""DPO on adapters: the start, what moves, what a step costs beside full fine-tuning, meshes as one device."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax.language.data.pack import Layout, pack_rows
from dpo_jax.language.methods.dpo import dpo_loss
from dpo_jax.language.models.decoder import RULES, DecoderConfig, RopeConfig, decoder_function, init_variables
from dpo_jax.language.objectives import from_loss
from dpo_jax.language.score import score
from dpo_jax.language.types import Example
from dpo_jax.lora import LoraConfig, init_adapters, is_trainable, split_adapters, with_adapters
from dpo_jax.plan import step_needs
from dpo_jax.sharding import make_mesh, shard_batch
from dpo_jax.train import compile_step, init_state, make_train_step, variables_of
from dpo_jax.tree import map_named, named_leaves, tree_bytes

VOCABULARY = 64
TINY = DecoderConfig(
    VOCABULARY, 16, 32, layers=2, heads=4, key_value_heads=2, head_dim=8, rope=RopeConfig(500.0), initializer_range=0.3
)
WIDE = DecoderConfig(VOCABULARY, 128, 256, layers=2, heads=4, key_value_heads=4, head_dim=32)
ALONE = (1, 1, 1)


def pairs():
    """16 rows of one or two ragged pairs."""
    rng = np.random.default_rng(8)

    def ids():
        return rng.integers(0, VOCABULARY, rng.integers(1, 6)).astype(np.int32)

    rows = [[Example(ids(), (ids(), ids())) for _ in range(rng.integers(1, 3))] for _ in range(16)]
    layout = Layout(rows=16, length=32, source_length=24, examples=2, completions=2, completion_length=6)
    return pack_rows(rows, layout)


def start(config, lora, *, moved):
    """Variables with adapters; moved ones are as training leaves them."""
    base = jax.jit(init_variables, static_argnums=0)(config, jax.random.key(0))
    adapters = jax.jit(init_adapters, static_argnums=2)(jax.random.key(1), base, lora)
    draw = np.random.default_rng(1)

    def move(name, leaf):
        return jnp.asarray(draw.normal(size=leaf.shape) * 0.2, leaf.dtype) if name.endswith("lora_b") else leaf

    return with_adapters(base, map_named(move, adapters) if moved else adapters), decoder_function(config, adapters)


def steps_of(variables, apply_fn, sizes, *, reference=True, trainable=is_trainable, optimizer=None):
    """(compiled step, state, batch) of DPO on a mesh."""
    data, fsdp, model = sizes
    mesh = make_mesh(data=data, fsdp=fsdp, model=model, devices=jax.devices()[: data * fsdp * model])
    optimizer = optimizer or optax.sgd(1.0)
    state = init_state(variables, optimizer, jax.random.key(2), trainable=trainable, reference=reference)
    objective = from_loss(dpo_loss, frozen_head=trainable is is_trainable)
    step, state = compile_step(make_train_step(objective, apply_fn, optimizer), state, mesh, RULES)
    return step, state, shard_batch(pairs(), mesh)


@pytest.mark.parametrize("dora", [False, True])
def test_it_starts_at_log_two_and_moves_adapters_alone(dora):
    variables, apply_fn = start(TINY, LoraConfig(rank=2, dora=dora), moved=False)
    before = named_leaves(jax.device_get(variables))
    step, state, batch = steps_of(variables, apply_fn, ALONE, optimizer=optax.adam(1e-2))
    reference = jax.device_get(state.reference)
    for number in range(3):
        state, metrics = step(state, batch)
        # The policy's log-probs are summed beside their gradient, the reference's alone: they differ by rounding.
        assert (abs(float(metrics["margin"])) < 1e-6) == (number == 0)
        assert abs(float(metrics["loss"]) - np.log(2)) < 1e-6 or number
    for name, leaf in named_leaves(variables_of(state)).items():
        assert np.any(np.asarray(leaf) != before[name]) == is_trainable(name), name
    assert jax.tree.all(jax.tree.map(np.array_equal, jax.device_get(state.reference), reference))


def test_the_reference_says_what_the_base_says():
    variables, apply_fn = start(TINY, LoraConfig(rank=2), moved=False)
    base = map_named(lambda name, leaf: leaf, variables)
    batch, function = pairs(), decoder_function(TINY)
    plain = jax.jit(init_variables, static_argnums=0)(TINY, jax.random.key(0))
    got = jax.jit(lambda v: score(partial(apply_fn, v), batch)["logps"])(base)
    want = jax.jit(lambda v: score(partial(function, v), batch)["logps"])(plain)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("dora", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_no_gradient_of_a_kernels_size_is_computed(dora, optimised):
    costs = []
    for selected in (lambda name: True, is_trainable):
        variables, apply_fn = start(WIDE, LoraConfig(rank=1, dora=dora), moved=False)
        if selected is not is_trainable:
            variables, apply_fn = split_adapters(variables)[0], decoder_function(WIDE)
        step, state, batch = steps_of(variables, apply_fn, ALONE, trainable=selected)
        compiled = step.lower(state, batch).compile()
        costs.append(step_needs(compiled, state, batch))
    full, adapters = costs
    # Of the four products of a kernel (forward, two backward, reference) that of its gradient is saved.
    assert adapters.flops < 0.82 * full.flops
    assert adapters.reference < 0.05 * full.reference
    if not dora:  # which keeps the outputs of each layer for the gradient of its magnitudes
        assert full.temporaries - adapters.temporaries > 0.5 * full.policy


LORA = LoraConfig(rank=3, dora=True, rslora=True)


def one_step(sizes):
    variables, apply_fn = start(TINY, LORA, moved=True)
    reference, _ = start(TINY, LORA, moved=False)
    before = jax.device_get(variables)
    step, state, batch = steps_of(variables, apply_fn, sizes, reference=reference)
    state, metrics = step(state, batch)
    gradients = jax.tree.map(lambda a, b: a - b, before, jax.device_get(variables_of(state)))
    return jax.device_get(metrics), named_leaves(gradients), state


@pytest.fixture(scope="module")
def alone():
    return one_step(ALONE)[:2]


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 8, 1), (8, 1, 1)])
def test_steps_on_meshes_are_those_of_one_device(sizes, alone, capfd):
    capfd.readouterr()
    metrics, gradients, state = one_step(sizes)
    assert "rematerialization" not in capfd.readouterr().err
    assert abs(float(metrics["loss"]) - np.log(2)) > 1e-2
    for name, value in alone[0].items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
    for name, value in gradients.items():
        np.testing.assert_allclose(value, alone[1][name], rtol=0, atol=1e-5, err_msg=name)
        assert (np.abs(alone[1][name]).max() > 1e-5) == is_trainable(name), name
    _, fsdp, model = sizes
    for name, leaf in named_leaves(state.params).items():
        into_model = name.endswith("lora_a") == (name.split("/")[2] in ("output", "down"))
        assert leaf.addressable_shards[0].data.size * (model if into_model else fsdp) == leaf.size, name
    assert tree_bytes(state.params) == tree_bytes(state.reference)

"""The decoder in its uses: packed rows scored as torch does, DPO steps on meshes as on one device."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from make_decoder_fixtures import FOLDER

from dpo_jax.language.data.pack import Layout, pack_rows
from dpo_jax.language.methods.dpo import dpo_loss
from dpo_jax.language.models.decoder import (
    RULES,
    DecoderConfig,
    RopeConfig,
    decoder_function,
    init_variables,
)
from dpo_jax.language.models.weights import checkpoint_tensors, load_hf
from dpo_jax.language.objectives import from_loss
from dpo_jax.language.score import score
from dpo_jax.language.types import Example
from dpo_jax.sharding import make_mesh, shard_batch
from dpo_jax.train import compile_step, init_state, make_train_step, variables_of
from dpo_jax.tree import named_leaves

VOCABULARY = 64


def torch_rows(expected, cut):
    """Each of torch's rows as a prompt of `cut` tokens and its rest, beside a rest that torch never saw."""
    rng, examples = np.random.default_rng(3), []
    for place, (row, length) in enumerate(zip(expected["tokens"], expected["lengths"])):
        rest, other = row[cut:length], rng.integers(0, VOCABULARY, 4 + place).astype(np.int32)
        examples.append(Example(row[:cut], (rest, other) if place % 2 else (other, rest)))
    return examples


@pytest.mark.parametrize("variant, cut", [("biased", 1), ("yarn", 1), ("tied", 6), ("llama3", 6)])
def test_packed_rows_score_as_torch_does(variant, cut):
    expected = dict(np.load(FOLDER / variant / "expected.npz"))
    config, variables = load_hf(FOLDER / variant)
    examples = torch_rows(expected, cut)
    layout = Layout(rows=1, length=80, source_length=72, examples=3, completions=2, completion_length=24)
    batch = pack_rows([examples], layout)
    apply_fn = decoder_function(config)
    # Weights of torch's own tokens; the completions that torch never saw must not matter.
    weights = np.zeros((3, 2, 24), np.float32)
    for place, length in enumerate(expected["lengths"]):
        weights[place, place % 2 ^ 1, : length - cut] = expected["weights"][place, cut - 1 : length - 1]

    def weighted(variables):
        logps = score(partial(apply_fn, variables), batch)["logps"]
        return jnp.sum(logps * weights), logps

    function = jax.value_and_grad(weighted, has_aux=True) if cut == 1 else lambda v: (weighted(v), None)
    # Tests compile much and compute little.
    (_, logps), gradients = jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})(variables)
    for place, length in enumerate(expected["lengths"]):
        got = logps[place, place % 2 ^ 1, : length - cut]
        np.testing.assert_allclose(got, expected["logps"][place, cut - 1 : length - 1], rtol=0, atol=1e-4)
    if cut > 1:  # torch's scalar weighs all tokens but the first
        return
    for name, got in checkpoint_tensors(config, gradients):
        want = expected[f"gradient:{name}"]
        # Sums over tokens of size up to about 10: 1e-4 of the largest entry.
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * max(1.0, np.abs(want).max()), err_msg=name)


CONFIG = DecoderConfig(
    VOCABULARY,
    16,
    32,
    layers=2,
    heads=4,
    key_value_heads=2,
    head_dim=8,
    rope=RopeConfig(500.0),
    attention_bias=True,
    initializer_range=0.3,
)


def pairs():
    """16 rows of one or two ragged pairs, with unequal weights, some places empty."""
    rng = np.random.default_rng(8)

    def ids():
        return rng.integers(0, VOCABULARY, rng.integers(1, 6)).astype(np.int32)

    rows = [[Example(ids(), (ids(), ids())) for _ in range(rng.integers(1, 3))] for _ in range(16)]
    layout = Layout(rows=16, length=32, source_length=24, examples=2, completions=2, completion_length=6)
    batch = pack_rows(rows, layout)
    batch.weight[...] *= rng.uniform(0.5, 2.0, batch.weight.shape)
    return batch


def one_step(mesh, microbatches):
    """Loss, and the gradients as what plain descent of rate 1 subtracts; with the state after the step."""
    policy, reference = (jax.jit(init_variables, static_argnums=0)(CONFIG, jax.random.key(seed)) for seed in (0, 1))
    optimizer = optax.sgd(1.0)
    before = jax.device_get(policy)
    state = init_state(policy, optimizer, jax.random.key(2), reference=reference)
    objective = from_loss(dpo_loss, beta=0.1)
    step = make_train_step(objective, decoder_function(CONFIG), optimizer, microbatches=microbatches)
    step, state = compile_step(step, state, mesh, RULES)
    state, metrics = step(state, shard_batch(pairs(), mesh))
    gradients = jax.tree.map(lambda a, b: a - b, before, jax.device_get(variables_of(state)))
    return jax.device_get(metrics), gradients, state


@pytest.fixture(scope="module")
def alone():
    return one_step(make_mesh(devices=jax.devices()[:1]), 1)[:2]


@pytest.mark.parametrize(
    "sizes, microbatches",
    [((2, 2, 2), 2), ((1, 8, 1), 1), ((1, 1, 8), 1), ((8, 1, 1), 2)],
)
def test_dpo_steps_on_meshes_are_those_of_one_device(sizes, microbatches, alone, capfd):
    data, fsdp, model = sizes
    capfd.readouterr()
    metrics, gradients, state = one_step(make_mesh(data=data, fsdp=fsdp, model=model), microbatches)
    assert "rematerialization" not in capfd.readouterr().err
    assert abs(float(metrics["loss"]) - np.log(2)) > 1e-2
    for name, value in alone[0].items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
    want = named_leaves(alone[1])
    for name, value in named_leaves(gradients).items():
        np.testing.assert_allclose(value, want[name], rtol=0, atol=1e-5, err_msg=name)
        assert np.abs(want[name]).max() > 1e-4, name
    for tree in (variables_of(state), state.reference):
        for name, leaf in named_leaves(tree).items():
            part = leaf.addressable_shards[0].data.size
            if name.endswith(("kernel", "embedding")):
                assert part * fsdp * model == leaf.size, name

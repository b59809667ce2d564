"""The decoder against numbers of torch transformers, trees against paths, cache against rows, meshes against one."""

import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_decoder_fixtures import FOLDER, VARIANTS

from dpo_jax.language.models.decoder import (
    RULES,
    DecoderConfig,
    RopeConfig,
    abstract_variables,
    decoder_function,
    empty_cache,
    init_variables,
)
from dpo_jax.language.models.rope import rope_frequencies
from dpo_jax.language.models.weights import checkpoint_tensors, load_hf
from dpo_jax.logprobs import logits_logps
from dpo_jax.sharding import P, make_mesh, shard_batch, tree_shardings
from dpo_jax.tree import named_leaves

TINY = DecoderConfig(40, 16, 24, layers=3, heads=4, key_value_heads=2, head_dim=8, rope=RopeConfig(theta=500.0))

# Tests compile much and compute little.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def logits_of(config, variables, *rows):
    answer = decoder_function(config)(variables, *rows)
    logits = jnp.einsum("rld,vd->rlv", answer.hidden, answer.head)
    logits = logits if answer.bias is None else logits + answer.bias
    return logits if answer.softcap is None else answer.softcap * jnp.tanh(logits / answer.softcap)


jitted_logits = jit(logits_of, static_argnums=0)


def padded_rows(tokens, lengths):
    """Plain rows as trees: one path each, padding sees nothing and is seen by nothing."""
    column = np.arange(tokens.shape[1], dtype=np.int32)
    ends = np.where(column < lengths[:, None], lengths[:, None], 0).astype(np.int32)
    return tokens, np.broadcast_to(column, tokens.shape), ends


def ours(config, variables, expected):
    """Logits, log-probs and gradients as torch's names and layouts have them."""
    rows = padded_rows(expected["tokens"], expected["lengths"])
    kept = rows[2] > 0

    @jit
    @partial(jax.value_and_grad, has_aux=True)
    def run(variables):
        logits = logits_of(config, variables, *rows)
        logps = logits_logps(logits[:, :-1], rows[0][:, 1:]) * kept[:, 1:]
        return jnp.sum(logps * expected["weights"]), (logits * kept[..., None], logps)

    (_, (logits, logps)), gradients = run(variables)
    result = {"logits": logits, "logps": logps}
    return result | {f"gradient:{name}": tensor for name, tensor in checkpoint_tensors(config, gradients)}


def assert_parity(got, expected):
    numbers = {name: value for name, value in expected.items() if name not in ("tokens", "lengths", "weights")}
    assert got.keys() == numbers.keys()
    for name, value in numbers.items():
        # Gradients are sums over tokens of size up to about 10: 1e-4 of the largest entry.
        np.testing.assert_allclose(got[name], value, rtol=0, atol=1e-4 * max(1.0, np.abs(value).max()), err_msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_logps_and_gradients_are_those_of_torch(variant):
    expected = dict(np.load(FOLDER / variant / "expected.npz"))
    config, variables = load_hf(FOLDER / variant)
    assert_parity(ours(config, variables, expected), expected)


@pytest.mark.parametrize("variant", ["plain", "yarn", "llama3", "linear_old_layout"])
def test_a_wrong_rope_is_noticed(variant):
    expected = dict(np.load(FOLDER / variant / "expected.npz"))
    config, variables = load_hf(FOLDER / variant)
    wrong = (
        RopeConfig(theta=1e4) if variant == "plain" else replace(config.rope, kind="default", attention_factor=1.0),
        replace(config.rope, theta=config.rope.theta * 1.5),
    )
    rows = padded_rows(expected["tokens"], expected["lengths"])
    for rope in wrong:
        got = jitted_logits(replace(config, rope=rope), variables, *rows)
        assert np.abs(got * (rows[2] > 0)[..., None] - expected["logits"]).max() > 1e-2


def test_rope_formulas_in_float64():
    dimension, theta = 64, 5e5
    base = np.array([theta ** (-2 * i / dimension) for i in range(dimension // 2)])
    plain = rope_frequencies(RopeConfig(theta), dimension)
    np.testing.assert_allclose(plain, base, rtol=1e-6)
    np.testing.assert_allclose(rope_frequencies(RopeConfig(theta, "linear", 3.0), dimension), base / 3, rtol=1e-6)
    # Llama 3.1: long waves slowed down, short ones kept, a band between mixed by its number of rotations.
    want = []
    for frequency in base:
        wave = 2 * math.pi / frequency
        mix = (8192 / wave - 1.0) / (4.0 - 1.0)
        mixed = (1 - mix) * frequency / 8 + mix * frequency
        want.append(frequency if wave < 8192 / 4 else frequency / 8 if wave > 8192 / 1 else mixed)
    got = rope_frequencies(RopeConfig(theta, "llama3", 8.0, 8192, 1.0, 4.0), dimension)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert len({round(float(a / b), 3) for a, b in zip(got, base)}) > 4
    # YaRN, arXiv 2309.00071: the ramp runs over dimensions that make 32 and 1 rotations in the original context.
    low, high = (
        rounded(dimension * math.log(4096 / (2 * math.pi * turns)) / (2 * math.log(theta)))
        for rounded, turns in ((math.floor, 32), (math.ceil, 1))
    )
    want = [f / 4 * (r := min(max((i - low) / (high - low), 0), 1)) + f * (1 - r) for i, f in enumerate(base)]
    np.testing.assert_allclose(rope_frequencies(RopeConfig(theta, "yarn", 4.0, 4096), dimension), want, rtol=1e-6)


def test_initial_weights_and_their_shapes():
    variables = jit(init_variables, static_argnums=0)(TINY, jax.random.key(3))
    abstract = abstract_variables(TINY)
    assert jax.tree.structure(variables) == jax.tree.structure(abstract)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(variables)] == [
        (x.shape, x.dtype) for x in jax.tree.leaves(abstract)
    ]
    leaves = named_leaves(variables)
    assert leaves["layers/attention/query/kernel"].shape == (3, 16, 32)
    for name, leaf in leaves.items():
        if name.endswith("scale"):
            assert jnp.all(leaf == 1)
        else:
            assert float(jnp.std(leaf)) == pytest.approx(0.02, rel=0.15)
    kernel = leaves["layers/feed_forward/gate/kernel"]
    assert not jnp.array_equal(kernel[0], kernel[1])
    assert "head/embedding" not in named_leaves(abstract_variables(replace(TINY, tie_embeddings=True)))


def big(config, seed=0):
    """Weights with which attention and positions matter."""
    variables = jit(init_variables, static_argnums=0)(config, jax.random.key(seed))
    return jax.tree.map(lambda leaf: leaf * 12 if leaf.ndim > 2 else leaf, variables)


def tree_row():
    """A prompt of 5 with completions of 4 and 3, and behind it an example of its own with 4 tokens; padding of 2."""
    rng = np.random.default_rng(5)
    prompt, first, second, other = (rng.integers(0, 40, n).astype(np.int32) for n in (5, 4, 3, 4))
    tokens = np.concatenate([prompt, first, second, other, [0, 0]])[None]
    positions = np.concatenate([np.arange(9), np.arange(5, 8), np.arange(4), [0, 0]])[None]
    ends = np.concatenate([[12] * 5, [9] * 4, [12] * 3, [16] * 4, [0, 0]])[None]
    paths = [(np.r_[0:9], [*prompt, *first]), (np.r_[0:5, 9:12], [*prompt, *second]), (np.r_[12:16], other)]
    return [x.astype(np.int32) for x in (tokens, positions, ends)], paths


def test_each_path_of_a_tree_is_as_if_it_stood_alone():
    variables, (row, paths) = big(TINY), tree_row()
    together = jitted_logits(TINY, variables, *row)
    for columns, tokens in paths:
        alone = np.array(tokens, np.int32)[None]
        lone = jitted_logits(TINY, variables, *padded_rows(alone, np.array([alone.shape[1]])))
        np.testing.assert_allclose(together[0, columns], lone[0], atol=2e-5)
    assert bool(jnp.all(jnp.isfinite(together)))


@pytest.mark.parametrize("chunks", [(7, 1, 1, 1, 1, 1), (3, 5, 4)])
def test_cache_gives_what_whole_rows_give(chunks):
    variables, apply_fn = big(TINY), decoder_function(TINY)
    decode = jit(partial(apply_fn, method="decode"))
    tokens = np.random.default_rng(1).integers(0, 40, (2, 12)).astype(np.int32)
    column = np.arange(12, dtype=np.int32)
    whole = jit(apply_fn)(variables, *padded_rows(tokens, np.array([12, 12]))).hidden
    cache, parts, start = empty_cache(TINY, 2, 15), [], 0
    for size in chunks:
        at = column[start : start + size]
        mask = np.broadcast_to(np.arange(15) <= at[:, None], (2, size, 15))
        positions = np.broadcast_to(at, (2, size))
        answer, cache = decode(variables, tokens[:, at], positions, cache, jnp.int32(start), mask)
        parts.append(answer.hidden)
        start += size
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=2e-5)


def program(config):
    rows = [jax.ShapeDtypeStruct((2, 8), jnp.int32)] * 3

    def loss(variables, *rows):
        return jnp.sum(logits_of(config, variables, *rows) ** 2)

    return len(jit(jax.grad(loss)).lower(abstract_variables(config), *rows).as_text())


@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_program_does_not_grow_with_depth(remat):
    small, large = (program(replace(TINY, layers=layers, remat=remat)) for layers in (2, 16))
    assert large == pytest.approx(small, rel=0.02)  # digits of sizes only


def loss_of(config, rows):
    return lambda variables: jnp.mean(jnp.sin(logits_of(config, variables, *rows).astype(jnp.float32)))


def test_remat_changes_memory_and_not_gradients():
    config, rng = replace(TINY, layers=6), np.random.default_rng(6)
    rows = padded_rows(rng.integers(0, 40, (2, 64)).astype(np.int32), np.array([64, 50]))
    variables, gradients, temporary = big(config), {}, {}
    for remat in ("none", "dots", "full"):
        compiled = jit(jax.grad(loss_of(replace(config, remat=remat), rows))).lower(variables).compile()
        gradients[remat] = jax.tree.leaves(compiled(variables))
        temporary[remat] = compiled.memory_analysis().temp_size_in_bytes
    assert temporary["full"] < temporary["dots"] < temporary["none"]
    for remat in ("dots", "full"):
        for a, b in zip(gradients["none"], gradients[remat]):
            np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_bfloat16_computes_in_bfloat16_and_stays_near(param_dtype):
    config = replace(TINY, dtype="bfloat16", param_dtype=param_dtype)
    exact, (row, _) = big(TINY), tree_row()
    variables = jax.tree.map(lambda leaf: leaf.astype(param_dtype), exact)
    answer = jit(decoder_function(config))(variables, *row)
    assert answer.hidden.dtype == jnp.bfloat16 and answer.head.dtype == param_dtype
    want = jit(decoder_function(TINY))(exact, *row).hidden
    # bfloat16 has 8 bits: 0.4 % for each of about ten roundings in a row.
    error = jnp.linalg.norm(answer.hidden.astype(jnp.float32) - want) / jnp.linalg.norm(want)
    assert 1e-4 < float(error) < 0.04
    gradients = jax.eval_shape(jax.grad(loss_of(config, row)), variables)
    assert all(g.dtype == param_dtype for g in jax.tree.leaves(gradients))


def test_angles_stay_exact_at_far_positions_in_bfloat16():
    config = replace(TINY, layers=1, dtype="bfloat16")
    variables = big(config)
    tokens = np.random.default_rng(2).integers(0, 40, (1, 8)).astype(np.int32)
    row = padded_rows(tokens, np.array([8]))
    apply_fn = jit(decoder_function(config))
    near = apply_fn(variables, *row).hidden.astype(jnp.float32)
    far = apply_fn(variables, tokens, row[1] + 5001, row[2]).hidden.astype(jnp.float32)
    # Only differences of positions matter; bfloat16 positions would be off by up to 16.
    assert float(jnp.linalg.norm(near - far) / jnp.linalg.norm(near)) < 0.02


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 4}, {"data": 2, "fsdp": 2, "model": 2}])
def test_meshes_give_the_numbers_of_one_device(sizes, capfd):
    config, rng = replace(TINY, attention_bias=True), np.random.default_rng(4)
    variables = big(config)
    lengths = rng.integers(4, 13, 8)
    tokens = rng.integers(0, 40, (8, 12)).astype(np.int32) * (np.arange(12) < lengths[:, None])
    rows = padded_rows(tokens.astype(np.int32), lengths)
    want = jit(jax.value_and_grad(loss_of(config, rows)))(variables)
    mesh = make_mesh(**sizes)
    shardings = tree_shardings(variables, mesh, RULES)
    names = named_leaves(shardings)
    model = "model" if "model" in sizes else None
    assert names["layers/attention/query/kernel"].spec == P(None, "fsdp", model)
    assert names["layers/feed_forward/down/kernel"].spec == P(None, model, "fsdp")
    assert names["embed/embedding"].spec == P(model, "fsdp")
    assert names["layers/attention/key/bias"].spec == P(None, model)
    capfd.readouterr()
    with jax.set_mesh(mesh):
        run = jit(
            lambda variables, rows: jax.value_and_grad(loss_of(config, rows))(variables),
            out_shardings=(None, shardings),
        )
        got = run(jax.device_put(variables, shardings), shard_batch(rows, mesh))
    assert "rematerialization" not in capfd.readouterr().err
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_allclose(a, b, atol=1e-6)

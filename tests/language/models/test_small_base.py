"""Frozen bases in few bits under adapters: the same function as the rounded model, its cost, its steps on meshes."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from make_family_fixtures import FOLDER
from test_lora_training import ALONE, LORA, TINY, WIDE, start, steps_of

from dpo_jax.language.models.decoder import abstract_variables, decoder_function, init_variables
from dpo_jax.language.models.weights import load_hf
from dpo_jax.lora import LoraConfig, init_adapters, is_trainable, split_adapters, with_adapters
from dpo_jax.quantize import dequantize_kernels, quantize_kernels
from dpo_jax.sharding import P
from dpo_jax.train import variables_of
from dpo_jax.tree import named_leaves

KINDS = pytest.mark.parametrize("kind", ["int8", "nf4"])


def logits(config, variables, adapters=None, kind=None):
    tokens = np.random.default_rng(3).integers(0, config.vocabulary_size, (3, 12)).astype(np.int32)
    positions = np.broadcast_to(np.arange(12, dtype=np.int32), tokens.shape)
    ends = np.full_like(tokens, 12)
    variables = variables if adapters is None else with_adapters(variables, adapters)
    answer = jax.jit(decoder_function(config, adapters, kernels=kind))(variables, tokens, positions, ends)
    return np.asarray(jnp.einsum("rld,vd->rlv", answer.hidden, answer.head))


@KINDS
@pytest.mark.parametrize("change", [{}, {"remat": "dots"}, {"remat": "full", "dtype": "bfloat16"}])
def test_the_function_is_that_of_the_rounded_kernels(kind, change):
    config = replace(TINY, **change)
    variables = jax.jit(init_variables, static_argnums=0)(config, jax.random.key(0))
    small = jax.jit(quantize_kernels, static_argnums=1)(variables, kind)
    got, want = logits(config, small, kind=kind), logits(config, dequantize_kernels(small))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 if config.dtype == "float32" else 0.05)
    # Bits were lost, and few: relative to the largest logit.
    error = np.abs(got - logits(config, variables)).max() / np.abs(want).max()
    assert 1e-4 < error < {"int8": 0.04, "nf4": 0.5}[kind]


@KINDS
@pytest.mark.parametrize("dora", [False, True])
def test_adapters_at_their_start_change_nothing(kind, dora):
    variables = jax.jit(init_variables, static_argnums=0)(TINY, jax.random.key(0))
    small = quantize_kernels(variables, kind)
    adapters = init_adapters(jax.random.key(1), dequantize_kernels(small), LoraConfig(rank=2, dora=dora))
    got, want = logits(TINY, small, adapters, kind), logits(TINY, small, kind=kind)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 if dora else 0)


@KINDS
def test_a_checkpoint_is_read_into_few_bits(kind):
    folder = FOLDER / "qwen2"
    whole, small = load_hf(folder)[1], load_hf(folder, kernels=kind)[1]
    want = named_leaves(jax.jit(quantize_kernels, static_argnums=1)(whole, kind))
    got = named_leaves(small)
    assert got.keys() == want.keys() and any(name.endswith(f"query/kernel/{kind}") for name in got)
    for name, leaf in got.items():
        np.testing.assert_array_equal(leaf, want[name], err_msg=name)


def small_start(config, kind, lora, *, moved):
    """As `start`, on a base in few bits."""
    base, adapters = split_adapters(start(config, lora, moved=moved)[0])
    small = jax.jit(quantize_kernels, static_argnums=1)(base, kind)
    if kind is not None and not moved:
        adapters = init_adapters(jax.random.key(1), dequantize_kernels(small), lora)
    return with_adapters(small, adapters), decoder_function(config, adapters, kernels=kind)


@KINDS
def test_it_starts_at_log_two_and_moves_adapters_alone(kind):
    variables, apply_fn = small_start(TINY, kind, LoraConfig(rank=2), moved=False)
    before = named_leaves(jax.device_get(variables))
    step, state, batch = steps_of(variables, apply_fn, ALONE, optimizer=optax.adam(1e-2))
    state, metrics = step(state, batch)
    assert abs(float(metrics["loss"]) - np.log(2)) < 1e-6
    state, metrics = step(state, batch)
    assert float(metrics["loss"]) < np.log(2) - 1e-3
    for name, leaf in named_leaves(variables_of(state)).items():
        assert np.any(np.asarray(leaf) != before[name]) == is_trainable(name), name


def one_step(kind, sizes):
    variables, apply_fn = small_start(TINY, kind, LORA, moved=True)
    reference, _ = small_start(TINY, kind, LORA, moved=False)
    before = jax.device_get(variables)
    step, state, batch = steps_of(variables, apply_fn, sizes, reference=reference)
    state, metrics = step(state, batch)
    after = jax.device_get(variables_of(state))
    moved = {n: a - b for (n, a), b in zip(named_leaves(after).items(), jax.tree.leaves(before)) if is_trainable(n)}
    return jax.device_get(metrics), moved, state


@KINDS
def test_steps_on_meshes_are_those_of_one_device(kind, capfd):
    alone = one_step(kind, ALONE)
    capfd.readouterr()
    metrics, moved, state = one_step(kind, (2, 2, 2))
    assert "rematerialization" not in capfd.readouterr().err
    for name, value in alone[0].items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
    for name, value in moved.items():
        assert np.abs(value).max() > 1e-5
        np.testing.assert_allclose(value, alone[1][name], rtol=0, atol=1e-5, err_msg=name)
    spec = P(None, "fsdp", "model")
    assert state.frozen["layers"]["attention"]["query"]["kernel"][kind].sharding.spec == spec


def products(jaxpr):
    """Shapes of the results of all matrix products in a program, loops and calls included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.outvars[0].aval.shape
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from products(inner)


@pytest.mark.parametrize("kind", [None, "int8", "nf4"])
@pytest.mark.parametrize("dora", [False, True])
def test_no_product_has_the_size_of_a_kernel(kind, dora):
    config = replace(TINY, hidden_size=48, intermediate_size=80, head_dim=10)
    rows, base = [np.zeros((2, 7), np.int32)] * 3, abstract_variables(config)
    lora = LoraConfig(rank=3, dora=dora)
    adapters = jax.eval_shape(lambda key, v: init_adapters(key, v, lora), jax.random.key(0), base)
    small = base if kind is None else jax.eval_shape(partial(quantize_kernels, kind=kind), base)
    function = decoder_function(config, adapters, kernels=kind)

    def total(adapters, small):
        return jnp.sum(function(with_adapters(small, adapters), *rows).hidden)

    def shapes(function, *arguments):
        return {tuple(sorted(shape)) for shape in products(jax.make_jaxpr(jax.grad(function))(*arguments).jaxpr)}

    kernels = {tuple(sorted(leaf.shape[1:])) for name, leaf in named_leaves(base).items() if name.endswith("kernel")}
    assert kernels == {(40, 48), (20, 48), (48, 80)}
    assert not shapes(total, adapters, small) & kernels
    # A model that is trained whole has them all.
    plain = decoder_function(config)
    assert kernels <= shapes(lambda base: jnp.sum(plain(base, *rows).hidden), base)


@pytest.mark.slow
def test_the_compiled_gradient_holds_less(optimised):
    config = replace(WIDE, layers=4)
    rows = [np.zeros((2, 8), np.int32)] * 3
    base, held = abstract_variables(config), {}
    adapters = jax.eval_shape(lambda key, v: init_adapters(key, v, LoraConfig(rank=1)), jax.random.key(0), base)
    for kind in (None, "int8", "nf4"):
        function = decoder_function(config, adapters, kernels=kind)
        small = base if kind is None else jax.eval_shape(partial(quantize_kernels, kind=kind), base)

        def total(adapters, small, function=function):
            return jnp.sum(function(with_adapters(small, adapters), *rows).hidden)

        held[kind] = jax.jit(jax.grad(total)).lower(adapters, small).compile().memory_analysis()
    one_layer = 4 * (4 * 128 * 128 + 3 * 128 * 256)  # float32
    for kind, share in (("int8", 1 / 4), ("nf4", 4.5 / 32)):
        saved = held[None].argument_size_in_bytes - held[kind].argument_size_in_bytes
        assert abs(saved - (1 - share) * 4 * one_layer) < 0.15 * one_layer
        # The whole kernels are there one layer at a time, in the backward pass too.
        assert held[kind].temp_size_in_bytes < held[None].temp_size_in_bytes + 0.1 * one_layer

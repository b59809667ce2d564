"""Optimizers by name: each moves, decays matrices only, follows its schedule; no option without effect."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpo_jax.optimizers import OptimizerConfig, make_optimizer, make_schedule

NAMES = ("adamw", "adafactor", "lion", "muon", "sgd")


def params():
    rng = np.random.default_rng(0)
    return {
        "layers": {
            "up": {"kernel": jnp.asarray(rng.normal(size=(3, 8, 4)), jnp.float32), "bias": jnp.ones((3, 4))},
            "norm": {"scale": jnp.ones((3, 8))},
        },
        "embed": {"embedding": jnp.asarray(rng.normal(size=(6, 8)), jnp.float32)},
    }


def moved(config, gradient=1.0, steps=3):
    optimizer = make_optimizer(config, steps)
    values = params()
    state = optimizer.init(values)
    for _ in range(steps):
        grads = jax.tree.map(lambda leaf: jnp.full_like(leaf, gradient), values)
        updates, state = jax.jit(optimizer.update)(grads, state, values)
        values = optax.apply_updates(values, updates)
    return values


@pytest.mark.parametrize("name", NAMES)
def test_each_optimizer_moves_every_leaf(name):
    after = moved(OptimizerConfig(optimizer=name, learning_rate=0.1, schedule="constant"))
    for before, now in zip(jax.tree.leaves(params()), jax.tree.leaves(after)):
        assert np.all(np.isfinite(now)) and np.abs(now - before).max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_decay_pulls_matrices_and_spares_vectors(name):
    config = OptimizerConfig(optimizer=name, learning_rate=0.1, schedule="constant", weight_decay=0.1)
    with_decay, without = moved(config, 0.0), moved(replace(config, weight_decay=0.0), 0.0)
    np.testing.assert_allclose(with_decay["layers"]["norm"]["scale"], without["layers"]["norm"]["scale"])
    np.testing.assert_allclose(with_decay["layers"]["up"]["bias"], without["layers"]["up"]["bias"])
    for path in (("layers", "up", "kernel"), ("embed", "embedding")):
        a, b = with_decay, without
        for key in path:
            a, b = a[key], b[key]
        assert np.linalg.norm(a) < np.linalg.norm(b)


def test_adafactor_steps_by_the_rate_whatever_the_size_of_the_parameters():
    """Root mean square of the first step, as the published recipes set the algorithm."""
    config = OptimizerConfig(optimizer="adafactor", learning_rate=1e-2, schedule="constant", warmup=0)
    for scale in (1e-3, 1.0, 1e3):
        values = {"kernel": scale * params()["embed"]["embedding"]}
        optimizer = make_optimizer(config, 1)
        updates, _ = optimizer.update({"kernel": jnp.full((6, 8), 3.0)}, optimizer.init(values), values)
        np.testing.assert_allclose(updates["kernel"], -1e-2, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_decay_is_in_proportion_to_the_rate(name):
    config = OptimizerConfig(optimizer=name, learning_rate=0.1, schedule="constant", warmup=0, weight_decay=0.2)
    kernel = moved(config, 0.0, steps=1)["layers"]["up"]["kernel"]
    np.testing.assert_allclose(kernel, params()["layers"]["up"]["kernel"] * (1 - 0.1 * 0.2), rtol=1e-5)


def test_schedule_warms_up_and_comes_down():
    config = OptimizerConfig(learning_rate=1.0, warmup=4, schedule="linear")
    rates = [float(make_schedule(config, 12)(i)) for i in range(13)]
    np.testing.assert_allclose(rates[:4], [0.25, 0.5, 0.75, 1.0])
    np.testing.assert_allclose(rates[4:], 1 - np.arange(9) / 8, atol=1e-6)
    cosine = make_schedule(replace(config, schedule="cosine", final_learning_rate=0.1, warmup=0), 10)
    assert float(cosine(0)) == 1.0 and float(cosine(10)) == pytest.approx(0.1)
    assert float(make_schedule(replace(config, warmup=0.5, schedule="constant"), 8)(0)) == 0.25


def test_one_step_of_warmup_is_the_peak():
    assert float(make_schedule(OptimizerConfig(learning_rate=1.0, warmup=1), 3)(0)) == 1.0


def test_clipping_bounds_the_step():
    config = OptimizerConfig(optimizer="sgd", learning_rate=1.0, schedule="constant", warmup=0, b1=0.0, clip=0.5)
    change = jax.tree.map(jnp.subtract, moved(config, 100.0, steps=1), params())
    assert float(optax.tree.norm(change)) == pytest.approx(0.5, rel=1e-5)
    free = jax.tree.map(jnp.subtract, moved(replace(config, clip=0.0), 100.0, steps=1), params())
    assert float(optax.tree.norm(free)) > 100


@pytest.mark.parametrize("option", ["b1", "b2", "epsilon"])
def test_adamw_options_have_an_effect(option):
    config = OptimizerConfig(learning_rate=0.1, clip=0.0)
    values = {"b1": 0.1, "b2": 0.1, "epsilon": 1.0}

    def course(config):
        optimizer = make_optimizer(config, 4)
        state, x = optimizer.init({"kernel": jnp.ones(2)}), {"kernel": jnp.ones(2)}
        for gradient in (1.0, -0.3, 0.2):
            updates, state = optimizer.update({"kernel": jnp.full(2, gradient)}, state, x)
            x = optax.apply_updates(x, updates)
        return float(x["kernel"][0])

    assert course(config) != course(replace(config, **{option: values[option]}))

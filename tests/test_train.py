"""The trainer on toy scorers: other people's models, microbatches, meshes, averages, references, memory."""

import os
from functools import partial

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from dpo_jax.plan import step_needs
from dpo_jax.sharding import make_mesh, shard_batch
from dpo_jax.train import (
    ReferenceUpdate,
    compile_eval_step,
    compile_step,
    evaluate_batches,
    fit,
    init_state,
    make_eval_step,
    make_train_step,
    variables_of,
)
from dpo_jax.types import LossOutput

WIDTH, HIDDEN = 8, 16
RULES = ((r"up", P("fsdp", "model")), (r"down", P("model", "fsdp")))


def pair_objective(policy, reference, batch, key, loss_state):
    """DPO on scores of vectors, with a term that shows the loss state."""
    chosen, rejected = policy(batch["chosen"]), policy(batch["rejected"])
    margin = chosen - rejected
    if reference is not None:
        margin = margin - (reference(batch["chosen"]) - reference(batch["rejected"]))
    loss = -jax.nn.log_sigmoid(margin)
    return LossOutput(loss, {"margin": margin}, loss_state)


def plain_apply(variables, x):
    hidden = jnp.tanh(x @ variables["up"] + variables["bias"])
    return (hidden @ variables["down"])[..., 0]


def plain_variables(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "up": jnp.asarray(rng.normal(size=(WIDTH, HIDDEN)) * 0.3, jnp.float32),
        "bias": jnp.zeros((HIDDEN,)),
        "down": jnp.asarray(rng.normal(size=(HIDDEN, 8)) * 0.3, jnp.float32),
    }


def make_batch(seed, rows=16, empty=0):
    rng = np.random.default_rng(seed)
    batch = {
        "chosen": rng.normal(size=(rows, WIDTH)).astype(np.float32) + 0.3,
        "rejected": rng.normal(size=(rows, WIDTH)).astype(np.float32),
        "weight": np.ones(rows, np.float32),
    }
    if empty:
        places = rng.permutation(rows)[:empty]
        batch["weight"][places] = 0
        batch["chosen"][places] = 1e4
    return batch


def one_device():
    return make_mesh(devices=jax.devices()[:1])


def run(mesh, *, steps=3, microbatches=1, optimizer=None, batches=None, **options):
    optimizer = optimizer or optax.adamw(1e-2)
    state = init_state(plain_variables(), optimizer, jax.random.key(0), reference=plain_variables(1))
    step = make_train_step(pair_objective, plain_apply, optimizer, microbatches=microbatches, **options)
    step, state = compile_step(step, state, mesh, RULES)
    losses = []
    batches = batches or [make_batch(i, empty=i) for i in range(steps)]
    state = fit(
        step,
        state,
        (shard_batch(b, mesh) for b in batches),
        steps=steps,
        every=((1, lambda n, s, m: losses.append(float(m["loss"]))),),
    )
    return state, losses


def reference_run(steps=3):
    """The same training, by hand: no jit, no mesh, no microbatches; empty places left out."""
    optimizer = optax.adamw(1e-2)
    variables, other = plain_variables(), plain_variables(1)
    opt_state, losses = optimizer.init(variables), []
    for i in range(steps):
        batch = make_batch(i, empty=i)
        keep = batch["weight"] > 0

        def loss(v, batch=batch, keep=keep):
            def gap(w):
                return plain_apply(w, batch["chosen"][keep]) - plain_apply(w, batch["rejected"][keep])

            return jnp.mean(jnp.logaddexp(0.0, -(gap(v) - gap(other))))

        value, grads = jax.value_and_grad(loss)(variables)
        updates, opt_state = optimizer.update(grads, opt_state, variables)
        variables = optax.apply_updates(variables, updates)
        losses.append(float(value))
    return variables, losses


MESHES = [(1, 1, 1), (8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (4, 1, 2), (1, 4, 2), (2, 4, 1)]


@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("microbatches", [1, 2])
def test_same_numbers_for_every_mesh_and_microbatch_split(sizes, microbatches):
    data, fsdp, model = sizes
    devices = jax.devices()[: data * fsdp * model]
    mesh = make_mesh(data=data, fsdp=fsdp, model=model, devices=devices)
    state, losses = run(mesh, microbatches=microbatches)
    expected, expected_losses = reference_run()
    np.testing.assert_allclose(losses, expected_losses, rtol=2e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), variables_of(state), expected)


@pytest.mark.parametrize("optimizer", [optax.adamw(1e-2), optax.adafactor(1e-2, min_dim_size_to_factor=4)])
def test_optimizer_state_is_sharded_like_its_parameters(optimizer):
    mesh = make_mesh(data=2, fsdp=2, model=2)
    state, _ = run(mesh, optimizer=optimizer, steps=1)
    for name in ("up", "down"):
        assert not state.params[name].sharding.is_fully_replicated
    whole = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.size >= HIDDEN * 8]
    assert all(not leaf.sharding.is_fully_replicated for leaf in whole)
    assert not state.reference["up"].sharding.is_fully_replicated
    alone, _ = run(one_device(), optimizer=optimizer, steps=1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.params, alone.params)


def test_factored_moments_keep_the_spec_of_the_dimension_that_is_left():
    mesh = make_mesh(data=2, fsdp=2, model=2)
    state, _ = run(mesh, optimizer=optax.adafactor(1e-2, min_dim_size_to_factor=4), steps=1)
    specs = {
        jax.tree_util.keystr(path): leaf.sharding.spec
        for path, leaf in jax.tree_util.tree_flatten_with_path(state.opt_state)[0]
    }
    row = next(spec for name, spec in specs.items() if "v_row" in name and "up" in name)
    column = next(spec for name, spec in specs.items() if "v_col" in name and "up" in name)
    assert {row, column} == {P("fsdp"), P("model")}


def test_no_involuntary_full_rematerialization(capfd):
    mesh = make_mesh(data=2, fsdp=2, model=2)
    optimizer = optax.adamw(1e-2)
    state = init_state(plain_variables(), optimizer, jax.random.key(0))
    step, state = compile_step(
        make_train_step(pair_objective, plain_apply, optimizer, microbatches=2), state, mesh, RULES
    )
    step.lower(state, shard_batch(make_batch(0), mesh)).compile()
    assert "rematerialization" not in capfd.readouterr().err


def test_linen_model_trains():
    class Scorer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(1, name="down")(jnp.tanh(nn.Dense(HIDDEN, name="up")(x)))[..., 0]

    module = Scorer()
    variables = module.init(jax.random.key(1), jnp.zeros((1, WIDTH)))
    assert falls(module.apply, variables)


def test_equinox_model_trains():
    network = eqx.nn.MLP(WIDTH, "scalar", HIDDEN, 1, key=jax.random.key(1))
    variables, static = eqx.partition(network, eqx.is_array)

    def apply_fn(variables, x):
        return jax.vmap(eqx.combine(variables, static))(x)

    assert falls(apply_fn, variables)


def falls(apply_fn, variables):
    """Train a model of another library on a mesh, only its first layer frozen; whether the loss fell."""
    mesh = make_mesh(data=2, fsdp=2, model=2)
    optimizer = optax.adamw(3e-2)
    names = [name for name in _names(variables) if "bias" not in name]
    state = init_state(variables, optimizer, jax.random.key(0), trainable=lambda name: name in names)
    before = jax.tree.map(np.asarray, state.frozen)
    step, state = compile_step(make_train_step(pair_objective, apply_fn, optimizer), state, mesh, RULES)
    losses = []
    batches = (shard_batch(make_batch(i), mesh) for i in range(20))
    state = fit(step, state, batches, steps=20, every=((1, lambda n, s, m: losses.append(float(m["loss"]))),))
    jax.tree.map(np.testing.assert_array_equal, state.frozen, before)
    assert losses[0] == pytest.approx(np.log(2), abs=1e-6)
    return np.mean(losses[-5:]) < np.mean(losses[1:4])


def _names(variables):
    from dpo_jax.tree import named_leaves

    return list(named_leaves(variables))


@pytest.mark.parametrize("rate", [0.0, 0.6, 1.0])
def test_moving_reference(rate):
    """Every second step the reference moves towards the policy: rate 0 leaves it, rate 1 copies the policy."""
    states = []
    optimizer = optax.sgd(0.5)
    state = init_state(plain_variables(), optimizer, jax.random.key(0), reference=plain_variables(1))
    step = make_train_step(pair_objective, plain_apply, optimizer, reference_update=ReferenceUpdate(rate=rate, every=2))
    for i in range(3):
        state, _ = jax.jit(step)(state, make_batch(i))
        states.append(state)
    start = plain_variables(1)["up"]
    np.testing.assert_array_equal(states[0].reference["up"], start)
    expected = (1 - rate) * start + rate * states[1].params["up"]
    np.testing.assert_allclose(states[1].reference["up"], expected, atol=1e-6)
    np.testing.assert_array_equal(states[2].reference["up"], states[1].reference["up"])


def test_moving_average_of_parameters():
    optimizer = optax.sgd(0.5)
    state = init_state(plain_variables(), optimizer, jax.random.key(0), ema=True)
    step = jax.jit(make_train_step(pair_objective, plain_apply, optimizer, ema_decay=0.9))
    expected = np.asarray(plain_variables()["up"], np.float64)
    for i in range(3):
        state, _ = step(state, make_batch(i))
        expected = 0.9 * expected + 0.1 * np.asarray(state.params["up"], np.float64)
    np.testing.assert_allclose(state.ema["up"], expected, atol=1e-6)


def test_bfloat16_parameters_accumulate_in_float32():
    """Sixteen microbatches of bfloat16 gradients add up as one batch does, to bfloat16's own rounding."""
    variables = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), plain_variables())
    optimizer = optax.sgd(1.0)
    outcomes = []
    for microbatches in (1, 16):
        state = init_state(variables, optimizer, jax.random.key(0), reference=False)
        step = jax.jit(make_train_step(pair_objective, plain_apply, optimizer, microbatches=microbatches))
        outcomes.append(step(state, make_batch(0))[1]["gradient_norm"])
    assert abs(float(outcomes[0]) - float(outcomes[1])) < 0.01 * float(outcomes[0])


def test_batch_without_weights_counts_every_example_once():
    batch = make_batch(0)
    bare = {name: value for name, value in batch.items() if name != "weight"}
    optimizer = optax.sgd(0.1)
    state = init_state(plain_variables(), optimizer, jax.random.key(0), reference=plain_variables(1))
    outcomes = []
    for given, microbatches in ((batch, 1), (bare, 1), (bare, 4)):
        step = jax.jit(make_train_step(pair_objective, plain_apply, optimizer, microbatches=microbatches))
        after, metrics = step(state, given)
        outcomes.append((float(metrics["loss"]), float(metrics["examples"]), after.params))
    for loss, count, params in outcomes[1:]:
        assert (loss, count) == (pytest.approx(outcomes[0][0], rel=1e-6), 16)
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), params, outcomes[0][2])


def test_batch_of_empty_places_changes_nothing():
    optimizer = optax.sgd(0.1)
    state = init_state(plain_variables(), optimizer, jax.random.key(0), reference=False)
    after, metrics = jax.jit(make_train_step(pair_objective, plain_apply, optimizer))(state, make_batch(0, empty=16))
    assert float(metrics["loss"]) == 0 and float(metrics["gradient_norm"]) == 0
    jax.tree.map(np.testing.assert_array_equal, after.params, state.params)


def test_loss_state_passes_through_steps_and_microbatches():
    def counting(policy, reference, batch, key, loss_state):
        output = pair_objective(policy, None, batch, key, None)
        return output._replace(state=loss_state + batch["weight"].sum())

    optimizer = optax.sgd(0.1)
    state = init_state(plain_variables(), optimizer, jax.random.key(0), reference=False, loss_state=jnp.zeros(()))
    step = jax.jit(make_train_step(counting, plain_apply, optimizer, microbatches=4))
    for i in range(3):
        state, _ = step(state, make_batch(i))
    assert float(state.loss_state) == 48


def test_rows_that_do_not_divide_are_refused():
    optimizer = optax.sgd(0.1)
    state = init_state(plain_variables(), optimizer, jax.random.key(0), reference=False)
    step = make_train_step(pair_objective, plain_apply, optimizer, microbatches=3)
    with pytest.raises(ValueError, match="16 is not a multiple of 3 microbatches"):
        step(state, make_batch(0))


def test_evaluation_weighs_examples_over_ragged_batches():
    mesh = make_mesh(data=8)
    optimizer = optax.sgd(0.1)
    state = init_state(plain_variables(), optimizer, jax.random.key(0), reference=plain_variables(1))
    _, state = compile_step(make_train_step(pair_objective, plain_apply, optimizer), state, mesh, RULES)
    step = compile_eval_step(make_eval_step(pair_objective, plain_apply), state, mesh, RULES)
    batches = [make_batch(0), make_batch(1, empty=13)]
    result = evaluate_batches(step, state, (shard_batch(b, mesh) for b in batches))
    losses = []
    for batch in batches:
        keep = batch["weight"] > 0

        def gap(v, batch=batch, keep=keep):
            return np.asarray(plain_apply(v, batch["chosen"][keep]) - plain_apply(v, batch["rejected"][keep]))

        losses.append(np.logaddexp(0, -(gap(plain_variables()) - gap(plain_variables(1)))))
    assert result["examples"] == 19
    assert result["loss"] == pytest.approx(np.concatenate(losses).mean(), rel=1e-5)


def test_needs_of_a_compiled_step_count_each_part():
    mesh = make_mesh(fsdp=4, devices=jax.devices()[:4], data=1)
    optimizer = optax.adamw(1e-2)
    state = init_state(plain_variables(), optimizer, jax.random.key(0))
    step, state = compile_step(make_train_step(pair_objective, plain_apply, optimizer), state, mesh, RULES)
    batch = shard_batch(make_batch(0), mesh)
    needs = step_needs(step.lower(state, batch).compile(), state, batch)
    sharded = 4 * (WIDTH * HIDDEN + HIDDEN * 8) // 4
    assert needs.policy == needs.reference == sharded + 4 * HIDDEN
    assert needs.optimizer == 2 * needs.policy + 4
    assert needs.batch == 4 * (2 * 16 * WIDTH + 16) // 4
    assert needs.collectives and needs.total > needs.policy + needs.reference + needs.optimizer


def test_eight_devices_are_forced():
    assert len(jax.devices()) == 8, os.environ["XLA_FLAGS"]

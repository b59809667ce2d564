"""What a loss's names and its inputs compute: draws, sides, levels, columns, gradients, microbatches, devices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_model

from dpo_jax.diffusion.errors import Inputs, noised_inputs
from dpo_jax.diffusion.methods import diffusion_dpo_loss
from dpo_jax.diffusion.objectives import column_names, form_of, from_loss, needs_reference, origin, reads_trajectories
from dpo_jax.diffusion.process import Process, level_of
from dpo_jax.diffusion.schedule import predicts_flow, predicts_noise, predicts_velocity, scaled_linear_schedule, snr
from dpo_jax.diffusion.types import DiffusionBatch
from dpo_jax.sharding import make_mesh, shard_batch
from dpo_jax.train import compile_step, init_state, make_train_step
from dpo_jax.types import LossOutput

# Tests compile much and compute little.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
SD = scaled_linear_schedule()
PROCESS = Process(predicts_noise, SD, empty=jnp.zeros((1, 4)))
SHAPE = (3, 5, 4)
KEY = jax.random.key(7)
POLICY, REFERENCE = (partial(tiny_model.predict, tiny_model.variables(seed)) for seed in (0, 1))


MODELS = {"policy": POLICY, "reference": REFERENCE}


def batch_of(rows=6, images=2, *, seed=0, shape=SHAPE, spread=None, seeds=None, **columns):
    rng = np.random.default_rng(seed)
    return DiffusionBatch(
        latents=rng.normal(size=(rows, images, *shape)).astype(np.float32),
        condition=rng.normal(size=(rows, 1, 4)).astype(np.float32),
        weight=np.ones(rows, np.float32),
        columns={name: np.asarray(x) for name, x in columns.items()},
        spread=spread,
        seeds=None if seeds is None else np.asarray(seeds, np.uint32),
    )


def run(loss, policy, reference, batch, key=KEY, process=PROCESS, **options):
    objective = from_loss(loss, process, **options)
    return jit(lambda batch, key: objective(policy, reference, batch, key))(batch, key)


def refuse(*_):
    raise AssertionError("this model must not run")


def output(**metrics):
    rows = next(iter(metrics.values())).shape[0]
    return LossOutput(jnp.zeros(rows), metrics)


def seen(batch, process=PROCESS, key=KEY, *, own=False, **options):
    """What the inputs are given: a dict of arrays [B, K, ...]."""

    def shared_inputs(*, clean, noise, times, condition, process):
        return Inputs(clean, times, noise, condition)

    def own_inputs(*, clean, own_noise, times, condition, process):
        return Inputs(clean, times, own_noise, condition)

    def said(latents, times, condition):
        kept.update(clean=latents, times=times, condition=condition)
        return latents

    def loss(*, policy_error, target):
        return LossOutput(policy_error, {**kept, "noise": target})

    kept = {}
    given = run(loss, said, None, batch, key, process, inputs=own_inputs if own else shared_inputs, **options).metrics
    rows, images = batch.latents.shape[:2]
    shapes = {name: (rows, images, *(x.shape[2:] if name == "noise" else x.shape[1:])) for name, x in given.items()}
    return {name: np.asarray(x).reshape(shapes[name]) for name, x in given.items()}


# Names


@pytest.mark.parametrize(
    "name, wanted",
    [
        ("policy_chosen_error", ("policy", "error", "chosen")),
        ("reference_rejected_frame_error", ("reference", "frame_error", "rejected")),
        ("policy_entity_error_map", ("policy", "error_map", "entity")),
        ("reference_mismatched_error", ("reference", "error", "mismatched")),
        ("policy_error", ("policy", "error", None)),
        ("policy_chosen_pred", ("policy", "pred", "chosen")),
        ("policy_step_logps", ("policy", "step_logps", None)),
        ("chosen_step_gap", ("both", "step_gap", "chosen")),
        ("chosen_target", ("inputs", "target", "chosen")),
        ("step_stds", ("steps", "step_stds", None)),
        ("log_snr", ("level", "log_snr", None)),
        ("chosen_score", ("column", "chosen_score", None)),
        ("policy_middle_error", ("column", "policy_middle_error", None)),
        ("policy_error_of_mine", ("column", "policy_error_of_mine", None)),
    ],
)
def test_names_say_where_arrays_come_from(name, wanted):
    assert tuple(origin(name)) == wanted


def test_form_reference_and_columns_are_read_from_the_names():
    def single_loss(*, policy_image_error, labels): ...
    def steps_loss(*, policy_chosen_step_logps, policy_rejected_step_logps, advantages): ...
    def mixed_loss(*, policy_chosen_error, policy_image_error): ...
    def list_loss(*, policy_error, scores): ...
    def inverted_inputs(*, clean, times, condition, process, reference, quality): ...

    assert form_of(diffusion_dpo_loss) == form_of(steps_loss) == "pairs"
    assert form_of(single_loss) == "singles" and form_of(list_loss) == "lists"
    assert reads_trajectories(steps_loss) and not reads_trajectories(single_loss)
    assert needs_reference(diffusion_dpo_loss) and not needs_reference(single_loss)
    assert needs_reference(single_loss, inverted_inputs)
    both = ("reference_chosen_error", "reference_rejected_error")
    assert not needs_reference(diffusion_dpo_loss, columns=both)
    assert column_names(single_loss) == ("labels",)
    assert column_names(list_loss, inverted_inputs) == ("scores", "quality")
    with pytest.raises(TypeError, match="chosen"):
        form_of(mixed_loss)


# Draws


@pytest.mark.parametrize("own", [False, True], ids=["noise", "own_noise"])
def test_images_of_a_row_share_the_timestep_and_the_noise_unless_it_is_their_own(own):
    batch = batch_of(rows=500, images=3, shape=(4,))
    given = seen(batch, own=own)
    noise, times = np.asarray(given["noise"]), np.asarray(given["times"])
    np.testing.assert_array_equal(given["clean"], batch.latents)
    assert np.ptp(times, axis=1).max() == 0 and len(np.unique(times[:, 0])) > 300
    correlation = np.corrcoef(noise[:, 0].ravel(), noise[:, 1].ravel())[0, 1]
    if own:
        assert abs(correlation) < 0.1
    else:
        np.testing.assert_array_equal(noise[:, 0], noise[:, 1])
    flat = (noise if own else noise[:, 0]).ravel()
    assert abs(flat.mean()) < 5 / np.sqrt(flat.size) and abs(flat.std() - 1) < 5 / np.sqrt(2 * flat.size)
    rows = np.corrcoef(noise[:-1, 0].ravel(), noise[1:, 0].ravel())[0, 1]
    assert abs(rows) < 0.12


def test_the_condition_of_a_row_is_that_of_all_its_images():
    batch = batch_of(images=3)
    given = seen(batch)
    np.testing.assert_array_equal(given["condition"], np.repeat(batch.condition, 3, axis=1))


def test_other_keys_give_other_draws_and_the_same_key_the_same():
    batch = batch_of()
    first, again, other = (seen(batch, key=jax.random.key(seed)) for seed in (0, 0, 1))
    for name in ("noise", "times"):
        np.testing.assert_array_equal(first[name], again[name])
        assert not np.array_equal(first[name], other[name])


@pytest.mark.parametrize("own", [False, True])
def test_a_row_with_a_seed_draws_the_same_in_any_batch_under_any_key(own):
    spread = np.ones((6, 2, *SHAPE), np.float32)
    batch = batch_of(spread=spread, seeds=[7, 3, 2**32 - 1, 0, 3, 12])
    whole = seen(batch, own=own, offset_noise=0.5)
    order = np.array([4, 2, 0])
    part = seen(jax.tree.map(lambda leaf: leaf[order], batch), own=own, key=jax.random.key(8), offset_noise=0.5)
    for name in ("clean", "noise", "times"):
        np.testing.assert_array_equal(part[name], whole[name][order])
    np.testing.assert_array_equal(whole["noise"][1], whole["noise"][4])
    assert len({float(row.ravel()[0]) for row in whole["noise"]}) == 5


def test_what_inputs_draw_of_their_own_follows_the_seed_and_differs_between_images():
    def inputs(*, clean, noise, times, condition, process, key):
        return Inputs(clean, times, jax.vmap(lambda one: jax.random.normal(one, SHAPE))(key), condition)

    def loss(*, policy_error, target):
        return output(drawn=target)

    batch = batch_of(seeds=np.arange(6))
    whole = run(loss, POLICY, None, batch, inputs=inputs).metrics["drawn"]
    part = run(loss, POLICY, None, jax.tree.map(lambda leaf: leaf[3:], batch), inputs=inputs, key=jax.random.key(1))
    np.testing.assert_array_equal(part.metrics["drawn"], whole[3:])
    assert np.unique(np.asarray(whole).reshape(12, -1)[:, 0]).size == 12


def test_noise_of_a_row_and_of_each_image_are_independent():
    """Inputs that ask for both must not get the same numbers twice."""

    def both(*, clean, noise, own_noise, times, condition, process):
        return Inputs(noise, times, own_noise, condition)

    def loss(*, policy_pred, target):
        return LossOutput(policy_pred, {"target": target})

    batch = batch_of(rows=400, images=1, shape=(4,))
    given = run(loss, lambda x, t, c: x, None, batch, inputs=both)
    assert abs(np.corrcoef(np.ravel(given.loss), np.ravel(given.metrics["target"]))[0, 1]) < 0.12


def test_latents_are_drawn_from_the_autoencoders_posterior():
    spread = np.full((400, 2, 8, 4), 0.5, np.float32)
    batch = batch_of(rows=400, shape=(8, 4), spread=spread)
    drawn = np.asarray(seen(batch)["clean"]) - batch.latents
    assert abs(drawn.std() - 0.5) < 0.02 and abs(drawn.mean()) < 0.02
    assert abs(np.corrcoef(drawn[:, 0].ravel(), drawn[:, 1].ravel())[0, 1]) < 0.05
    other = np.asarray(seen(batch, key=jax.random.key(8))["clean"]) - batch.latents
    assert abs(np.corrcoef(drawn.ravel(), other.ravel())[0, 1]) < 0.05


@pytest.mark.parametrize("own", [False, True], ids=["noise", "own_noise"])
def test_offset_noise_shifts_whole_channels(own):
    batch = batch_of(rows=300, shape=(16, 16, 4))
    plain, shifted = (np.asarray(seen(batch, own=own, offset_noise=s)["noise"]) for s in (0.0, 0.5))
    shift = shifted - plain
    assert np.ptp(shift, axis=(2, 3)).max() < 1e-5
    assert abs(shift[:, :, 0, 0].std() - 0.5) < 0.05
    same = np.allclose(shift[:, 0], shift[:, 1])
    assert same != own


# What the loss is given


def everything(
    *,
    policy_chosen_error,
    policy_rejected_error,
    reference_rejected_error,
    policy_rejected_pred,
    rejected_target,
    timesteps,
    alphas_cumprod,
    sigmas,
    log_snr,
    chosen_score,
    key,
):
    metrics = {name: value for name, value in locals().items() if name not in ("key", "metrics")}
    return LossOutput(jax.random.uniform(key, timesteps.shape), metrics)


@pytest.mark.parametrize("process", [PROCESS, Process(predicts_flow, shift=3.0), Process(predicts_velocity, SD)])
def test_arrays_are_those_of_their_side_and_row(process):
    batch = batch_of(chosen_score=np.arange(6.0))
    given = run(everything, POLICY, REFERENCE, batch, process=process).metrics
    draws = seen(batch, process)
    level = level_of(process, draws["times"][:, 0])
    for side, model, index in (("chosen", "policy", 0), ("rejected", "policy", 1), ("rejected", "reference", 1)):
        inputs = noised_inputs(
            clean=draws["clean"][:, index],
            noise=draws["noise"][:, index],
            times=draws["times"][:, index],
            condition=jnp.asarray(batch.condition[:, 0]),
            process=process,
        )
        said = MODELS[model](inputs.latents, inputs.times, inputs.condition)
        error = np.mean(np.square(np.asarray(said, np.float64) - np.asarray(inputs.target)), axis=(1, 2, 3))
        np.testing.assert_allclose(given[f"{model}_{side}_error"], error, rtol=1e-5)
        if (side, model) == ("rejected", "policy"):
            np.testing.assert_allclose(given["policy_rejected_pred"], said, atol=1e-5)
            np.testing.assert_allclose(given["rejected_target"], inputs.target, atol=1e-5)
    np.testing.assert_allclose(given["timesteps"], draws["times"][:, 0], rtol=1e-6)
    np.testing.assert_allclose(given["alphas_cumprod"], np.square(level.alpha), rtol=1e-5)
    np.testing.assert_allclose(given["sigmas"], level.sigma, rtol=1e-6)
    np.testing.assert_allclose(given["log_snr"], np.log(snr(level)), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(given["chosen_score"], np.arange(6.0))


def test_lists_get_all_their_images_and_frames_their_own_errors():
    def loss(*, policy_error, policy_frame_error, reference_error_map):
        return LossOutput(policy_error.sum(-1), dict(frames=policy_frame_error, places=reference_error_map))

    batch = batch_of(images=3, shape=(2, 5, 4))
    out = run(loss, POLICY, REFERENCE, batch)
    assert out.loss.shape == (6,)
    assert out.metrics["frames"].shape == (6, 3, 2) and out.metrics["places"].shape == (6, 3, 2, 5)
    np.testing.assert_allclose(out.metrics["frames"].mean(-1).sum(-1), out.loss, rtol=1e-5)


def test_a_column_wins_over_a_computation():
    given = np.linspace(0.1, 0.6, 6).astype(np.float32)
    batch = batch_of(reference_chosen_error=given, reference_rejected_error=given)
    out = run(diffusion_dpo_loss, POLICY, refuse, batch, beta=2.0)
    free = run(diffusion_dpo_loss, POLICY, None, batch, beta=2.0)
    np.testing.assert_array_equal(out.loss, free.loss)

    def plain(*, policy_chosen_error, policy_rejected_error):
        return LossOutput(policy_rejected_error - policy_chosen_error, {})

    np.testing.assert_allclose(out.metrics["margin"], run(plain, POLICY, None, batch).loss, atol=1e-5)


def test_gradients_flow_through_the_policy_alone():
    batch = batch_of()
    objective = from_loss(diffusion_dpo_loss, PROCESS, beta=10.0)

    def total(params, reference, latents):
        models = (partial(tiny_model.predict, p) for p in (params, reference))
        moved = DiffusionBatch(latents, batch.condition, batch.weight, batch.columns)
        return objective(*models, moved, KEY).loss.sum()

    grads = jit(jax.grad(total, argnums=(0, 1, 2)))(
        tiny_model.variables(0), tiny_model.variables(1), jnp.asarray(batch.latents)
    )
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(grads[0]))
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(grads[1:]))


# Inputs of a paper's own


def test_a_trajectory_is_one_weighted_error_and_has_no_level():
    def inputs(*, clean, own_noise, times, condition, process, images, strength, key, points=2):
        assert images == 2 and strength.shape == (6,) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        return Inputs(
            jnp.stack([clean, own_noise]),
            jnp.stack([times] * points),
            jnp.stack([own_noise, clean]),
            condition,
            jnp.stack([jnp.repeat(strength, images), jnp.full(len(times), 0.5)]),
        )

    def loss(*, policy_chosen_error, policy_rejected_error):
        return output(chosen=policy_chosen_error, rejected=policy_rejected_error)

    def level(*, policy_chosen_error, policy_rejected_error, log_snr): ...

    batch = batch_of(strength=np.arange(6.0, dtype=np.float32))
    given = run(loss, POLICY, None, batch, inputs=inputs, points=2).metrics
    draws = seen(batch, own=True)
    condition = jnp.asarray(batch.condition[:, 0])
    for index, side in enumerate(("chosen", "rejected")):
        clean, noise, times = (draws[name][:, index] for name in ("clean", "noise", "times"))
        first, second = (np.asarray(POLICY(x, times, condition)) for x in (clean, noise))
        wanted = np.arange(6.0) * np.mean((first - noise) ** 2, (1, 2, 3))
        wanted += 0.5 * np.mean((second - clean) ** 2, (1, 2, 3))
        np.testing.assert_allclose(given[side], wanted, rtol=1e-5)
    with pytest.raises(TypeError, match="log_snr"):
        run(level, POLICY, None, batch, inputs=inputs)
    with pytest.raises(TypeError, match="strength"):
        run(loss, POLICY, None, batch_of(), inputs=inputs)


def test_inputs_may_run_the_reference_and_may_be_guided():
    def inputs(*, clean, noise, times, condition, process, reference, scale=2.0):
        made = noised_inputs(clean=clean, noise=noise, times=times, condition=condition, process=process)
        return made._replace(target=reference(made.latents, times, condition), guidance=scale)

    def loss(*, policy_chosen_error, policy_rejected_error):
        return LossOutput(policy_chosen_error, {})

    batch = batch_of()
    with pytest.raises(TypeError, match="reference"):
        run(loss, POLICY, None, batch, inputs=inputs)
    np.testing.assert_allclose(run(loss, POLICY, POLICY, batch, inputs=inputs, scale=1.0).loss, 0, atol=1e-9)
    assert run(loss, POLICY, POLICY, batch, inputs=inputs).loss.min() > 1e-4


# Errors


def test_what_is_missing_is_named():
    def scored_loss(*, policy_chosen_error, policy_rejected_error, chosen_score): ...

    with pytest.raises(TypeError, match=r"chosen_score.*\['other'\]"):
        run(scored_loss, POLICY, None, batch_of(other=np.ones(6)))
    with pytest.raises(TypeError, match="no columns"):
        run(scored_loss, POLICY, None, batch_of())
    with pytest.raises(TypeError, match="reference"):
        run(diffusion_dpo_loss, POLICY, None, batch_of())
    with pytest.raises(TypeError, match="3 images"):
        run(diffusion_dpo_loss, POLICY, REFERENCE, batch_of(images=3))
    with pytest.raises(TypeError, match="bata"):
        from_loss(diffusion_dpo_loss, PROCESS, bata=1.0)


# Training


def trained(mesh, batch, microbatches=1, steps=3):
    objective = from_loss(diffusion_dpo_loss, Process(predicts_velocity, SD), beta=20.0)
    rule = optax.sgd(0.5)
    step = make_train_step(objective, tiny_model.predict, rule, microbatches=microbatches)
    state = init_state(tiny_model.variables(0), rule, jax.random.key(3))
    step, state = compile_step(step, state, mesh)
    metrics = {}
    for _ in range(steps):
        state, metrics = step(state, shard_batch(batch, mesh))
    return jax.device_get(state.params), jax.device_get(metrics)


def test_one_and_eight_devices_give_the_same_numbers():
    batch = batch_of(rows=16)
    batch.weight[3] = 0.0
    one, eight = (trained(make_mesh(devices=jax.devices()[:count]), batch) for count in (1, 8))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6), eight, one)
    assert one[1]["examples"] == 15
    moved = np.abs(one[0]["kernel"] - tiny_model.variables(0)["kernel"]).max()
    assert moved > 1e-3  # far above the tolerance


def test_an_empty_place_changes_nothing_whatever_it_holds():
    batch, other = batch_of(rows=8), batch_of(rows=8)
    for rows, value in ((batch, 0.0), (other, 1e4)):
        rows.weight[5], rows.latents[5] = 0.0, value
    mesh = make_mesh(devices=jax.devices()[:1])
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), trained(mesh, other), trained(mesh, batch))


def test_microbatches_of_rows_with_seeds_are_the_whole_batch():
    batch = batch_of(rows=8, seeds=np.arange(8))
    batch.weight[2] = 0.0
    mesh = make_mesh(devices=jax.devices()[:1])
    whole, parts = (trained(mesh, batch, microbatches=count) for count in (1, 4))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6), parts, whole)
    assert np.abs(whole[0]["kernel"] - tiny_model.variables(0)["kernel"]).max() > 1e-3  # far above the tolerance


def test_microbatches_without_seeds_are_the_mean_of_their_objectives():
    """Each draws with a key of its own."""
    batch = batch_of(rows=8)
    mesh = make_mesh(devices=jax.devices()[:1])
    params, metrics = trained(mesh, batch, microbatches=2, steps=1)
    objective = from_loss(diffusion_dpo_loss, Process(predicts_velocity, SD), beta=20.0)
    key = jax.random.fold_in(jax.random.key(3), 0)
    start = tiny_model.variables(0)

    def mean(params):
        total = 0.0
        for part in range(2):
            rows = jax.tree.map(lambda leaf, part=part: leaf[part::2], batch)
            models = (partial(tiny_model.predict, p) for p in (params, start))
            total += objective(*models, rows, jax.random.fold_in(key, part)).loss.mean() / 2
        return total

    loss, gradient = jit(jax.value_and_grad(mean))(start)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    for name in start:
        np.testing.assert_allclose(params[name], start[name] - 0.5 * gradient[name], rtol=1e-5, atol=1e-6)

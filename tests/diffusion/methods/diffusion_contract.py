"""What every loss of the diffusion wing must satisfy, written once: each check is a function of one loss.

A new loss needs no new code here unless it names a column that is not in COLUMNS yet; then it adds a line there. A loss
that names `loss_state` starts from `<loss>_state()` of its own module, as in the language wing.
"""

import sys
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from loss_contract import (
    GARBAGE,
    TOLERANCE,
    Arrays,
    B,
    Loss,
    as_32_bits,
    assert_computed_in_float32,
    assert_finite,
    assert_flow,
    assert_form,
    assert_output,
    assert_refuses_bad_values,
    assert_rows_apart,
    assert_same,
    compiled,
    is_batch_coupled,
    losses_of,
    mixed_rows,
    state_of,
)

import dpo_jax.diffusion.methods as methods
from dpo_jax.diffusion.errors import Inputs, noised_inputs
from dpo_jax.diffusion.objectives import column_names, form_of, from_loss, origin, reads_trajectories
from dpo_jax.diffusion.process import Process
from dpo_jax.diffusion.schedule import linear_schedule, predicts_noise
from dpo_jax.diffusion.step_objectives import from_step_loss
from dpo_jax.diffusion.transitions import ddim_steps
from dpo_jax.diffusion.types import IMAGES, DiffusionBatch, TrajectoryBatch
from dpo_jax.signatures import read_needs
from dpo_jax.types import LossOutput

K, F, S = 3, 4, 5  # images of a list, frames, steps
H, W, C = 4, 2, 3  # rows and columns of latents, channels
STEPS = 1000  # of the schedule's timesteps; papers that invert have grids of 10 to 80
Maker = Callable[[np.random.Generator], np.ndarray]


def _uniform(low: float, high: float, *shape: int) -> Maker:
    return lambda rng: rng.uniform(low, high, (B, *shape))


# What only the data can give: name -> maker of a [B, ...] array.
COLUMNS: dict[str, Maker] = {
    "labels": lambda rng: np.arange(B) % 2,
    "scores": lambda rng: rng.permuted(np.tile(np.linspace(0.0, 1.0, K), (B, 1)), axis=1),
    "chosen_score": _uniform(0.5, 2.0),
    "rejected_score": _uniform(-2.0, 0.4),
    "reward_gap": _uniform(0.1, 0.9),
    "old_step_logps": _uniform(-1.6, -1.2, S),
    "advantages": lambda rng: rng.normal(size=B),
    "entity_quality": _uniform(0.1, 0.9, H, W),
    "generated_quality": _uniform(0.1, 0.9, H, W),
    "preference": lambda rng: np.tile([1, -1, 0], B // 3),
    "sampled_latents": lambda rng: rng.normal(size=(B, H, W, C)),
    "sampled_noise": lambda rng: rng.normal(size=(B, H, W, C)),
    "sampled_times": lambda rng: rng.integers(0, STEPS, B).astype(float),
    "noise_scales": _uniform(0.3, 0.9, S),
    "segment_labels": lambda rng: rng.integers(-1, 2, (B, F)),
}
# Policy's arrays that a paper takes for constants: loss -> names.
STOPPED: dict[str, tuple[str, ...]] = {
    "diffusion_kto_mismatched_loss": ("policy_mismatched_error",),  # its reference point
    "sdpo_loss": ("policy_chosen_pred", "policy_rejected_pred"),  # its safeguard
}
# Hyper-parameters where the paper's hide an argument from float32, or ordinary arrays never get there: loss -> options.
OPTIONS: dict[str, dict[str, float]] = {"dspo_loss": {"beta": 1.0}, "dspo_threshold_loss": {"threshold": 0.01}}

SCHEDULE = linear_schedule(STEPS)
PROCESS = Process(predicts_noise, SCHEDULE, empty=np.zeros((1, 2), np.float32))


def find_losses() -> dict[str, Loss]:
    return losses_of(methods)


def inputs_of(loss: Loss) -> Callable[..., Inputs]:
    """The paper's own way to make noisy inputs, `<name>_inputs` of the same module, or the common one."""
    name = loss.__name__.removesuffix("_loss") + "_inputs"
    return getattr(sys.modules[loss.__module__], name, noised_inputs)


# Arrays


def ordinary(policy: np.ndarray, reference: np.ndarray, mark: np.ndarray) -> np.ndarray:
    return policy


def equal(policy: np.ndarray, reference: np.ndarray, mark: np.ndarray) -> np.ndarray:
    return reference


def zero(policy: np.ndarray, reference: np.ndarray, mark: np.ndarray) -> np.ndarray:
    return np.zeros_like(policy)


def tiny(policy: np.ndarray, reference: np.ndarray, mark: np.ndarray) -> np.ndarray:
    return np.full_like(policy, 1e-8)


def large(policy: np.ndarray, reference: np.ndarray, mark: np.ndarray) -> np.ndarray:
    """1e4 where marked and 0 elsewhere: margins of 1e4 both ways, and a last row in which all are 1e4."""
    mark = mark.copy()
    mark[-1] = True
    return np.where(mark, 1e4, 0.0).astype(policy.dtype)


def shape_of(name: str) -> tuple[int, ...]:
    """Shape of the array that an argument's name asks for, by the table of names."""
    source = origin(name)
    if source.statistic == "error":
        return (B,) if source.side else (B, K)
    shapes = {"frame_error": (F,), "error_map": (H, W), "pred": (H, W, C), "target": (H, W, C), "valid": (K,)}
    return (B, *shapes.get(source.statistic, (S,) if "step" in name.split("_") else ()))


def make_array(name: str, seed: int, policy: Callable) -> np.ndarray:
    """An ordinary value for one argument; what policy and reference say of one image differs by a thousandth."""

    def random(of: str) -> np.random.Generator:
        return np.random.default_rng([seed, zlib.crc32(of.encode())])

    if name in COLUMNS:
        return COLUMNS[name](random(name))
    source, shape = origin(name), shape_of(name)
    if name.startswith(("policy_", "reference_")) and source.maker != "column":
        # Predictions for the images of a row resemble each other, as those at one noise do.
        reference = _statistic(
            source.statistic, shape, random("pred" if source.statistic == "pred" else name.partition("_")[2])
        )
        if source.maker == "reference":
            return reference
        spread = 0.1 if source.statistic == "pred" else 1e-3
        index = np.arange(B).reshape(-1, *[1] * (len(shape) - 1)) + (
            source.side in ("rejected", "sampled", "generated")
        )
        mark = np.broadcast_to((index + (np.arange(shape[-1]) if len(shape) > 1 else 0)) % 2 == 0, shape)
        stray = reference + spread * random(name).normal(size=shape)
        value = policy(stray, reference, mark)
        if policy in (zero, tiny, large) and source.statistic == "step_logps":
            return -value
        return value / 100 if policy is large and source.statistic == "pred" else value  # squared it is 1e4
    # Levels end where float32 does in the hard cases.
    ends, inside = (np.arange(B) % 2).astype(float), policy is not large
    levels = {
        "timesteps": lambda: random(name).integers(0, 1000, B).astype(float) if inside else 999 * ends,
        "alphas_cumprod": lambda: random(name).uniform(0.1, 0.9, B) if inside else 1e-12 + ends * (1 - 1e-12),
        "sigmas": lambda: random(name).uniform(0.1, 0.9, B) if inside else ends,
        "log_snr": lambda: random(name).normal(0.0, 2.0, B) if inside else 138 * ends - 69,
        "step_stds": lambda: random(name).uniform(0.1, 0.9, shape),
        "weight": lambda: np.ones(B),
        "valid": lambda: 1.0 - (np.arange(B * K).reshape(B, K) % 7 == 4),  # two rows have lost one image
    }
    if source.statistic in levels:
        return levels[source.statistic]()
    if source.statistic == "target":
        return random(name).normal(size=shape)
    if source.statistic == "step_gap":
        return policy(random(name).gamma(2.0, 1e-3, shape), np.zeros(shape), np.arange(S) + np.zeros(shape) > 2)
    raise KeyError(f"no rule makes {name!r}: add it to COLUMNS in tests/diffusion/methods/diffusion_contract.py")


def _statistic(statistic: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    if statistic == "pred":
        return rng.normal(size=shape)
    if statistic == "step_logps":
        return -1.0 - rng.gamma(2.0, 0.2, shape)
    return rng.gamma(4.0, 0.1, shape)


def make_inputs(loss: Loss, *, policy: Callable = ordinary, seed: int = 0) -> Arrays:
    """Random arrays for every name in a loss's signature, float32 or int32."""
    return as_32_bits({name: make_array(name, seed, policy) for name in read_needs(loss).arrays})


def options_of(loss: Loss) -> dict[str, Any]:
    return OPTIONS.get(loss.__name__, {})


def run(loss: Loss, inputs: Arrays) -> tuple[LossOutput, Arrays]:
    return jax.device_get(compiled(loss, **options_of(loss))(inputs, state_of(loss)))


# Checks


def check_signature(loss: Loss) -> None:
    """The form of a loss, and of the function that makes its inputs; bad values of hyper-parameters are refused."""
    assert_form(loss, LossOutput)
    assert_form(inputs_of(loss), Inputs)
    assert_refuses_bad_values(loss, make_inputs(loss))


def check_output(loss: Loss) -> None:
    """Shapes and types; all ways to evaluate agree."""
    assert_output(loss, make_inputs, run, **options_of(loss))


def check_finite(loss: Loss) -> None:
    """Value, metrics and gradient stay finite: ordinary errors, the reference's, 0, 1e-8 and margins of +-1e4."""
    for policy in (ordinary, equal, zero, tiny, large):
        assert_finite(run(loss, make_inputs(loss, policy=policy)), policy.__name__)


def check_bfloat16(loss: Loss) -> None:
    """What models say in bfloat16 is computed in float32, large values too."""
    inputs = make_inputs(loss)
    of_models = [n for n in inputs if origin(n).maker in ("policy", "reference", "both", "inputs")]
    assert_computed_in_float32(loss, inputs, of_models, run, **options_of(loss))
    far = {n: v.astype(jnp.bfloat16) if n in of_models else v for n, v in make_inputs(loss, policy=large).items()}
    assert_finite(run(loss, far), "bfloat16 large")


def check_rows(loss: Loss) -> None:
    """Rows do not know each other, unless the docstring says so."""
    assert_rows_apart(loss, make_inputs, run)


def check_empty_places(loss: Loss) -> None:
    """A row of weight 0 counts for nothing in the statistics of a batch: without it the others' losses are equal."""
    if not is_batch_coupled(loss):
        return
    inputs = make_inputs(loss)
    assert "weight" in inputs, "a batch-coupled loss takes the rows' weight, 0 at empty places"
    there = np.arange(B) < B - 1
    mixed = mixed_rows(there, inputs, make_inputs(loss, policy=large, seed=1))
    with_empty, gradient = run(loss, {**mixed, "weight": there.astype(np.float32)})
    without, short_gradient = run(loss, {n: v[:-1] for n, v in inputs.items()})
    assert_finite((with_empty, gradient), "with an empty place")
    np.testing.assert_allclose(with_empty.loss[:-1], without.loss, **TOLERANCE)
    for name in gradient:
        np.testing.assert_allclose(gradient[name][:-1], short_gradient[name], err_msg=name, **TOLERANCE)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **TOLERANCE), with_empty.state, without.state)
    assert_finite(run(loss, {**inputs, "weight": np.zeros(B, np.float32)}), "all places empty")


def check_absent_images(loss: Loss) -> None:
    """What stands at an image that a list has not changes neither value, nor metrics, nor gradient."""
    inputs = make_inputs(loss)
    if "valid" not in inputs:
        return
    absent = inputs["valid"] == 0
    spoiled = {
        n: np.where(absent, np.resize(GARBAGE, v.shape), v) if v.shape == (B, K) else v for n, v in inputs.items()
    }
    output, gradient = run(loss, inputs)
    other, other_gradient = run(loss, {**spoiled, "valid": inputs["valid"]})
    assert_same(other, output)
    for name in gradient:
        np.testing.assert_array_equal(other_gradient[name], gradient[name], err_msg=name)
        if gradient[name].shape == absent.shape:
            assert (gradient[name][absent] == 0).all(), f"gradient of {name} at an absent image"
    assert_finite(run(loss, {**inputs, "valid": np.zeros_like(inputs["valid"])}), "all images absent")


def check_constants(loss: Loss) -> None:
    """Nothing flows into reference, columns, levels and weights; some into each of the policy's arrays."""

    def learns(name: str) -> bool | None:
        maker = "column" if name in COLUMNS else origin(name).maker
        if maker in ("policy", "both") and name not in STOPPED.get(loss.__name__, ()):
            return True
        return None if maker == "inputs" else False  # targets belong to no model, whose gradient is nobody's

    assert_flow(run(loss, make_inputs(loss))[1], learns)


def check_every_array_matters(loss: Loss) -> None:
    """Each array that the signature asks for (and somebody pays for) changes the loss or its gradient."""
    inputs = make_inputs(loss)
    before, slope = run(loss, inputs)
    for name, value in inputs.items():
        changed = value - 0.3 * (1 + np.random.default_rng(2).random(value.shape))
        if name == "labels":
            changed = 1 - value
        elif value.dtype == np.int32 or name == "scores":  # of which some losses read the order alone
            changed = -value
        elif name in ("weight", "valid"):
            changed = value * (np.arange(B).reshape(-1, *[1] * (value.ndim - 1)) != 0)
        after, other = run(loss, {**inputs, name: changed.astype(value.dtype)})
        moved = np.abs(after.loss - before.loss).max()
        scales = name in STOPPED.get(loss.__name__, ()) or origin(name).maker in ("inputs", "batch")
        if scales:  # a gradient, if not the loss; that of the first row is gone with its weight
            moved = max([moved, *(np.abs(other[n] - slope[n])[1:].max() for n in slope)])
        assert moved > 1e-5, f"{name} changes nothing"


def check_objective(loss: Loss) -> None:
    """Joined to models it gives losses [B] and a finite gradient that is not zero, with no more than its names ask."""
    columns = as_32_bits({n: COLUMNS[n](np.random.default_rng(0)) for n in column_names(loss, inputs_of(loss))})
    objective: Callable[..., LossOutput]
    if reads_trajectories(loss):
        objective, batch = from_step_loss(loss, PROCESS), _trajectories(loss, columns)
    else:
        objective, batch = from_loss(loss, PROCESS, inputs=inputs_of(loss)), _images(loss, columns)

    def model(scale):
        def predict(latents, times, condition):
            told = jnp.sum(condition, axis=-1) + times / STEPS
            return jnp.tanh(scale * latents + told.reshape(-1, *[1] * (latents.ndim - 1)))

        return predict

    def total(scale):
        output = objective(model(scale), model(0.4), batch, jax.random.key(0), state_of(loss).get("loss_state"))
        return jnp.sum(output.loss), output

    (_, output), slope = jax.jit(jax.value_and_grad(total, has_aux=True))(0.401)
    assert output.loss.shape == (B,) and output.loss.dtype == jnp.float32
    assert_finite((output, slope), "objective")
    assert slope != 0, "no gradient reaches the model"


def _images(loss: Loss, columns: Arrays) -> DiffusionBatch:
    images = len(IMAGES[form_of(loss)]) or K
    frames = (F,) if any(origin(n).statistic == "frame_error" for n in read_needs(loss).arrays) else ()
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(B, images, *frames, H, W, C)).astype(np.float32)
    condition = rng.normal(size=(B, images, 2)).astype(np.float32)
    return DiffusionBatch(latents, condition, np.ones(B, np.float32), columns)


def _trajectories(loss: Loss, columns: Arrays) -> TrajectoryBatch:
    images = len(IMAGES[form_of(loss)]) or 1
    rng = np.random.default_rng(0)
    steps = ddim_steps(SCHEDULE, np.arange(S, 0, -1) * STEPS // S - 1, eta=1.0)
    steps = jax.tree.map(lambda table: np.tile(table, (B, 1)), steps)
    latents = rng.normal(size=(B, images, S + 1, H, W, C)).astype(np.float32)
    condition = rng.normal(size=(B, images, 2)).astype(np.float32)
    return TrajectoryBatch(latents, steps, condition, np.ones(B, np.float32), columns)


CHECKS = (
    check_signature,
    check_output,
    check_finite,
    check_bfloat16,
    check_rows,
    check_empty_places,
    check_absent_images,
    check_constants,
    check_every_array_matters,
    check_objective,
)

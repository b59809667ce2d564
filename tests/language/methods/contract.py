"""What every loss of the language wing must satisfy, written once: each check is a function of one loss.

A new loss needs no new code here unless it names an array that the rules of `make_array` do not know; then it adds a
line to COLUMNS. A loss that names `loss_state` starts from `<loss>_state()` of its own module (bco_loss: bco_state).
"""

import re
import zlib
from collections.abc import Callable

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
    state_of,
)

import dpo_jax.language.methods as methods
from dpo_jax.signatures import read_needs
from dpo_jax.types import LossOutput

K, T = 3, 5  # completions, tokens


def _numbers(*shape: int) -> Callable[[np.random.Generator], np.ndarray]:
    return lambda rng: rng.normal(0.0, 1.0, (B, *shape))


def _shares(*shape: int) -> Callable[[np.random.Generator], np.ndarray]:
    return lambda rng: rng.uniform(0.05, 0.95, (B, *shape))


# Arrays that only one paper knows: name -> maker of a [B, ...] array. Per-token ones are found by their shape.
COLUMNS: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "labels": lambda rng: np.arange(B) % 2,
    "scores": _numbers(K),
    "target_probs": lambda rng: rng.dirichlet(np.ones(K), B),
    "chosen_score": lambda rng: rng.uniform(0.5, 2.0, B),
    "rejected_score": lambda rng: rng.uniform(-2.0, 0.4, B),
    "chosen_win_prob": _shares(),
    "rejected_win_prob": _shares(),
    "label_prob": _shares(),
    "margin": _numbers(),
    "prob_desirable": _shares(),
    "step_similarity": lambda rng: rng.uniform(-1.0, 1.0, (B, K, K, 3)),
    "calibration": lambda rng: rng.gamma(2.0, 0.5, B),
    "semantic_distance": lambda rng: rng.uniform(0.0, 2.0, B),
    "is_tie": lambda rng: (np.arange(B) % 3 == 0).astype(np.int32),
    "is_adversarial": lambda rng: (np.arange(B) % 3 == 0).astype(np.int32),
}


def find_losses() -> dict[str, Loss]:
    return losses_of(methods)


# Inputs


def mask_of(name: str) -> str:
    """The mask that belongs to a per-token array: policy_chosen_logps -> chosen_mask, policy_logps -> mask."""
    side = re.sub("^(policy|reference|guidance|contrastive)_", "", name)
    side = side.removesuffix("step_ids").rstrip("_") if side.endswith("step_ids") else side.rpartition("_")[0]
    return f"{side}_mask" if side else "mask"


def ragged(shape: tuple[int, ...], rng: np.random.Generator, number: int) -> np.ndarray:
    """Masks of 1 to T tokens, one of the longest with a hole."""
    length = rng.integers(1, T, shape[:-1])
    length[0] = T
    mask = np.arange(T) < length[..., None]
    mask[0, ..., 2] = False
    return mask


def one_token(shape: tuple[int, ...], rng: np.random.Generator, number: int) -> np.ndarray:
    return np.broadcast_to(np.arange(T) == 0, shape).copy()


def some_empty(shape: tuple[int, ...], rng: np.random.Generator, number: int) -> np.ndarray:
    """Ragged masks; row `number` loses this completion, the last row all of them, row 1 of a list only the first."""
    mask = ragged(shape, rng, number)
    mask[-1] = False
    mask[number] = False
    if len(shape) == 3:
        mask[1, 0] = False
    return mask


def ordinary(logps: np.ndarray, mask: np.ndarray, rejected: bool) -> np.ndarray:
    return logps


def extreme(logps: np.ndarray, mask: np.ndarray, rejected: bool) -> np.ndarray:
    """Policy sums near 0 or of -1e4: margins of 1e4 both ways, and a last row with every completion at -1e4."""
    index = np.arange(B)[:, None, None] + np.arange(K)[None, :, None] if mask.ndim == 3 else np.arange(B)[:, None]
    low = (index + rejected) % 2 == 0
    low[-1] = True
    value = np.where(low, -1e4 / np.maximum(mask.sum(-1, keepdims=True), 1), -1e-3)
    return np.broadcast_to(value, mask.shape)


def make_array(name: str, mask: np.ndarray | None, rng: np.random.Generator) -> np.ndarray:
    """An ordinary value for one argument, by the table of names; per-token ones have the shape of their mask."""
    if name in COLUMNS:
        return COLUMNS[name](rng)
    if name.startswith("policy_") and name.endswith("_reward"):  # of a reward model: one number per completion
        return rng.normal(0.0, 1.0, (B, K) if name == "policy_reward" else (B,))
    if mask is None:
        raise KeyError(f"no rule makes the array {name!r}: add it to COLUMNS in tests/language/methods/contract.py")
    if name.endswith("step_ids"):
        return np.where(mask, np.cumsum(rng.random(mask.shape) < 0.5, -1), -1).astype(np.int32)
    if name.endswith("_logps"):
        return -rng.gamma(2.0, 0.7, mask.shape)
    if name.endswith(("kl", "entropy")):
        return rng.gamma(2.0, 0.2, mask.shape)
    if name.endswith("collision"):
        return -rng.gamma(2.0, 0.3, mask.shape)
    raise KeyError(f"no rule makes the array {name!r}: add it to COLUMNS in tests/language/methods/contract.py")


def make_inputs(loss: Loss, *, masks: Callable = ragged, policy: Callable = ordinary, seed: int = 0) -> Arrays:
    """Random arrays for every name in a loss's signature, masks float32 so that gradients of them can be asked for."""
    names = read_needs(loss).arrays
    inputs: Arrays = {}
    for number, name in enumerate(n for n in names if n.endswith("mask")):
        shape = (B, K, T) if name == "mask" else (B, T)
        inputs[name] = masks(shape, np.random.default_rng([seed, zlib.crc32(name.encode())]), number)
    for name in (n for n in names if not n.endswith("mask")):
        mask = inputs.get(mask_of(name))
        value = make_array(name, mask, np.random.default_rng([seed, zlib.crc32(name.encode())]))
        is_policy = name.startswith("policy_") and name.endswith("_logps")
        inputs[name] = policy(value, mask, "rejected" in name) if is_policy and mask is not None else value
    for name in set(inputs) & set(COLUMNS):
        if masks is some_empty:
            inputs[name] = np.where(np.arange(B).reshape(-1, *[1] * (inputs[name].ndim - 1)) == B - 1, 0, inputs[name])
    return as_32_bits(inputs)


def run(loss: Loss, inputs: Arrays) -> tuple[LossOutput, Arrays]:
    """Output and gradient by every float array, masks too."""
    return jax.device_get(compiled(loss)(inputs, state_of(loss)))


# Checks


def check_signature(loss: Loss) -> None:
    """The form of a loss; bad values of hyper-parameters are refused."""
    assert_form(loss, LossOutput)
    assert_refuses_bad_values(loss, make_inputs(loss))


def check_output(loss: Loss) -> None:
    """Shapes and types; all ways to evaluate agree."""
    assert_output(loss, make_inputs, run)


def check_finite(loss: Loss) -> None:
    """Value, metrics and gradient stay finite: ordinary, one token, empty completions, margins of +-1e4."""
    for masks in (ragged, one_token, some_empty):
        for policy in (ordinary, extreme):
            assert_finite(
                run(loss, make_inputs(loss, masks=masks, policy=policy)), f"{masks.__name__} {policy.__name__}"
            )


def check_bfloat16(loss: Loss) -> None:
    """bfloat16 arrays are computed in float32, large ones too."""
    inputs = make_inputs(loss)
    per_token = [n for n in inputs if not n.endswith("mask") and n.endswith(("_logps", "kl", "entropy", "collision"))]
    assert_computed_in_float32(loss, inputs, per_token, run)
    far = make_inputs(loss, policy=extreme)
    far = {n: v.astype(jnp.bfloat16) if n in per_token else v for n, v in far.items()}
    assert_finite(run(loss, far), "bfloat16 extreme")


def check_masks(loss: Loss) -> None:
    """What stands behind a zero of a mask changes neither value, nor metrics, nor gradient."""
    for masks in (ragged, some_empty):
        inputs = make_inputs(loss, masks=masks)
        spoiled = {}
        for name, value in inputs.items():
            mask = inputs.get(mask_of(name))
            spoils = mask is not None and value.shape == mask.shape and value.dtype == np.float32
            rubbish = np.resize(GARBAGE, value.shape)
            spoiled[name] = np.where(mask == 0, rubbish, value) if spoils and not name.endswith("mask") else value
        output, gradient = run(loss, inputs)
        other, other_gradient = run(loss, spoiled)
        assert_same(other, output)
        for name in gradient:
            np.testing.assert_array_equal(other_gradient[name], gradient[name], err_msg=name)
            mask = inputs.get(mask_of(name))
            if mask is not None and mask.shape == gradient[name].shape and not name.endswith("mask"):
                assert (gradient[name][mask == 0] == 0).all(), f"gradient of {name} behind its mask"


def check_rows(loss: Loss) -> None:
    """Rows do not know each other, unless the docstring says so."""
    assert_rows_apart(loss, make_inputs, run)


def check_empty_places(loss: Loss) -> None:
    """A row without tokens counts for nothing in the statistics of a batch: without it the others' losses are equal."""
    if not is_batch_coupled(loss):
        return
    inputs = make_inputs(loss, masks=some_empty)
    with_empty, _ = run(loss, inputs)
    without, _ = run(loss, {n: v[:-1] for n, v in inputs.items()})
    np.testing.assert_allclose(with_empty.loss[:-1], without.loss, **TOLERANCE)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **TOLERANCE), with_empty.state, without.state)


def check_constants(loss: Loss) -> None:
    """Nothing flows into the reference, frozen models, columns, masks or collision statistics; some into the policy."""
    assert_flow(run(loss, make_inputs(loss))[1], _learns)


def _learns(name: str) -> bool | None:
    frozen = name.startswith(("reference_", "guidance_", "contrastive_")) or name in COLUMNS
    # KTO does not differentiate its reference point, which the mismatched completions give.
    if frozen or name.endswith(("mask", "_collision")) or name == "policy_mismatched_logps":
        return False
    return True if name.startswith("policy_") and name.endswith(("_logps", "_reward")) else None


def check_every_array_matters(loss: Loss) -> None:
    """Each array that the signature asks for (and somebody pays for) changes the loss."""
    inputs = make_inputs(loss)
    before = run(loss, inputs)[0].loss
    for name, value in inputs.items():
        if value.dtype == np.int32 and name != "labels":
            continue
        changed = value - 0.3 * (1 + np.random.default_rng(2).random(value.shape))
        if name == "labels":
            changed = 1 - value
        if name == "scores":  # of which some losses read the order alone
            changed = -value
        if name.endswith("mask"):
            changed = value * (np.arange(T) == 0)
            if value.ndim == 3:  # an item that is gone: some losses of lists ask for no more
                changed[0, 0] = 0
        after = run(loss, {**inputs, name: changed.astype(value.dtype)})[0].loss
        assert (np.abs(after - before) > 1e-5).any(), f"{name} changes nothing"


CHECKS = (
    check_signature,
    check_output,
    check_finite,
    check_bfloat16,
    check_masks,
    check_rows,
    check_empty_places,
    check_constants,
    check_every_array_matters,
)

"""Every public loss of the language wing passes the same contract; broken ones fail it."""

import jax
import jax.numpy as jnp
import pytest
from contract import (
    CHECKS,
    check_bfloat16,
    check_constants,
    check_every_array_matters,
    check_finite,
    check_masks,
    check_output,
    check_rows,
    check_signature,
    find_losses,
)
from loss_contract import assert_examples_hold, assert_loads_only_jax_and_chex, modules_of

import dpo_jax.language.methods as methods
from dpo_jax.ops import logistic_loss, masked_sum
from dpo_jax.types import Array, LossOutput

LOSSES = find_losses()
MODULES = modules_of(methods)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("name", LOSSES)
def test_loss_keeps_the_contract(name, check):
    check(LOSSES[name])


def test_every_loss_is_exported_under_a_name_of_its_own():
    names = [name.partition(".")[2] for name in LOSSES]
    assert len(names) >= 16 and len(set(names)) == len(names)
    assert set(names) <= set(methods.__all__)
    assert all(getattr(methods, name.partition(".")[2]) is loss for name, loss in LOSSES.items())


@pytest.mark.parametrize("name", MODULES)
def test_doctests_of_the_card(name):
    assert_examples_hold(name, LOSSES)


def test_losses_load_only_jax_and_chex():
    assert_loads_only_jax_and_chex("from dpo_jax.language.methods import dpo_loss")


# A contract that nothing can break proves nothing: each loss below breaks one clause.


def sound_loss(*, policy_logps: Array, reference_logps: Array, mask: Array, beta: float = 0.1) -> LossOutput:
    """Logistic loss of the first completion against the second.

    Args:
      beta: scale, above 0.
    """
    if not beta > 0:
        raise ValueError(f"beta is {beta}; give a number above 0")
    ratio = masked_sum(policy_logps.astype(jnp.float32) - jax.lax.stop_gradient(reference_logps), mask)  # [B, K]
    margin = beta * (ratio[:, 0] - ratio[:, 1])
    return LossOutput(logistic_loss(margin), {"margin": margin})


def every_name_loss(
    *,
    policy_chosen_logps: Array,
    chosen_kl: Array,
    policy_chosen_entropy: Array,
    policy_rejected_collision: Array,
    chosen_step_ids: Array,
    chosen_mask: Array,
    rejected_mask: Array,
    policy_logps: Array,
    step_ids: Array,
    mask: Array,
    loss_state: Array,
) -> LossOutput:
    """Asks for statistics, step ids, lists and a state at once."""
    total = masked_sum(policy_chosen_logps.astype(jnp.float32) - chosen_kl + policy_chosen_entropy, chosen_mask)
    total += masked_sum(jax.lax.stop_gradient(policy_rejected_collision), rejected_mask)
    total += masked_sum(policy_chosen_logps, chosen_mask * (chosen_step_ids == 0))
    total += jnp.sum(masked_sum(policy_logps, mask * (step_ids == 1)) + masked_sum(policy_logps, mask), axis=-1)
    return LossOutput(loss_state - total, {}, loss_state + 1)


def every_name_state() -> Array:
    return jnp.zeros(())


def positional_loss(policy_logps: Array, *, mask: Array) -> LossOutput:
    """Positional array."""
    return LossOutput(-masked_sum(policy_logps, mask)[:, 0], {})


def unguarded_loss(*, policy_logps: Array, mask: Array, beta: float = 0.1) -> LossOutput:
    """Takes any beta.

    Args:
      beta: scale, above 0.
    """
    return LossOutput(-beta * masked_sum(policy_logps, mask)[:, 0], {})


def undocumented_loss(*, policy_logps: Array, mask: Array, weight: float = 0.1) -> LossOutput:
    """No line for the weight."""
    return LossOutput(-weight * masked_sum(policy_logps, mask)[:, 0], {})


def reduced_loss(*, policy_logps: Array, mask: Array) -> LossOutput:
    """Mean over the batch."""
    return LossOutput(-jnp.mean(masked_sum(policy_logps, mask)), {})


def overflowing_loss(*, policy_logps: Array, mask: Array) -> LossOutput:
    """The exponential has no cap."""
    return LossOutput(jnp.exp(-masked_sum(policy_logps, mask)[:, 0]), {})


def zero_over_zero_loss(*, policy_logps: Array, mask: Array) -> LossOutput:
    """An empty completion divides by zero."""
    return LossOutput(-(masked_sum(policy_logps, mask) / jnp.sum(mask, -1))[:, 0], {})


def low_precision_loss(*, policy_logps: Array, mask: Array) -> LossOutput:
    """Sums in the dtype of the input."""
    total = jnp.sum(jnp.where(mask != 0, policy_logps, 0), axis=-1)[:, 0]
    return LossOutput(-total.astype(jnp.float32), {})


def low_precision_ratio_loss(*, policy_logps: Array, reference_logps: Array, mask: Array) -> LossOutput:
    """Subtracts in the dtype of the input, then sums in float32."""
    ratio = masked_sum(policy_logps - jax.lax.stop_gradient(reference_logps), mask)[:, 0]
    return LossOutput(logistic_loss(ratio), {})


def multiplied_mask_loss(*, policy_logps: Array, mask: Array) -> LossOutput:
    """nan times zero is nan."""
    return LossOutput(-jnp.sum(policy_logps * jax.lax.stop_gradient(mask), axis=-1)[:, 0], {})


def coupled_loss(*, policy_logps: Array, mask: Array) -> LossOutput:
    """Centres on the other rows and keeps silent about it."""
    total = masked_sum(policy_logps, mask)[:, 0]
    return LossOutput(jnp.square(total - jnp.mean(total)), {})


def leaking_loss(*, policy_logps: Array, reference_logps: Array, mask: Array) -> LossOutput:
    """The reference learns too."""
    return LossOutput(logistic_loss(masked_sum(policy_logps - reference_logps, mask)[:, 0]), {})


def idle_argument_loss(*, policy_logps: Array, reference_logps: Array, mask: Array) -> LossOutput:
    """Makes somebody run the reference for nothing."""
    return LossOutput(-masked_sum(policy_logps, mask)[:, 0], {})


@pytest.mark.parametrize("loss", [sound_loss, every_name_loss], ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract_accepts_a_sound_loss(check, loss):
    check(loss)


@pytest.mark.parametrize(
    ("check", "loss", "message"),
    [
        (check_signature, positional_loss, "not keyword-only"),
        (check_signature, unguarded_loss, "beta=-1.0 was accepted"),
        (check_signature, undocumented_loss, "weight has no line"),
        (check_output, reduced_loss, r"loss is float32\(\)"),
        (check_finite, overflowing_loss, "ragged extreme"),
        (check_finite, zero_over_zero_loss, "some_empty ordinary"),
        (check_bfloat16, low_precision_loss, "Not equal to tolerance"),
        (check_bfloat16, low_precision_ratio_loss, "Not equal to tolerance"),
        (check_masks, multiplied_mask_loss, "nan location mismatch|not equal"),
        (check_rows, coupled_loss, "Not equal to tolerance"),
        (check_constants, leaking_loss, "flows into reference_logps"),
        (check_every_array_matters, idle_argument_loss, "reference_logps changes nothing"),
    ],
)
def test_contract_refuses_a_broken_loss(check, loss, message):
    with pytest.raises(AssertionError, match=message):
        check(loss)

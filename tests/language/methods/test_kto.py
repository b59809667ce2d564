"""KTO against float64 NumPy written from the formulas, its reference point, and the helpers for its data."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numeric import assert_formula, completions, float32, gradients, log_ratio, sigmoid

from dpo_jax.language.methods.kto import (
    apo_zero_unpaired_loss,
    kto_loss,
    kto_pair_loss,
    kto_weight_range,
    mismatched_indices,
    pairs_to_unpaired,
)

MISMATCHED = "policy_mismatched_logps"
WEIGHTS: dict[str, Any] = dict(desirable_weight=1.3, undesirable_weight=0.7)


def singles(seed=0, rows=5):
    """Rows with mismatched answers whose mean log ratio is about +1, so that the clamp of z0 does not bind."""
    arrays = completions(("completion", "mismatched"), reference=True, seed=seed, rows=rows)
    arrays["reference_mismatched_logps"] -= 0.3
    return {**arrays, "labels": np.arange(rows) % 2}


def unmatched(arrays):
    return {name: value for name, value in arrays.items() if "mismatched" not in name}


def with_log_ratio(u, labels, z0=None) -> dict[str, Any]:
    """One-token rows of the given log ratios; z0 is what the mismatched answers average to."""
    u = jnp.asarray(u, jnp.float32)[:, None]
    base = jnp.full_like(u, -3.0)
    arrays = dict(policy_completion_logps=base + u, reference_completion_logps=base, completion_mask=jnp.ones_like(u))
    if z0 is not None:
        arrays |= dict(policy_mismatched_logps=base + z0, reference_mismatched_logps=base)
        arrays["mismatched_mask"] = jnp.ones_like(u)
    return {**arrays, "labels": jnp.asarray(labels, jnp.int32)}


def numpy_values(u, z0, labels, beta, desirable_weight=1.0, undesirable_weight=1.0):
    desirable = desirable_weight * (1 - sigmoid(beta * (u - z0)))
    return np.where(labels == 1, desirable, undesirable_weight * (1 - sigmoid(beta * (z0 - u))))


def numpy_kto(a, z0, **options):
    return numpy_values(log_ratio(a, "completion"), z0, a["labels"], **options)


def numpy_pair(a, chosen_z0, rejected_z0, beta, desirable_weight=1.0, undesirable_weight=1.0):
    chosen = desirable_weight * (1 - sigmoid(beta * (log_ratio(a, "chosen") - chosen_z0)))
    return (chosen + undesirable_weight * (1 - sigmoid(beta * (rejected_z0 - log_ratio(a, "rejected"))))) / 2


@pytest.mark.parametrize("options", [dict(beta=0.1), dict(beta=0.8, **WEIGHTS)])
@pytest.mark.parametrize("seed", [0, 1])
def test_kto_value_and_gradient(options, seed):
    arrays = singles(seed)
    z0 = log_ratio(arrays, "mismatched").mean()
    assert z0 > 0.2, "the case must not be clamped"
    # The formula holds z0 fixed: this is the gradient that the paper takes.
    assert_formula(
        functools.partial(kto_loss, **options), lambda a: numpy_kto(a, z0, **options), arrays, idle=MISMATCHED
    )
    np.testing.assert_allclose(kto_loss(**float32(arrays), **options).metrics["kl"], z0, rtol=1e-5)


@pytest.mark.parametrize("options", [dict(beta=0.1), dict(beta=0.8, **WEIGHTS)])
def test_apo_zero_unpaired_value_and_gradient(options):
    formula = functools.partial(numpy_kto, z0=0.0, **options)
    assert_formula(functools.partial(apo_zero_unpaired_loss, **options), formula, unmatched(singles()))


@pytest.mark.parametrize("options", [dict(beta=0.1), dict(beta=0.8, **WEIGHTS)])
@pytest.mark.parametrize("seed", [0, 3])
def test_kto_pair_value_and_gradient(options, seed):
    arrays = completions(("chosen", "rejected"), reference=True, seed=seed)
    points = [max(0.0, log_ratio(arrays, side).mean()) for side in ("rejected", "chosen")]
    assert max(points) > 0.05, "one point at least must be free"
    formula = functools.partial(numpy_pair, chosen_z0=points[0], rejected_z0=points[1], **options)
    assert_formula(functools.partial(kto_pair_loss, **options), formula, arrays)


def test_defaults_are_the_papers():
    arrays = singles()
    expected = numpy_kto(arrays, log_ratio(arrays, "mismatched").mean(), beta=0.1)
    np.testing.assert_allclose(kto_loss(**float32(arrays)).loss, expected, rtol=2e-5)


# The reference point


def test_no_gradient_flows_through_the_reference_point():
    arrays = singles()
    assert not np.any(gradients(kto_loss, arrays)["policy_mismatched_logps"])
    moved = {**arrays, "policy_mismatched_logps": arrays["policy_mismatched_logps"] + 0.5}
    change = kto_loss(**float32(moved), beta=1.0).loss - kto_loss(**float32(arrays), beta=1.0).loss
    assert np.all(np.abs(change) > 1e-3) and np.all(np.sign(change) == np.where(arrays["labels"] == 1, 1, -1))


def test_a_negative_estimate_is_clamped_after_the_mean():
    arrays = singles()
    low = {**arrays, "policy_mismatched_logps": arrays["policy_mismatched_logps"] - 5.0}
    lower = {**arrays, "policy_mismatched_logps": arrays["policy_mismatched_logps"] - 50.0}
    np.testing.assert_array_equal(kto_loss(**float32(low)).loss, kto_loss(**float32(lower)).loss)
    np.testing.assert_array_equal(kto_loss(**float32(low)).loss, apo_zero_unpaired_loss(**float32(unmatched(low))).loss)
    rows = with_log_ratio([0.0, 0.0], [1, 0], z0=0.0)
    rows["policy_mismatched_logps"] += jnp.array([[3.0], [-1.0]])
    np.testing.assert_allclose(kto_loss(**rows).metrics["kl"], 1.0, rtol=1e-6)  # clamped one by one it would be 1.5


def test_rows_without_a_mismatched_answer_do_not_pull_the_mean():
    arrays = singles()
    arrays["mismatched_mask"][2] = 0
    kept = np.delete(log_ratio(arrays, "mismatched"), 2).mean()
    np.testing.assert_allclose(kto_loss(**float32(arrays)).metrics["kl"], kept, rtol=1e-5)


@pytest.mark.parametrize("label", [0, 1])
def test_batches_of_one_label_are_valid(label):
    arrays = {**singles(), "labels": np.full(5, label)}
    z0 = log_ratio(arrays, "mismatched").mean()
    assert_formula(kto_loss, lambda a: numpy_kto(a, z0, beta=0.1), arrays, idle=MISMATCHED)


# Values and slopes


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_policy_equal_to_reference_gives_half_of_each_weight(beta):
    arrays = singles()
    same: dict = {n: arrays[n.replace("policy", "reference")] if "policy" in n else v for n, v in arrays.items()}
    expected = np.where(arrays["labels"] == 1, 0.65, 0.35)
    np.testing.assert_allclose(kto_loss(**float32(same), beta=beta, **WEIGHTS).loss, expected, rtol=1e-6)
    np.testing.assert_allclose(
        apo_zero_unpaired_loss(**float32(unmatched(same)), beta=beta, **WEIGHTS).loss, expected, rtol=1e-6
    )


@pytest.mark.parametrize("label", [0, 1])
def test_slope_is_that_of_the_sigmoid_and_vanishes_far_from_z0(label):
    beta, z0, weight = 0.5, 2.0, 1.3 if label else 0.7
    u = np.array([-200.0, -6.0, 1.0, 2.0, 3.0, 10.0, 204.0])
    rows = with_log_ratio(u, np.full(7, label), z0)

    def summed(policy):
        return kto_loss(**{**rows, "policy_completion_logps": policy}, beta=beta, **WEIGHTS).loss.sum()

    slope = np.asarray(jax.grad(summed)(rows["policy_completion_logps"]))[:, 0]
    s = sigmoid(beta * (u - z0))
    np.testing.assert_allclose(slope, (-1 if label else 1) * weight * beta * s * (1 - s), rtol=1e-5, atol=1e-12)
    assert np.argmax(np.abs(slope)) == 3 and np.abs(slope[[0, -1]]).max() < 1e-30
    loss = kto_loss(**rows, beta=beta, **WEIGHTS).loss
    assert np.all((loss[1:-1] > 0) & (loss[1:-1] < weight)) and np.all((loss >= 0) & (loss <= weight))


def test_flipping_the_label_and_reflecting_at_z0_changes_nothing():
    u, labels, z0 = np.array([-3.0, 0.2, 1.0, 7.0]), np.array([0, 1, 1, 0]), 1.5
    there = kto_loss(**with_log_ratio(u, labels, z0), beta=0.4).loss
    back = kto_loss(**with_log_ratio(2 * z0 - u, 1 - labels, z0), beta=0.4).loss
    np.testing.assert_allclose(there, back, rtol=1e-5)


def test_doubling_both_weights_doubles_loss_and_gradient():
    arrays = singles()
    once, twice = WEIGHTS, {name: 2 * weight for name, weight in WEIGHTS.items()}
    for loss, inputs in ((kto_loss, arrays), (apo_zero_unpaired_loss, unmatched(arrays))):
        single = loss(**float32(inputs), **once).loss
        np.testing.assert_allclose(loss(**float32(inputs), **twice).loss, 2 * single, rtol=1e-6)
        slopes = [gradients(functools.partial(loss, **w), inputs)["policy_completion_logps"] for w in (once, twice)]
        np.testing.assert_allclose(slopes[1], 2 * slopes[0], rtol=1e-6)


def test_apo_zero_of_a_pair_is_the_sum_of_its_rows():
    u, v, beta = np.array([1.0, -2.0, 0.3]), np.array([0.5, 1.5, -4.0]), 0.6
    rows = with_log_ratio(np.stack([u, v], 1).ravel(), [1, 0] * 3)
    loss = np.asarray(apo_zero_unpaired_loss(**rows, beta=beta).loss).reshape(3, 2).sum(1)
    np.testing.assert_allclose(loss, 1 - sigmoid(beta * u) + sigmoid(beta * v), rtol=1e-5)


def test_accuracy_asks_for_the_side_of_z0():
    rows = with_log_ratio([3.0, 1.0, 3.0, 1.0], [1, 1, 0, 0], z0=2.0)
    np.testing.assert_array_equal(kto_loss(**rows).metrics["accuracy"], [1, 0, 0, 1])
    np.testing.assert_allclose(kto_loss(**rows, beta=0.5).metrics["reward"], [1.5, 0.5, 1.5, 0.5], rtol=1e-6)


def test_kto_pair_is_the_mean_over_both_halves():
    arrays = completions(("chosen", "rejected"), reference=True, seed=3)
    u, v = log_ratio(arrays, "chosen"), log_ratio(arrays, "rejected")
    halves = [
        numpy_values(u, max(0, v.mean()), np.ones(5), 0.5, **WEIGHTS),
        numpy_values(v, max(0, u.mean()), np.zeros(5), 0.5, **WEIGHTS),
    ]
    output = kto_pair_loss(**float32(arrays), beta=0.5, **WEIGHTS)
    assert np.mean(output.loss) == pytest.approx(np.concatenate(halves).mean(), rel=1e-5)
    assert output.metrics["chosen_kl"][0] == pytest.approx(max(0, v.mean()), abs=1e-5)
    assert output.metrics["rejected_kl"][0] == pytest.approx(max(0, u.mean()), abs=1e-5)


@pytest.mark.parametrize("name", ["desirable_weight", "undesirable_weight"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_weights_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} is"):
        kto_loss(**float32(singles()), **{name: value})


def test_labels_of_another_size_are_refused():
    with pytest.raises(AssertionError):
        kto_loss(**{**float32(singles()), "labels": jnp.zeros((4,), jnp.int32)})


# Data


@pytest.mark.parametrize(("desirable", "undesirable"), [(100, 100), (10, 90), (700, 3)])
def test_weight_range_balances_the_labels(desirable, undesirable):
    low, high = kto_weight_range(desirable, undesirable).desirable
    np.testing.assert_allclose([low * desirable / undesirable, high * desirable / undesirable], [1, 4 / 3])
    low, high = kto_weight_range(desirable, undesirable).undesirable
    np.testing.assert_allclose([desirable / (high * undesirable), desirable / (low * undesirable)], [1, 4 / 3])


def test_weight_range_needs_both_labels():
    with pytest.raises(ValueError, match="n_undesirable is 0"):
        kto_weight_range(3, 0)


def test_pairs_become_two_rows_each():
    rows = [
        dict(prompt="p", chosen="a", rejected="b", source=3, chosen_score=0.4, reference_rejected_logps=[1.0]),
        dict(prompt="q", chosen="c", rejected="d"),
    ]
    assert pairs_to_unpaired(rows) == [
        dict(prompt="p", completion="a", labels=1, source=3),
        dict(prompt="p", completion="b", labels=0, source=3),
        dict(prompt="q", completion="c", labels=1),
        dict(prompt="q", completion="d", labels=0),
    ]
    assert rows[1].keys() == {"prompt", "chosen", "rejected"} and pairs_to_unpaired([]) == []
    with pytest.raises(ValueError, match="row 1 has no prompt and no rejected"):
        pairs_to_unpaired([rows[1], dict(chosen="c")])


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ("abcd", [1, 2, 3, 0]),  # the official rotation
        ("aab", [2, 2, 0]),
        ("abbba", [1, 4, 4, 4, 1]),  # round the end: the first row shares the last one's prompt
        ([[{"role": "user"}], [{"role": "system"}]], [1, 0]),
    ],
)
def test_mismatched_indices(prompts, expected):
    indices = mismatched_indices(prompts)
    assert indices.dtype == np.int32
    np.testing.assert_array_equal(indices, expected)


@pytest.mark.parametrize("prompts", ["", "a", "aaa"])
def test_mismatched_indices_need_two_prompts(prompts):
    with pytest.raises(ValueError, match="two different prompts"):
        mismatched_indices(prompts)

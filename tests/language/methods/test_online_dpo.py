"""Labels of fresh pairs, penalties, equal samples and judges asked in both orders."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.language.methods.dpo import dpo_loss, hinge_loss, ipo_sum_loss
from dpo_jax.language.methods.online_dpo import (
    consistent_judgement,
    distinct,
    label_pairs,
    mean_judgement,
    order_pairs,
    penalise_missing_end,
)

B, T = 6, 4
LOSSES = (dpo_loss, ipo_sum_loss, hinge_loss)


def samples(seed=0):
    """Log-probabilities of two samples per prompt under policy and reference, masks and scores."""
    rng = np.random.default_rng(seed)
    reference = -rng.gamma(2.0, 0.7, (B, 2, T))
    arrays = dict(
        policy=reference - rng.normal(0, 0.5, (B, 2, T)),
        reference=reference,
        mask=(np.arange(T) < rng.integers(1, T + 1, (B, 2, 1))).astype(float),
        scores=rng.normal(0, 1, (B, 2)),
    )
    return {n: jnp.asarray(v, jnp.float32) for n, v in arrays.items()}


def step(loss, policy, reference, mask, scores):
    """Mean loss of one online step, over the pairs that carry a label."""
    labels = label_pairs(scores)
    sides = {}
    for name, values in (("policy", policy), ("reference", reference)):
        sides[f"{name}_chosen_logps"], sides[f"{name}_rejected_logps"] = order_pairs(values, labels.chosen)
    sides["chosen_mask"], sides["rejected_mask"] = order_pairs(mask, labels.chosen)
    return jnp.sum(labels.weight * loss(**sides).loss) / jnp.sum(labels.weight)


def test_labels():
    labels = label_pairs(jnp.array([[1.0, 2.0], [2.0, 1.0], [3.0, 3.0], [-1e30, 1e30]]))
    np.testing.assert_array_equal(labels.chosen, [1, 0, 0, 1])
    np.testing.assert_array_equal(labels.weight, [1, 1, 0, 1])


def test_order_of_pairs_keeps_every_entry():
    values = jnp.asarray(np.random.default_rng(0).normal(0, 1, (B, 2, T)), jnp.float32)
    chosen = jnp.array([0, 1, 1, 0, 1, 0])
    better, worse = order_pairs(values, chosen)
    np.testing.assert_array_equal(better, np.asarray(values)[np.arange(B), chosen])
    np.testing.assert_array_equal(worse, np.asarray(values)[np.arange(B), 1 - chosen])
    scores, _ = order_pairs(values[..., 0], chosen)
    np.testing.assert_array_equal(scores, np.asarray(better)[:, 0])


@pytest.mark.parametrize("loss", LOSSES)
def test_swapping_samples_with_their_scores_changes_nothing(loss):
    arrays = samples()
    swapped = {n: v[:, ::-1] for n, v in arrays.items()}
    slope = jax.jit(jax.value_and_grad(lambda policy, rest: step(loss, policy, **rest)))

    def run(a):
        return slope(a["policy"], {n: v for n, v in a.items() if n != "policy"})

    (value, gradient), (other, other_gradient) = run(arrays), run(swapped)
    assert float(value) == pytest.approx(float(other), rel=1e-6)
    np.testing.assert_allclose(other_gradient, gradient[:, ::-1], rtol=1e-5, atol=1e-7)
    assert np.all(np.asarray(gradient)[np.asarray(arrays["mask"]) == 0] == 0)
    assert np.any(gradient)


def test_a_tie_has_no_value_and_no_gradient():
    arrays = samples()
    tied = {**arrays, "scores": arrays["scores"].at[2].set(0.5)}
    gradient = jax.grad(lambda p: step(dpo_loss, p, *(tied[n] for n in ("reference", "mask", "scores"))))(
        arrays["policy"]
    )
    assert not np.any(gradient[2]) and np.any(gradient[1])
    without = {n: jnp.delete(v, 2, axis=0) for n, v in tied.items()}
    assert float(step(dpo_loss, **tied)) == pytest.approx(float(step(dpo_loss, **without)), rel=1e-6)


def test_the_first_step_from_the_reference_is_log_two():
    arrays = samples()
    assert float(step(dpo_loss, **{**arrays, "policy": arrays["reference"]})) == pytest.approx(np.log(2), rel=1e-6)


def test_penalty_changes_labels_only():
    scores = jnp.array([[1.0, 0.4], [1.0, 0.4], [1.0, 0.4]])
    has_end = jnp.array([[1, 1], [0, 1], [0, 0]])
    penalised = penalise_missing_end(scores, has_end)
    np.testing.assert_allclose(penalised, [[1.0, 0.4], [0.0, 0.4], [0.0, -0.6]], atol=1e-6)
    np.testing.assert_array_equal(label_pairs(penalised).chosen, [0, 1, 0])
    np.testing.assert_array_equal(penalise_missing_end(scores, has_end, penalty=0.0), scores)
    with pytest.raises(ValueError, match="penalty"):
        penalise_missing_end(scores, has_end, penalty=-1.0)


def test_distinct_samples():
    tokens = jnp.array([[[5, 6, 0], [5, 6, 9]], [[5, 6, 0], [5, 6, 0]], [[5, 6, 7], [5, 8, 7]], [[1, 1, 1], [1, 1, 1]]])
    mask = jnp.array([[[1, 1, 0], [1, 1, 0]], [[1, 1, 0], [1, 1, 1]], [[1, 1, 1], [1, 1, 1]], [[0, 0, 0], [0, 0, 0]]])
    np.testing.assert_array_equal(distinct(tokens, mask), [0, 1, 1, 0])


# Judges


@pytest.mark.parametrize("bias", [0.0, 0.15])
def test_both_orders_cancel_a_position_bias(bias):
    truth = np.array([0.2, 0.5, 0.7])
    found = mean_judgement(jnp.asarray(truth + bias), jnp.asarray(1 - truth + bias))
    np.testing.assert_allclose(found, truth, rtol=1e-6)


def test_consistency():
    in_order, swapped = jnp.array([0.9, 0.1, 0.9, 0.1, 0.5, 0.8]), jnp.array([0.2, 0.7, 0.9, 0.1, 0.1, 0.5])
    found = consistent_judgement(in_order, swapped)
    np.testing.assert_array_equal(found, [1.0, 0.0, 0.5, 0.5, 0.5, 0.5])
    labels = label_pairs(jnp.stack([found, 1 - found], -1))
    np.testing.assert_array_equal(labels.chosen[:2], [0, 1])
    np.testing.assert_array_equal(labels.weight, [1, 1, 0, 0, 0, 0])


def test_a_judge_without_bias_needs_one_order():
    p = jnp.array([0.05, 0.4, 0.6, 1.0])
    np.testing.assert_allclose(mean_judgement(p, 1 - p), p, rtol=1e-6)
    np.testing.assert_array_equal(consistent_judgement(p, 1 - p), (p > 0.5).astype(float))

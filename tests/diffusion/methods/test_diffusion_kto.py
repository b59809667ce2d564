"""Diffusion-KTO against float64 NumPy written from the formulas, its reference points, and its data."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from error_arrays import PROCESS, batch_of, denoiser, errors, gains
from numeric import assert_formula, float32, gradients, sigmoid, softplus

from dpo_jax.diffusion.methods.diffusion_dpo import diffusion_dpo_loss
from dpo_jax.diffusion.methods.diffusion_kto import (
    diffusion_kto_averse_loss,
    diffusion_kto_balanced_loss,
    diffusion_kto_exponential_loss,
    diffusion_kto_loss,
    diffusion_kto_mismatched_inputs,
    diffusion_kto_mismatched_loss,
    diffusion_kto_seeking_loss,
    diffusion_kto_signed_loss,
    sampling_weights,
    win_labels,
)
from dpo_jax.diffusion.objectives import from_loss
from dpo_jax.diffusion.types import DiffusionBatch

WEIGHTS: dict[str, Any] = dict(desirable_weight=1.3, undesirable_weight=0.7)
UTILITIES = {
    diffusion_kto_loss: lambda x, s: sigmoid(x),
    diffusion_kto_averse_loss: lambda x, s: -softplus(-x),
    diffusion_kto_seeking_loss: lambda x, s: softplus(x),
    diffusion_kto_signed_loss: lambda x, s: s * softplus(s * x),
    diffusion_kto_exponential_loss: lambda x, s: s * np.exp(s * x / 100) - 1,
}


def singles(seed=0, rows=6, better=0.1, mismatched=False) -> dict[str, Any]:
    """Rows whose mean gain is about `better`, one of them empty."""
    arrays: dict[str, Any] = errors(seed, ("image", "mismatched") if mismatched else ("image",), rows)
    arrays["reference_image_error"] += better
    arrays["weight"] = (np.arange(rows) != 2).astype(float)
    return {**arrays, "labels": np.arange(rows) % 2}


def with_gains(g, labels, weight=None) -> dict[str, Any]:
    g = np.asarray(g, float)
    weight = np.ones_like(g) if weight is None else weight
    base = np.ones_like(g)
    arrays = dict(policy_image_error=base - g, reference_image_error=base, weight=weight, labels=np.asarray(labels))
    return float32(arrays)


def numpy_loss(a, utility, point, beta, desirable_weight=1.0, undesirable_weight=1.0):
    s = 2 * a["labels"] - 1
    x = s * beta * (gains(a, "image") - point)
    return np.where(s > 0, desirable_weight, undesirable_weight) * (1 - utility(x, s))


def frozen_point(arrays, clamp=True):
    point = gains(arrays, "image")[arrays["weight"] != 0].mean()
    return max(point, 0.0) if clamp else point


@pytest.mark.parametrize("options", [dict(beta=3.0), dict(beta=15.0, **WEIGHTS)])
@pytest.mark.parametrize("loss", UTILITIES, ids=lambda loss: loss.__name__)
def test_utilities(loss, options):
    arrays = singles()
    point = frozen_point(arrays)
    assert point > 0.05, "the case must not be clamped"
    # The formula holds q fixed: this is the gradient that the paper takes.
    assert_formula(loss, lambda a: numpy_loss(a, UTILITIES[loss], point, **options), arrays, **options)


@pytest.mark.parametrize("options", [dict(beta=3.0), dict(beta=8.0, **WEIGHTS)])
def test_reference_point_of_both_labels_alike(options):
    arrays = singles()
    g, there = gains(arrays, "image"), arrays["weight"] != 0
    point = np.mean([g[there & (arrays["labels"] == label)].mean() for label in (0, 1)])
    assert abs(point - frozen_point(arrays)) > 0.01
    formula = UTILITIES[diffusion_kto_loss]
    assert_formula(diffusion_kto_balanced_loss, lambda a: numpy_loss(a, formula, point, **options), arrays, **options)


@pytest.mark.parametrize("shift", [0.0, -1.0])
def test_reference_point_of_mismatched_prompts(shift):
    arrays = singles(mismatched=True)
    arrays["reference_mismatched_error"] += shift
    point = gains(arrays, "mismatched")[arrays["weight"] != 0].mean()
    assert_formula(
        diffusion_kto_mismatched_loss,
        lambda a: numpy_loss(a, UTILITIES[diffusion_kto_loss], point, 4.0),
        arrays,
        idle="policy_mismatched_error",
        beta=4.0,
    )


def test_beta_is_not_halved_and_the_papers():
    rows = with_gains([0.002, -0.002], [1, 0])
    np.testing.assert_allclose(diffusion_kto_loss(**rows).loss, sigmoid(np.array([-2.0, -2.0])), rtol=1e-3)


def test_the_mean_is_clamped_after_it_was_taken():
    rows = with_gains([0.4, -0.9], [1, 0])
    np.testing.assert_allclose(
        diffusion_kto_loss(**rows, beta=2.0).loss, sigmoid(2 * np.array([-0.4, -0.9])), rtol=1e-5
    )
    rows = with_gains([0.9, -0.4], [1, 0])  # q = 0.25; clamped one by one it would be 0.45
    np.testing.assert_allclose(
        diffusion_kto_loss(**rows, beta=2.0).loss, sigmoid(2 * np.array([-0.65, -0.65])), rtol=1e-5
    )


@pytest.mark.parametrize("beta", [1.0, 500.0])
def test_policy_equal_to_reference(beta):
    rows = with_gains([0.0, 0.0, 0.0], [1, 0, 1])
    output = diffusion_kto_loss(**rows, beta=beta, **WEIGHTS)
    np.testing.assert_allclose(output.loss, [0.65, 0.35, 0.65], rtol=1e-6)
    slope = gradients(diffusion_kto_loss, rows, beta=beta, **WEIGHTS)["policy_image_error"]
    np.testing.assert_allclose(slope, beta / 4 * np.array([1.3, -0.7, 1.3]), rtol=1e-5)


def test_loss_is_bounded_and_lets_go_on_both_sides():
    g = np.array([-30.0, -1.0, 0.0, 1.0, 30.0])
    for label in (0, 1):
        rows = with_gains(g, np.full(5, label))
        loss, slope = diffusion_kto_loss(**rows, beta=4.0).loss, gradients(diffusion_kto_loss, rows, beta=4.0)
        assert np.all((loss >= 0) & (loss <= 1))
        assert np.abs(slope["policy_image_error"][[0, 4]]).max() < 1e-6 < np.abs(slope["policy_image_error"][2])


def test_flipping_a_label_flips_the_value():
    g = np.array([0.3, -0.5, 0.4, 0.1])
    there = diffusion_kto_loss(**with_gains(g, [1, 1, 0, 0]), beta=2.0).metrics["value"]
    back = diffusion_kto_loss(**with_gains(g, [0, 0, 1, 1]), beta=2.0).metrics["value"]
    np.testing.assert_allclose(there, -back, rtol=1e-6)


def test_signs_of_a_pair_are_those_of_diffusion_dpo():
    slope = gradients(diffusion_kto_loss, with_gains([0.1, -0.1], [1, 0]), beta=3.0)["policy_image_error"]
    pair = dict(
        policy_chosen_error=0.9, policy_rejected_error=1.1, reference_chosen_error=1, reference_rejected_error=1
    )
    dpo = gradients(diffusion_dpo_loss, {n: np.array([float(v)]) for n, v in pair.items()}, beta=3.0)
    assert slope[0] > 0 > slope[1] and dpo["policy_chosen_error"] > 0 > dpo["policy_rejected_error"]


@pytest.mark.parametrize("loss", [diffusion_kto_loss, diffusion_kto_balanced_loss])
def test_shifting_all_gains_changes_nothing_while_the_mean_is_positive(loss):
    g, labels = np.array([0.3, -0.2, 0.6, 0.1]), [1, 0, 0, 1]
    for shift in (0.5, 3.0):
        np.testing.assert_allclose(
            loss(**with_gains(g + shift, labels), beta=2.0).loss,
            loss(**with_gains(g, labels), beta=2.0).loss,
            rtol=1e-5,
        )
    low = loss(**with_gains(g - 3.0, labels), beta=2.0).loss
    same = np.allclose(low, loss(**with_gains(g, labels), beta=2.0).loss, rtol=1e-3)
    assert same == (loss is diffusion_kto_balanced_loss)


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("loss", [diffusion_kto_loss, diffusion_kto_balanced_loss])
def test_batches_of_one_label_are_valid(loss, label):
    rows = with_gains([0.3, -0.2, 0.6], [label] * 3)
    assert np.all(np.isfinite(loss(**rows).loss))
    assert np.all(np.isfinite(gradients(loss, rows)["policy_image_error"]))


def test_both_prompts_of_a_row_see_one_noisy_image():
    """Even where the latent is drawn from a posterior."""
    batch = batch_of(own_conditions=True, labels=np.array([1, 0, 1, 0]))
    drawn = DiffusionBatch(
        np.repeat(batch.latents[:, :1], 2, 1), batch.condition, batch.weight, batch.columns, np.ones_like(batch.latents)
    )
    seen = []

    def policy(latents, times, condition):
        seen.append(latents.reshape(4, 2, -1))
        return denoiser(jnp.ones(2))(latents, times, condition)

    objective = from_loss(diffusion_kto_mismatched_loss, PROCESS, inputs=diffusion_kto_mismatched_inputs)
    objective(policy, denoiser(jnp.zeros(2)), drawn, jax.random.key(0))
    np.testing.assert_array_equal(seen[0][:, 0], seen[0][:, 1])
    assert len(np.unique(seen[0][:, 0, 0])) == 4


# Data


@pytest.mark.parametrize(("both", "shared"), [(1, {"b": 1}), (0, {"b": 0}), (None, {})])
def test_labels_from_wins_and_losses(both, shared):
    pairs = [dict(chosen="a", rejected="b"), dict(chosen="b", rejected="c"), dict(chosen="a", rejected="d")]
    assert win_labels(pairs, both=both) == {"a": 1, "c": 0, "d": 0, **shared}


@pytest.mark.parametrize("ratio", [0.5, 0.8])
def test_sampling_weights_give_the_ratio(ratio):
    labels = np.array([1, 0, 0, 0, 1, 0])
    weights = sampling_weights(labels, positive_ratio=ratio)
    assert weights.sum() == pytest.approx(1) and weights[labels == 1].sum() == pytest.approx(ratio)
    assert len(np.unique(weights[labels == 0])) == 1
    with pytest.raises(ValueError, match="disliked is 0"):
        sampling_weights([1, 1])

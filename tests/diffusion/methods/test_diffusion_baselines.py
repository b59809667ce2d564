"""The baselines against float64 NumPy written from their formulas, their reductions, and the SDPO safeguard."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from error_arrays import PROCESS, at_margin, batch_of, denoiser, errors, margin
from numeric import assert_formula, float32, gradients, sigmoid, softplus

from dpo_jax.diffusion.methods.diffusion_baselines import (
    diffusion_conservative_loss,
    diffusion_dpo_sft_loss,
    diffusion_hinge_loss,
    diffusion_ipo_loss,
    diffusion_sft_both_loss,
    diffusion_sft_chosen_loss,
    diffusion_sft_loss,
    dspo_loss,
    dspo_threshold_loss,
    rejected_scale,
    scale_gradient,
    sdpo_loss,
    tagged_rows,
)
from dpo_jax.diffusion.methods.diffusion_dpo import diffusion_dpo_loss
from dpo_jax.diffusion.objectives import from_loss
from dpo_jax.diffusion.types import DiffusionBatch

LOG2 = np.log(2.0)
ROWS, SHAPE = 5, (3, 2)


def predictions(seed=0):
    """Errors [B] with float64 predictions and targets [B, 3, 2] that they belong to."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for side in ("chosen", "rejected"):
        target = rng.normal(size=(ROWS, *SHAPE))
        arrays[f"{side}_target"] = target
        for model, spread in (("reference", 0.4), ("policy", 0.6)):
            said = target + rng.normal(0, spread, (ROWS, *SHAPE))
            arrays[f"{model}_{side}_pred"] = said
            arrays[f"{model}_{side}_error"] = np.mean((said - target) ** 2, axis=(1, 2))
    return arrays


def only(arrays, *names) -> dict[str, Any]:
    return {name: value for name, value in arrays.items() if name.endswith("_error") or name in names}


# Values and gradients


def numpy_hinge(a, beta):
    return np.maximum(0, 1 - beta / 2 * margin(a))


def numpy_ipo(a, beta):
    return (margin(a) - 1 / (2 * beta)) ** 2


def numpy_conservative(a, beta, label_smoothing):
    z = beta / 2 * margin(a)
    return (1 - label_smoothing) * softplus(-z) + label_smoothing * softplus(z)


def numpy_dpo_plus_sft(a, beta, sft_coef):
    return softplus(-beta / 2 * margin(a)) + sft_coef * a["policy_chosen_error"]


def numpy_dspo(a, beta):
    tilt = beta * sigmoid(-beta / 2 * margin(a))[:, None, None]
    said = a["policy_chosen_pred"]
    return np.mean((said - a["chosen_target"] - tilt * (said - a["reference_chosen_pred"])) ** 2, axis=(1, 2))


def numpy_dspo_threshold(a, beta, threshold):
    way = np.mean((a["policy_chosen_pred"] - a["reference_chosen_pred"]) ** 2, axis=(1, 2))
    return (1 - sigmoid(beta / 2 * margin(a))) ** 2 * np.where(way >= threshold, way, 1.0)


@pytest.mark.parametrize(
    ("loss", "formula", "options"),
    [
        (diffusion_hinge_loss, numpy_hinge, dict(beta=3.0)),
        (diffusion_ipo_loss, numpy_ipo, dict(beta=0.7)),
        (diffusion_conservative_loss, numpy_conservative, dict(beta=4.0, label_smoothing=0.3)),
        (diffusion_dpo_sft_loss, numpy_dpo_plus_sft, dict(beta=4.0, sft_coef=0.6)),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_links_of_the_margin(loss, formula, options, seed):
    assert_formula(loss, lambda a: formula(a, **options), errors(seed), **options)


@pytest.mark.parametrize(
    ("loss", "formula", "options", "names"),
    [
        (dspo_loss, numpy_dspo, dict(beta=2.0), ("policy_chosen_pred", "reference_chosen_pred", "chosen_target")),
        (
            dspo_threshold_loss,
            numpy_dspo_threshold,
            dict(beta=3.0, threshold=0.5),
            ("policy_chosen_pred", "reference_chosen_pred"),
        ),
    ],
)
def test_dspo(loss, formula, options, names):
    arrays = only(predictions(), *names)
    assert_formula(loss, lambda a: formula(a, **options), arrays, **options)
    if loss is dspo_threshold_loss:
        way = np.mean((arrays["policy_chosen_pred"] - arrays["reference_chosen_pred"]) ** 2, axis=(1, 2))
        assert 0 < np.sum(way >= 0.5) < ROWS, "both branches are wanted"


def test_fine_tuning_is_the_error_itself():
    arrays = errors()
    chosen, rejected = arrays["policy_chosen_error"], arrays["policy_rejected_error"]
    np.testing.assert_allclose(
        diffusion_sft_chosen_loss(policy_chosen_error=jnp.asarray(chosen)).loss, chosen, rtol=1e-6
    )
    np.testing.assert_allclose(diffusion_sft_loss(policy_image_error=jnp.asarray(chosen)).loss, chosen, rtol=1e-6)
    both = diffusion_sft_both_loss(
        policy_chosen_error=jnp.asarray(chosen), policy_rejected_error=jnp.asarray(rejected)
    ).loss
    np.testing.assert_allclose(both, (chosen + rejected) / 2, rtol=1e-6)


# Reductions


def test_values_at_the_reference():
    arrays: dict[str, Any] = float32(at_margin(0.0))
    np.testing.assert_allclose(diffusion_hinge_loss(**arrays).loss, 1.0)
    np.testing.assert_allclose(diffusion_ipo_loss(**arrays, beta=3.0).loss, 1 / (4 * 9.0), rtol=1e-6)
    np.testing.assert_allclose(diffusion_conservative_loss(**arrays).loss, LOG2, rtol=1e-6)


def test_where_the_three_meet_diffusion_dpo():
    arrays: dict[str, Any] = float32(errors())
    expected = diffusion_dpo_loss(**arrays, beta=7.0).loss
    np.testing.assert_array_equal(diffusion_conservative_loss(**arrays, beta=7.0, label_smoothing=0.0).loss, expected)
    np.testing.assert_array_equal(diffusion_dpo_sft_loss(**arrays, beta=7.0, sft_coef=0.0).loss, expected)
    fitted = diffusion_dpo_sft_loss(**arrays, beta=0.0).loss
    np.testing.assert_allclose(fitted, LOG2 + arrays["policy_chosen_error"], rtol=1e-6)
    opposed = only(predictions())
    targets: dict[str, Any] = dict(chosen_target=jnp.ones((5, 1)), rejected_target=-jnp.ones((5, 1)))
    flat: dict[str, Any] = dict(
        policy_chosen_pred=jnp.zeros((5, 1)), policy_rejected_pred=jnp.zeros((5, 1)), weight=jnp.ones(5)
    )
    guarded = sdpo_loss(**float32(opposed), **targets, **flat, beta=7.0)
    np.testing.assert_array_equal(guarded.metrics["rejected_scale"], 1.0)
    np.testing.assert_allclose(guarded.loss, diffusion_dpo_loss(**float32(opposed), beta=7.0).loss, rtol=1e-6)


def test_hinge_lets_go_of_pairs_beyond_its_margin():
    slopes = gradients(diffusion_hinge_loss, at_margin([0.4, 0.6, 5.0]), beta=4.0)
    np.testing.assert_allclose(slopes["policy_chosen_error"], [2.0, 0.0, 0.0])


def test_conservative_loss_is_least_at_the_log_odds():
    beta, e = 4.0, 0.1
    slopes = gradients(
        diffusion_conservative_loss, at_margin(2 * np.log((1 - e) / e) / beta), beta=beta, label_smoothing=e
    )
    np.testing.assert_allclose(slopes["policy_chosen_error"], 0.0, atol=1e-6)


def test_dspo_at_the_reference_is_fine_tuning_with_a_gradient_a_little_smaller():
    arrays = predictions()
    same = {n: arrays[n.replace("policy", "reference")] for n in arrays}
    beta = 0.4
    names = ("policy_chosen_pred", "reference_chosen_pred", "chosen_target")
    inputs = only(same, *names)
    np.testing.assert_allclose(dspo_loss(**float32(inputs), beta=beta).loss, same["reference_chosen_error"], rtol=1e-5)
    slope = gradients(dspo_loss, inputs, beta=beta)["policy_chosen_pred"]
    wrong = same["policy_chosen_pred"] - same["chosen_target"]
    np.testing.assert_allclose(slope, 2 * wrong * (1 - beta / 2) / wrong[0].size, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("label_smoothing", [0.6, float("inf")])
def test_more_wrong_labels_than_half_are_refused(label_smoothing):
    with pytest.raises(ValueError, match="label_smoothing"):
        diffusion_conservative_loss(**float32(errors()), label_smoothing=label_smoothing)


# The safeguard


def scale_of(chosen, rejected, mu=0.9, weight=None):
    """`rejected_scale` of prediction errors [B, ...]."""
    chosen, rejected = jnp.asarray(chosen, jnp.float32), jnp.asarray(rejected, jnp.float32)
    weight = jnp.ones(chosen.shape[0]) if weight is None else jnp.asarray(weight, jnp.float32)
    return rejected_scale(chosen, rejected, jnp.zeros_like(chosen), jnp.zeros_like(rejected), weight, mu=mu)


@pytest.mark.parametrize("mu", [0.2, 0.6, 0.9])
def test_scale_is_that_of_the_formula(mu):
    rng = np.random.default_rng(1)
    chosen = rng.normal(size=(ROWS, *SHAPE))
    rejected = 0.8 * chosen + rng.normal(size=(ROWS, *SHAPE))
    g_w, g_l = 2 * chosen / chosen.size, 2 * rejected / chosen.size
    expected = np.clip((1 - mu) * np.sum(g_w**2) / np.sum(g_w * g_l), 0, 1)
    np.testing.assert_allclose(scale_of(chosen, rejected, mu), expected, rtol=1e-5)
    # Removing the scaled rejected direction leaves the share mu of the chosen one's own progress.
    left = np.sum(g_w * (g_w - expected * g_l)) / np.sum(g_w**2)
    assert left >= mu - 1e-5
    assert 0 < expected < 1 or mu == 0.2
    if expected < 1:
        assert left == pytest.approx(mu, abs=1e-5)


def test_scale_where_gradients_oppose_coincide_or_vanish():
    chosen = np.random.default_rng(0).normal(size=(4, 3))
    assert scale_of(chosen, -chosen) == 1
    np.testing.assert_allclose(scale_of(chosen, chosen, mu=0.7), 0.3, rtol=1e-5)
    np.testing.assert_allclose(scale_of(1e20 * chosen, 1e20 * chosen, mu=0.7), 0.3, rtol=1e-5)
    assert scale_of(0 * chosen, 0 * chosen) == 1
    rubbish = np.concatenate([chosen, 100 * chosen[:1]])
    np.testing.assert_allclose(
        scale_of(rubbish, np.concatenate([chosen, -rubbish[-1:]]), 0.7, [1, 1, 1, 1, 0]), 0.3, rtol=1e-5
    )


def test_safeguard_keeps_values_and_scales_the_rejected_gradient_alone():
    names = ("policy_chosen_pred", "policy_rejected_pred", "chosen_target", "rejected_target")
    arrays = only(predictions(), *names)
    arrays["policy_rejected_pred"] = arrays["rejected_target"] + (
        arrays["policy_chosen_pred"] - arrays["chosen_target"]
    )
    inputs = {**arrays, "weight": np.ones(ROWS)}
    output = sdpo_loss(**float32(inputs), beta=6.0, mu=0.7)
    plain_arrays = only(arrays)
    np.testing.assert_allclose(output.loss, diffusion_dpo_loss(**float32(plain_arrays), beta=6.0).loss, rtol=1e-6)
    np.testing.assert_allclose(output.metrics["rejected_scale"], 0.3, rtol=1e-5)
    guarded = gradients(sdpo_loss, inputs, beta=6.0, mu=0.7)
    plain = gradients(diffusion_dpo_loss, plain_arrays, beta=6.0)
    np.testing.assert_allclose(guarded["policy_chosen_error"], plain["policy_chosen_error"], rtol=1e-5)
    np.testing.assert_allclose(guarded["policy_rejected_error"], 0.3 * plain["policy_rejected_error"], rtol=1e-5)


def test_scaled_gradients_leave_values_alone():
    value, slope = jax.value_and_grad(lambda x: scale_gradient(x, 0.25) ** 2)(3.0)
    assert value == 9 and slope == 1.5


def test_a_step_with_the_safeguard_does_not_raise_the_chosen_error():
    """Predictions themselves are learnt: without the safeguard the chosen error grows."""
    rng = np.random.default_rng(0)
    wrong = rng.normal(size=(8, 6))
    target = {"chosen_target": jnp.zeros((8, 6)), "rejected_target": jnp.zeros((8, 6))}
    # One shared prediction with errors that point the same way, the rejected ones longer.
    offsets = jnp.asarray(3.0 * wrong)

    def chosen_error_after(loss, guarded):
        def total(move):
            chosen, rejected = jnp.asarray(wrong) + move, offsets + move
            arrays = dict(
                policy_chosen_error=jnp.mean(chosen**2, 1),
                policy_rejected_error=jnp.mean(rejected**2, 1),
                reference_chosen_error=jnp.mean(jnp.asarray(wrong) ** 2, 1),
                reference_rejected_error=jnp.mean(offsets**2, 1),
            )
            if guarded:
                arrays |= dict(policy_chosen_pred=chosen, policy_rejected_pred=rejected, weight=jnp.ones(8), **target)
            return jnp.mean(loss(**arrays, beta=1.0).loss)

        move = jnp.zeros((8, 6))
        return jnp.mean((wrong - 1e-3 * jax.grad(total)(move)) ** 2) - jnp.mean(wrong**2)

    assert chosen_error_after(diffusion_dpo_loss, False) > 0
    assert chosen_error_after(sdpo_loss, True) < 0


# Rows


def test_tagged_rows():
    pairs = [
        dict(chosen="1.png", rejected="2.png", caption="a cat"),
        dict(chosen="3.png", rejected="4.png", caption=""),
    ]
    assert tagged_rows(pairs, good="Good. ", bad="Bad. ") == [
        dict(image="1.png", caption="Good. a cat", label=1),
        dict(image="2.png", caption="Bad. a cat", label=0),
        dict(image="3.png", caption="Good. ", label=1),
        dict(image="4.png", caption="Bad. ", label=0),
    ]
    with pytest.raises(ValueError, match="row 1 has no rejected and no caption"):
        tagged_rows([pairs[0], dict(chosen="5.png")])


def test_equal_tags_are_fine_tuning_on_both_images():
    batch = batch_of(rows=3)
    singles = DiffusionBatch(
        batch.latents.reshape(6, 1, 3, 2), np.repeat(batch.condition, 2, axis=0), np.ones(6, np.float32), {}
    )
    params = jnp.array([0.5, 0.3])
    # Many draws of noise: the two sum over other ones.
    keys = jax.random.split(jax.random.key(0), 1000)

    def means(loss, rows):
        objective = from_loss(loss, PROCESS)
        return jax.vmap(lambda key: jnp.mean(objective(denoiser(params), None, rows, key).loss))(keys)

    both, tagged = means(diffusion_sft_both_loss, batch), means(diffusion_sft_loss, singles)
    spread = np.sqrt(np.var(both) / 1000 + np.var(tagged) / 1000)
    assert abs(np.mean(both) - np.mean(tagged)) < 4 * spread
    assert spread < 0.02

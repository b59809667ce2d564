"""RankDPO against float64 NumPy written from the formula, its weights, and the ensemble's labels."""

import itertools

import jax
import numpy as np
import pytest
from error_arrays import PROCESS, batch_of, denoiser
from numeric import assert_formula, float32, gradients, softplus

from dpo_jax.diffusion.errors import noised_inputs
from dpo_jax.diffusion.methods.diffusion_dpo import diffusion_dpo_loss
from dpo_jax.diffusion.methods.rankdpo import (
    rankdpo_inputs,
    rankdpo_loss,
    rankdpo_model_ranks_inputs,
    rankdpo_model_ranks_loss,
    win_shares,
)
from dpo_jax.diffusion.objectives import from_loss

LOSSES = (rankdpo_loss, rankdpo_model_ranks_loss)


def lists(rows=4, images=4, seed=0, ragged=True, spread=0.15):
    rng = np.random.default_rng(seed)
    reference = rng.gamma(4.0, 0.2, (rows, images))
    valid = np.ones((rows, images))
    if ragged:
        valid[1, 2] = valid[2, 0] = 0
    return {
        "policy_error": reference + rng.normal(0, spread, reference.shape),
        "reference_error": reference,
        "scores": rng.permuted(np.tile(np.linspace(0, 1, images), (rows, 1)), axis=1),
        "valid": valid,
    }


def numpy_loss(a, beta, by_model):
    """By the definition: list for list, pair for pair."""
    out = np.zeros(len(a["scores"]))
    for row, (policy, reference, phi, valid) in enumerate(
        zip(a["policy_error"], a["reference_error"], a["scores"], a["valid"], strict=True)
    ):
        there = np.flatnonzero(valid)
        s = policy - reference
        key = s if by_model else -phi
        rank = {i: 1 + place for place, i in enumerate(sorted(there, key=lambda i: key[i]))}
        for i, j in itertools.permutations(there, 2):
            if phi[i] > phi[j]:
                gain = abs(2 ** phi[i] - 2 ** phi[j])
                weight = gain * abs(1 / np.log(1 + rank[i]) - 1 / np.log(1 + rank[j]))
                out[row] += weight * softplus(beta * (s[i] - s[j]))
    return out


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_value_and_gradient(loss, seed):
    by_model = loss is rankdpo_model_ranks_loss
    assert_formula(loss, lambda a: numpy_loss(a, 5.0, by_model), lists(seed=seed), beta=5.0)


def test_the_two_rankings_differ():
    arrays = lists()
    losses = [np.asarray(loss(**float32(arrays), beta=5.0).loss) for loss in LOSSES]
    assert np.abs(losses[0] - losses[1]).max() > 0.01


def test_policy_equal_to_reference_gives_log_two_times_the_weights():
    arrays = lists(ragged=False)
    arrays["policy_error"] = arrays["reference_error"]
    gain, rank = 2.0 ** np.linspace(1, 0, 4), 1 / np.log(1 + np.arange(1, 5))
    weights = [(gain[i] - gain[j]) * (rank[i] - rank[j]) for i, j in itertools.combinations(range(4), 2)]
    np.testing.assert_allclose(rankdpo_loss(**float32(arrays)).loss, np.log(2) * np.sum(weights), rtol=1e-5)


def test_a_list_of_two_is_diffusion_dpo_with_a_known_weight():
    arrays = lists(images=2, ragged=False)
    arrays["scores"] = np.tile([1.0, 0.0], (4, 1))
    pair = {
        f"{m}_{s}_error": arrays[f"{m}_error"][:, i]
        for m in ("policy", "reference")
        for i, s in enumerate(("chosen", "rejected"))
    }
    expected = (1 / np.log(2) - 1 / np.log(3)) * diffusion_dpo_loss(**float32(pair), beta=14.0).loss
    np.testing.assert_allclose(rankdpo_loss(**float32(arrays), beta=7.0).loss, expected, rtol=1e-5)
    assert 1 / np.log(2) - 1 / np.log(3) == pytest.approx(0.532456, abs=1e-6)


def test_tied_labels_make_no_pair():
    arrays = lists(ragged=False)
    flat = {**arrays, "scores": np.full((4, 4), 0.5)}
    np.testing.assert_array_equal(rankdpo_loss(**float32(flat)).loss, 0.0)
    np.testing.assert_array_equal(gradients(rankdpo_loss, flat)["policy_error"], 0.0)
    arrays["scores"] = np.tile([0.9, 0.4, 0.4, 0.1], (4, 1))
    assert np.all(rankdpo_loss(**float32(arrays)).metrics["pairs"] == 5)


def test_permuting_a_list_permutes_its_gradient():
    arrays, order = lists(), np.array([2, 0, 3, 1])
    permuted = {n: v[:, order] for n, v in arrays.items()}
    for loss in LOSSES:
        there, back = (gradients(loss, a, beta=5.0)["policy_error"] for a in (arrays, permuted))
        np.testing.assert_allclose(back, there[:, order], rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(there.sum(1), 0.0, atol=1e-5)  # the loss depends on differences alone


def test_pairs_with_the_first_rank_weigh_most_and_shifted_labels_scale_all_weights():
    arrays = lists(ragged=False)
    arrays["policy_error"] = arrays["reference_error"]
    arrays["scores"] = np.tile([1.0, 2 / 3, 1 / 3, 0.0], (4, 1))
    slope = -gradients(rankdpo_loss, arrays, beta=1.0)["policy_error"][0]  # half of each image's signed weights
    assert abs(slope[0]) == abs(slope).max()
    shifted = {**arrays, "scores": arrays["scores"] + 0.5}
    np.testing.assert_allclose(
        rankdpo_loss(**float32(shifted)).loss, 2**0.5 * rankdpo_loss(**float32(arrays)).loss, rtol=1e-5
    )


def test_ranking_is_measured():
    arrays = lists(ragged=False)
    arrays["policy_error"] = arrays["reference_error"] - arrays["scores"]  # exactly the labels' order
    good = rankdpo_loss(**float32(arrays)).metrics
    np.testing.assert_allclose([good["ndcg"], good["accuracy"]], 1.0, rtol=1e-6)
    arrays["policy_error"] = arrays["reference_error"] + arrays["scores"]
    bad = rankdpo_loss(**float32(arrays)).metrics
    np.testing.assert_array_equal(bad["accuracy"], 0.0)
    assert np.all(bad["ndcg"] < 0.8) and np.all(bad["margin"] < 0) and np.all(good["margin"] > 0)


@pytest.mark.parametrize("inputs", [rankdpo_inputs, rankdpo_model_ranks_inputs, noised_inputs])
def test_noise_of_ones_own_or_shared(inputs):
    batch = batch_of(images=3, scores=np.tile([1.0, 0.5, 0.0], (4, 1)))
    batch = type(batch)(np.zeros_like(batch.latents), batch.condition, batch.weight, batch.columns)
    seen = []

    def policy(latents, times, condition):
        seen.append((latents.reshape(4, 3, -1), times.reshape(4, 3)))
        return denoiser(np.ones(2))(latents, times, condition)

    from_loss(rankdpo_loss, PROCESS, inputs=inputs)(policy, denoiser(np.ones(2)), batch, jax.random.key(0))
    latents, times = seen[0]
    assert np.all(np.asarray(times) == np.asarray(times)[:, :1])
    same = np.all(np.asarray(latents) == np.asarray(latents)[:, :1], axis=(1, 2))
    assert np.all(same) if inputs is noised_inputs else not np.any(same)


# Labels of an ensemble


def test_win_shares_by_counting():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 4, (5, 4)).astype(float)  # with ties
    expected = np.zeros(4)
    for model, (i, j) in itertools.product(scores, itertools.permutations(range(4), 2)):
        expected[i] += model[i] > model[j]
    np.testing.assert_allclose(win_shares(scores), expected / (5 * 3))
    np.testing.assert_allclose(win_shares(np.stack([scores, -scores]))[0], expected / 15)


def test_win_shares_read_the_order_alone():
    scores = np.random.default_rng(0).normal(size=(3, 5))
    phi = win_shares(scores)
    np.testing.assert_allclose(win_shares(np.exp(3 * scores)), phi)
    assert phi.sum() == pytest.approx(5 / 2)
    np.testing.assert_allclose(win_shares(scores[:1]), np.argsort(np.argsort(scores[0])) / 4)
    best = win_shares(np.array([[1.0, 5.0, 2.0], [0.1, 0.3, 0.2]]))
    np.testing.assert_allclose(best, [0.0, 1.0, 0.5])
    assert win_shares(np.ones((2, 4))).tolist() == [0.0] * 4


@pytest.mark.parametrize("scores", [np.ones((2, 1)), np.ones(3), np.array([[np.nan, 1.0]])])
def test_scores_that_cannot_be_compared_are_refused(scores):
    with pytest.raises(ValueError, match="at least two images"):
        win_shares(scores)

"""Triple preference optimisation against float64 NumPy written from the formulas, and its reductions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numeric import float32, sigmoid

from dpo_jax.language.methods.dpo import reference_free_loss
from dpo_jax.language.methods.triple_po import (
    make_triples,
    triple_po_hinge_loss,
    triple_po_ipo_loss,
    triple_po_length_loss,
    triple_po_loss,
)

B, T = 5, 6
SIDES = ("gold", "chosen", "rejected")
LOSSES = [triple_po_loss, triple_po_length_loss, triple_po_hinge_loss, triple_po_ipo_loss]


def triples(seed=0):
    rng = np.random.default_rng(seed)
    arrays = {}
    for side in SIDES:
        arrays[f"policy_{side}_logps"] = -rng.gamma(2.0, 0.8, (B, T))
        arrays[f"{side}_mask"] = (np.arange(T) < rng.integers(1, T + 1, (B, 1))).astype(float)
    return arrays


def sums(a):
    """(S, |y|) of gold, chosen, rejected."""
    return [((a[f"policy_{s}_logps"] * a[f"{s}_mask"]).sum(-1), a[f"{s}_mask"].sum(-1)) for s in SIDES]


def logistic(z, e):
    """Smoothed logistic loss and its slope in z."""
    value = (1 - e) * np.logaddexp(0, -z) + e * np.logaddexp(0, z)
    return value, e * sigmoid(z) - (1 - e) * sigmoid(-z)


# For each loss: arrays, options -> preference loss and its derivatives by S_w and S_l, float64 [B].


def numpy_sum(a, beta, label_smoothing):
    _, (w, _), (l, _) = sums(a)
    value, slope = logistic(beta * (w - l), label_smoothing)
    return value, beta * slope, -beta * slope


def numpy_length(a, beta, gamma, label_smoothing):
    _, (w, n), (l, m) = sums(a)
    value, slope = logistic(beta * (w / n - l / m) - gamma, label_smoothing)
    return value, beta * slope / n, -beta * slope / m


def numpy_hinge(a, beta):
    _, (w, _), (l, _) = sums(a)
    room = 1 - beta * (w - l)
    return np.maximum(room, 0), -beta * (room > 0), beta * (room > 0)


def numpy_ipo(a, beta):
    _, (w, n), (l, m) = sums(a)
    residual = w / n - l / m - 1 / (2 * beta)
    return residual**2, 2 * residual / n, -2 * residual / m


MEMBERS = [
    (triple_po_loss, numpy_sum, dict(beta=0.01, label_smoothing=0.0), {}),
    (triple_po_loss, numpy_sum, dict(beta=0.4, label_smoothing=0.2), {}),
    (triple_po_length_loss, numpy_length, dict(beta=0.01, gamma=0.5, label_smoothing=0.0), {}),
    (triple_po_length_loss, numpy_length, dict(beta=2.0, gamma=1.6, label_smoothing=0.1), dict(nll_coef=0.05)),
    (triple_po_hinge_loss, numpy_hinge, dict(beta=0.3), dict(nll_coef=0.7)),
    (triple_po_ipo_loss, numpy_ipo, dict(beta=0.3), dict(nll_coef=0.0)),
]


@pytest.mark.parametrize(("loss", "formula", "options", "gold"), MEMBERS)
def test_value_and_gradient_against_the_formula(loss, formula, options, gold):
    arrays = triples()
    nll_coef = gold.get("nll_coef", 1.0)
    preference, by_chosen, by_rejected = formula(arrays, **options)
    (gold_sum, gold_length), *_ = sums(arrays)
    nll = -gold_sum * B / gold_length.sum()
    inputs = float32(arrays)
    policy = {name: inputs[name] for name in inputs if name.startswith("policy")}

    def total(policy):
        output = loss(**{**inputs, **policy}, **options, **gold)
        return output.loss.sum(), output

    gradient, output = jax.jit(jax.grad(total, has_aux=True))(policy)
    np.testing.assert_allclose(output.loss, preference + nll_coef * nll, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(output.metrics["preference_loss"], preference, rtol=2e-5, atol=1e-6)
    by_gold = np.full(B, -nll_coef * B / gold_length.sum())
    for side, slope in zip(SIDES, (by_gold, by_chosen, by_rejected)):
        expected = slope[:, None] * arrays[f"{side}_mask"]
        np.testing.assert_allclose(gradient[f"policy_{side}_logps"], expected, rtol=1e-4, atol=1e-6, err_msg=side)


@pytest.mark.parametrize("loss", LOSSES)
def test_mean_of_the_nll_is_the_token_mean_of_the_batch(loss):
    arrays = triples(2)
    (gold_sum, gold_length), *_ = sums(arrays)
    with_gold = loss(**float32(arrays), nll_coef=1.0).loss.mean()
    without = loss(**float32(arrays), nll_coef=0.0).loss.mean()
    assert float(with_gold - without) == pytest.approx(-gold_sum.sum() / gold_length.sum(), rel=1e-4, abs=1e-3)


@pytest.mark.parametrize(
    ("loss", "by_token"), [(triple_po_loss, False), (triple_po_hinge_loss, False), (triple_po_length_loss, True)]
)
def test_rewards_are_beta_times_sums_or_means(loss, by_token):
    arrays = triples(3)
    _, *sides = sums(arrays)
    metrics = loss(**float32(arrays), beta=0.2).metrics
    for side, (total, length) in zip(SIDES[1:], sides):
        expected = 0.2 * total / (length if by_token else 1)
        np.testing.assert_allclose(metrics[f"{side}_reward"], expected, rtol=1e-5)


def test_without_gold_it_is_dpo_without_reference():
    arrays = float32(triples(4))
    pair = {name: value for name, value in arrays.items() if "gold" not in name}
    expected = reference_free_loss(**pair, beta=0.3).loss
    np.testing.assert_allclose(triple_po_loss(**arrays, beta=0.3, nll_coef=0.0).loss, expected, rtol=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 3.0])
def test_values_at_equal_log_probabilities(gamma):
    arrays = triples(5)
    arrays["policy_rejected_logps"], arrays["rejected_mask"] = arrays["policy_chosen_logps"], arrays["chosen_mask"]
    arrays = float32(arrays)
    np.testing.assert_allclose(triple_po_loss(**arrays, nll_coef=0.0).loss, np.log(2), rtol=1e-6)
    length = triple_po_length_loss(**arrays, gamma=gamma, nll_coef=0.0).loss
    np.testing.assert_allclose(length, np.log1p(np.exp(gamma)), rtol=1e-6)
    np.testing.assert_allclose(triple_po_hinge_loss(**arrays, nll_coef=0.0).loss, 1.0)
    np.testing.assert_allclose(triple_po_ipo_loss(**arrays, beta=0.5, nll_coef=0.0).loss, 1.0)


def test_repeated_tokens_change_sums_but_not_means():
    arrays = triples(6)
    twice = float32({n: np.repeat(a, 2, axis=-1) if "gold" not in n else a for n, a in arrays.items()})
    once = float32(arrays)
    for loss in (triple_po_length_loss, triple_po_ipo_loss):
        np.testing.assert_allclose(loss(**twice, beta=1.0).loss, loss(**once, beta=1.0).loss, rtol=1e-5)
    margins = [triple_po_loss(**a).metrics["margin"] for a in (once, twice)]
    np.testing.assert_allclose(margins[1], 2 * margins[0], rtol=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("options", [dict(beta=0.0), dict(nll_coef=-1.0)])
def test_bad_options_are_refused(loss, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        loss(**float32(triples()), **options)


# Triples from scored answers


@pytest.mark.parametrize("rank", [2, 3, 4])
def test_triples_are_the_best_the_ranked_and_the_worst(rank):
    scores = np.random.default_rng(0).permuted(np.tile(np.arange(5.0), (8, 1)), axis=1)
    triple = jax.jit(lambda s: make_triples(s, chosen_rank=rank))(jnp.asarray(scores))
    rows = np.arange(8)
    np.testing.assert_array_equal(scores[rows, triple.gold], 4)
    np.testing.assert_array_equal(scores[rows, triple.chosen], 5 - rank)
    np.testing.assert_array_equal(scores[rows, triple.rejected], 0)
    assert all(index.dtype == jnp.int32 for index in triple)


def test_ties_keep_the_order_of_the_list():
    triple = make_triples(jnp.array([[2, 5, 5, 2], [1, 1, 1, 1]]))
    np.testing.assert_array_equal(jnp.stack(triple), [[1, 0], [2, 1], [3, 3]])


@pytest.mark.parametrize(("answers", "rank"), [(2, 2), (4, 1), (4, 4)])
def test_a_rank_that_is_gold_or_rejected_is_refused(answers, rank):
    with pytest.raises(ValueError, match="chosen_rank"):
        make_triples(jnp.zeros((1, answers)), chosen_rank=rank)

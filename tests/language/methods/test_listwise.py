"""Listwise losses against float64 NumPy written from the formulas, item by item, and what their papers promise."""

import itertools
import math

import jax
import numpy as np
import pytest
from lists import evaluate, lists, log_ratios, there, with_log_ratios
from numeric import central_differences, float32, softplus

from dpo_jax.language.methods.dpo import dpo_loss
from dpo_jax.language.methods.listwise import (
    implicit_rewards,
    kendall_tau,
    labels_from_win_matrix,
    lambda_loss,
    list_softmax_loss,
    ndcg,
    pair_hinge_loss,
    pair_logistic_loss,
    plackett_luce_loss,
    point_mse_loss,
    point_sigmoid_loss,
    top1_accuracy,
)

LOG2 = math.log(2.0)


# Each formula once more, on one list: s and psi are the float64 rewards and scores of the items that are there.


def numpy_plackett_luce(s, psi):
    s = s[np.argsort(-psi, kind="stable")]
    return sum(np.log(np.exp(s[k:]).sum()) - s[k] for k in range(len(s)))


def pairs(psi):
    return [(i, j) for i, j in itertools.permutations(range(len(psi)), 2) if psi[i] > psi[j]]


def numpy_pair_logistic(s, psi):
    return sum(softplus(-(s[i] - s[j])) for i, j in pairs(psi))


def numpy_pair_hinge(s, psi):
    return sum(max(0.0, 1 - (s[i] - s[j])) for i, j in pairs(psi))


def numpy_lambda(s, psi):
    rank = {item: place + 1 for place, item in enumerate(np.argsort(-s, kind="stable"))}
    total = 0.0
    for i, j in pairs(psi):
        discount = abs(1 / math.log(1 + rank[i]) - 1 / math.log(1 + rank[j]))
        total += abs(2 ** psi[i] - 2 ** psi[j]) * discount * softplus(-(s[i] - s[j]))
    return total


def numpy_softmax(s, psi):
    return -(psi / psi.sum() * (s - np.log(np.exp(s).sum()))).sum()


def numpy_point_mse(s, psi):
    return ((psi - s) ** 2).sum()


def numpy_point_sigmoid(s, psi):
    return (psi * softplus(-s) + (1 - psi) * softplus(s)).sum()


CASES = [
    (plackett_luce_loss, numpy_plackett_luce),
    (pair_logistic_loss, numpy_pair_logistic),
    (pair_hinge_loss, numpy_pair_hinge),
    (lambda_loss, numpy_lambda),
    (list_softmax_loss, numpy_softmax),
    (point_mse_loss, numpy_point_mse),
    (point_sigmoid_loss, numpy_point_sigmoid),
]
NAMES = [loss.__name__ for loss, _ in CASES]
LOSSES = [loss for loss, _ in CASES]
PAIRWISE = (pair_logistic_loss, pair_hinge_loss, lambda_loss)


def on_lists(formula, beta):
    """The formula of one list as a function of arrays: drops absent items first."""

    def reference(arrays):
        rewards = beta * log_ratios(arrays)
        return np.array([formula(s[t], psi[t]) for s, psi, t in zip(rewards, arrays["scores"], there(arrays))])

    return reference


@pytest.mark.parametrize("beta", [0.3, 1.0])
@pytest.mark.parametrize(("loss", "formula"), CASES, ids=NAMES)
def test_value_and_gradient_follow_the_formula(loss, formula, beta):
    arrays, reference = lists(), on_lists(formula, beta)
    output, gradient = evaluate(loss, arrays, beta=beta)
    np.testing.assert_allclose(output.loss, reference(arrays), rtol=1e-5, atol=1e-6)
    expected = central_differences(reference, arrays, "policy_logps")
    np.testing.assert_allclose(gradient, expected, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("loss", [plackett_luce_loss, pair_logistic_loss, lambda_loss], ids=lambda f: f.__name__)
def test_two_items_are_dpo(loss):
    arrays = lists(absent=False)
    arrays["mask"][:, 2:] = 0
    best = arrays["scores"][:, :2].argmax(-1)
    pair = {}
    for side, item in (("chosen", best), ("rejected", 1 - best)):
        for name in ("policy_logps", "reference_logps", "mask"):
            value = arrays[name][np.arange(4), item]
            pair[f"{side}_mask" if name == "mask" else name.replace("_", f"_{side}_")] = value
    expected = dpo_loss(**float32(pair), beta=1.0).loss
    if loss is lambda_loss:
        gain = 2 ** arrays["scores"]
        expected = expected * abs(gain[:, 0] - gain[:, 1]) * (1 / LOG2 - 1 / math.log(3))
    np.testing.assert_allclose(evaluate(loss, arrays, beta=1.0)[0].loss, expected, rtol=1e-5)


def test_lambda_with_equal_weights_would_be_pair_logistic():
    # One pair of different scores per list: the two losses differ by that pair's weight alone.
    ratios, scores = [[0.4, -1.0, 0.9]], [[1.0, 1.0, 0.0]]
    arrays = with_log_ratios(ratios, scores=scores)
    weights = [(1 / LOG2 - 1 / math.log(3)), (1 / LOG2 - 1 / math.log(4))]  # ranks 2, 3, 1
    expected = weights[0] * softplus(0.5) + weights[1] * softplus(1.9)
    np.testing.assert_allclose(evaluate(lambda_loss, arrays, beta=1.0)[0].loss[0], expected, rtol=1e-5)
    plain = evaluate(pair_logistic_loss, arrays, beta=1.0)[0].loss
    np.testing.assert_allclose(plain[0], softplus(0.5) + softplus(1.9), rtol=1e-5)


@pytest.mark.parametrize("loss", PAIRWISE, ids=lambda f: f.__name__)
def test_equal_scores_teach_pairs_nothing(loss):
    arrays = lists()
    arrays["scores"] = np.full_like(arrays["scores"], 0.7)
    output, gradient = evaluate(loss, arrays, beta=1.0)
    assert (output.loss == 0).all() and (gradient == 0).all()


def test_policy_equal_to_reference():
    arrays = with_log_ratios(np.zeros((1, 4)), scores=[[0.2, 0.9, 0.2, 0.0]])
    for loss, expected in (
        (plackett_luce_loss, math.log(math.factorial(4))),
        (pair_logistic_loss, 5 * LOG2),  # 6 pairs, one of them tied
        (list_softmax_loss, math.log(4)),
    ):
        np.testing.assert_allclose(evaluate(loss, arrays, beta=1.0)[0].loss[0], expected, rtol=1e-6)


@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
def test_only_pointwise_losses_see_a_common_shift(loss):
    ratios, scores = np.array([[0.3, -0.8, 1.1, 0.0]]), [[0.1, 0.8, 0.6, 0.3]]
    before, after = (evaluate(loss, with_log_ratios(r, scores=scores), beta=1.0)[0].loss for r in (ratios, ratios + 3))
    same = np.allclose(before[0], after[0], rtol=1e-5)
    assert same == (loss not in (point_mse_loss, point_sigmoid_loss))


@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
def test_items_have_no_place(loss):
    arrays, order = lists(), np.array([2, 0, 3, 1])
    moved = {name: value[:, order] for name, value in arrays.items()}
    (before, gradient), (after, moved_gradient) = evaluate(loss, arrays, beta=1.0), evaluate(loss, moved, beta=1.0)
    np.testing.assert_allclose(after.loss, before.loss, rtol=1e-5)
    for name, value in before.metrics.items():
        np.testing.assert_allclose(after.metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(moved_gradient, gradient[:, order], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
def test_nothing_of_an_absent_item_is_read(loss):
    arrays = lists()
    arrays["mask"][:, -1] = 0
    spoiled = {n: v.copy() for n, v in arrays.items()}
    for name in ("policy_logps", "reference_logps", "scores"):
        spoiled[name][:, -1] = np.nan
    (other, spoiled_gradient), (output, gradient) = (evaluate(loss, a, beta=1.0) for a in (spoiled, arrays))
    np.testing.assert_allclose(other.loss, output.loss, rtol=1e-5)
    for name, value in output.metrics.items():
        np.testing.assert_allclose(other.metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    np.testing.assert_array_equal(spoiled_gradient, gradient)
    assert (gradient[:, -1] == 0).all()


def test_plackett_luce_is_a_distribution_over_orders():
    orders = np.array(list(itertools.permutations(range(4))), float)  # all 24 as score rows
    ratios = np.tile([0.7, -1.2, 0.1, 2.0], (24, 1))
    nll = evaluate(plackett_luce_loss, with_log_ratios(ratios, scores=orders), beta=1.0)[0].loss
    np.testing.assert_allclose(np.exp(-nll).sum(), 1.0, rtol=1e-5)


def test_raising_the_best_item_never_costs_in_plackett_luce():
    ratios = np.tile([0.0, 0.5, -0.4], (9, 1))
    ratios[:, 1] += np.linspace(-4, 4, 9)
    arrays = with_log_ratios(ratios, scores=np.tile([0.2, 0.9, 0.5], (9, 1)))
    assert (np.diff(evaluate(plackett_luce_loss, arrays, beta=1.0)[0].loss) < 0).all()


def test_rewards_that_run_away_stay_finite():
    arrays = with_log_ratios([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]], scores=[[1.0, 0.5, 0.0]] * 2)
    for loss in LOSSES:
        output, gradient = evaluate(loss, arrays, beta=1.0)
        assert np.isfinite(output.loss).all() and np.isfinite(gradient).all(), loss.__name__
    np.testing.assert_allclose(evaluate(pair_logistic_loss, arrays, beta=1.0)[0].loss[:2], [1e4, 3e4], rtol=1e-6)


def test_negative_scores_have_no_weight_in_the_softmax_loss():
    for scores in ([0.0, 0.0], [-1.0, -0.5]):
        output, gradient = evaluate(list_softmax_loss, with_log_ratios([[0.3, 0.1]], scores=[scores]), beta=1.0)
        assert output.loss[0] == 0 and (gradient == 0).all()
    output, _ = evaluate(list_softmax_loss, with_log_ratios([[0.3, 0.1]], scores=[[0.5, -2.0]]), beta=1.0)
    np.testing.assert_allclose(output.loss[0], softplus(-0.2), rtol=1e-6)


def test_implicit_rewards():
    arrays = float32(lists())
    rewards = implicit_rewards(arrays["policy_logps"], arrays["reference_logps"], arrays["mask"], beta=0.2)
    np.testing.assert_allclose(rewards, 0.2 * log_ratios(lists()), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="beta is 0"):
        implicit_rewards(arrays["policy_logps"], arrays["reference_logps"], arrays["mask"], beta=0.0)


def test_labels_from_win_matrix():
    wins = np.array([[0.1, 0.8, 0.6, np.nan], [0.2, 0.3, 0.7, np.nan], [0.4, 0.3, 0.9, np.nan], [np.nan] * 4])
    labels = jax.jit(labels_from_win_matrix)(wins.astype(np.float32), np.array([1, 1, 1, 0]))
    expected = [(0.5 + 0.8 + 0.6) / 3, (0.2 + 0.5 + 0.7) / 3, (0.4 + 0.3 + 0.5) / 3, 0.0]
    np.testing.assert_allclose(labels, expected, rtol=1e-6)
    # A ranking as a matrix of 0 and 1 gives equally spaced labels, whatever is on the diagonal.
    order = np.triu(np.ones((4, 4)), 1)[None]
    np.testing.assert_allclose(labels_from_win_matrix(order, np.ones((1, 4))), [[0.875, 0.625, 0.375, 0.125]])


def test_ndcg_by_hand():
    rewards, scores = np.array([[0.1, 0.9, 0.5, 9.0]]), np.array([[2.0, 1.0, 0.0, 5.0]])
    item = np.array([[1, 1, 1, 0]])
    dcg = 3 / math.log2(4) + 1 / math.log2(2)
    np.testing.assert_allclose(ndcg(rewards, scores, item), [dcg / (3 / 1 + 1 / math.log2(3))], rtol=1e-6)
    assert ndcg(scores, scores, item)[0] == 1
    assert ndcg(rewards, 0 * scores, item)[0] == 0


def test_kendall_tau_by_hand():
    scores, item = np.array([[3.0, 2.0, 1.0, 1.0, 9.0]]), np.array([[1, 1, 1, 1, 0]])
    for rewards, expected in (
        ([4.0, 3.0, 2.0, 1.0, 0.0], 1.0),
        ([1.0, 2.0, 3.0, 4.0, 0.0], -1.0),
        ([2.0, 3.0, 1.0, 2.0, 0.0], (3 - 1) / 5),  # one pair of five wrong, one with equal rewards
    ):
        np.testing.assert_allclose(kendall_tau(np.array([rewards]), scores, item), [expected], rtol=1e-6)
    assert kendall_tau(scores, np.zeros((1, 5)), item)[0] == 0


def test_top1_accuracy_by_hand():
    scores = np.array([[0.5, 0.9, 0.9], [0.5, 0.9, 0.2], [0.5, 0.9, 0.2], [0.0, 0.0, 0.0]])
    rewards = np.array([[0.0, 1.0, 2.0], [3.0, 1.0, 2.0], [1.0, 5.0, 0.0], [0.0, 0.0, 0.0]])
    item = np.array([[1, 1, 1], [1, 1, 1], [1, 0, 1], [0, 0, 0]])
    np.testing.assert_array_equal(top1_accuracy(rewards, scores, item), [1, 0, 1, 0])


def test_metrics_of_a_list():
    output, _ = evaluate(plackett_luce_loss, with_log_ratios([[1.0, 4.0, -2.0]], scores=[[0.9, 0.5, 0.1]]), beta=1.0)
    got = {name: float(value[0]) for name, value in output.metrics.items()}
    expected_ndcg = numpy_dcg([0.5, 0.9, 0.1]) / numpy_dcg([0.9, 0.5, 0.1])
    expected = {"best_reward": 1.0, "margin": 0.0, "kendall_tau": 1 / 3, "top1_accuracy": 0.0, "ndcg": expected_ndcg}
    assert got == pytest.approx(expected, abs=1e-6)


def numpy_dcg(in_order):
    return sum((2**psi - 1) / math.log(2 + place) for place, psi in enumerate(in_order))

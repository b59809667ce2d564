"""TPO against float64 NumPy written from the formulas, step by step, and what it promises on trees."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lists import evaluate, lists, there
from numeric import central_differences, float32, softplus

from dpo_jax.language.methods.dpo import dpo_loss
from dpo_jax.language.methods.listwise import lambda_loss
from dpo_jax.language.methods.tree_po import (
    align_steps,
    split_tree,
    step_means,
    step_pair_rewards,
    step_similarity,
    step_similarity_weights,
    step_sums,
    tree_po_loss,
    tree_po_plain_loss,
    unit_scores,
)

B, K, T, S = 4, 4, 8, 4
LOG2 = math.log(2.0)


def trees(seed=0, *, steps=S, absent=True):
    """Lists whose responses have 2 to `steps` steps of some tokens, the last token outside; symmetric cosines."""
    arrays = lists(seed, rows=B, items=K, tokens=T, absent=absent)
    rng = np.random.default_rng([seed, 2])
    length = rng.integers(5, T + 1, (B, K, 1))
    arrays["mask"] = (np.arange(T) < length) * arrays["mask"].any(-1, keepdims=True).astype(float)
    cuts = rng.permuted(np.tile(np.arange(1, 4), (B, K, 1)), axis=-1)[..., : steps - 1]
    ids = (np.arange(T)[:, None] >= cuts[..., None, :]).sum(-1)
    ids = np.minimum(ids, rng.integers(2, steps + 1, (B, K, 1)) - 1)
    arrays["step_ids"] = np.where((arrays["mask"] > 0) & (np.arange(T) < length - 1), ids, -1)
    cosine = rng.uniform(-1, 1, (B, K, K, S))
    arrays["step_similarity"] = (cosine + cosine.swapaxes(1, 2)) / 2
    return arrays


def plain(arrays):
    return {name: value for name, value in arrays.items() if name != "step_similarity"}


def numpy_tree_po(beta, adaptive=True):
    """The loss, one list and one pair at a time."""

    def reference(a):
        return np.array([one(*row) for row in zip(*(a[n] for n in NAMES), there(a))])

    def one(policy, ref, mask, ids, v, cosine, t):
        count = min(ids[n].max() + 1 for n in range(K) if t[n])
        last = min(count, S) - 1
        rho = np.zeros((K, S))
        size = np.zeros((K, S))
        for n, token in itertools.product(range(K), range(T)):
            if mask[n, token] and ids[n, token] >= 0:
                rho[n, min(ids[n, token], last)] += policy[n, token] - ref[n, token]
                size[n, min(ids[n, token], last)] += 1
        s = beta * rho.sum(-1)
        rank = {n: 1 + sum(s[m] > s[n] for m in range(K) if t[m]) for n in range(K)}
        total = 0.0
        for i, j in itertools.permutations(np.flatnonzero(t), 2):
            if v[i] > v[j]:
                weight = np.where((size[i] > 0) & (size[j] > 0), 1 + cosine[i, j], 0.0) if adaptive else 1.0
                margin = beta * (weight * (rho[i] - rho[j])).sum()
                discount = abs(1 / math.log(1 + rank[i]) - 1 / math.log(1 + rank[j]))
                total += abs(2 ** v[i] - 2 ** v[j]) * discount * softplus(-margin)
        return total

    return reference


NAMES = ("policy_logps", "reference_logps", "mask", "step_ids", "scores", "step_similarity")


@pytest.mark.parametrize("loss", [tree_po_loss, tree_po_plain_loss], ids=lambda f: f.__name__)
def test_value_and_gradient_follow_the_formula(loss):
    arrays, reference = trees(), numpy_tree_po(0.5, adaptive=loss is tree_po_loss)
    output, gradient = evaluate(loss, arrays if loss is tree_po_loss else plain(arrays), beta=0.5)
    np.testing.assert_allclose(output.loss, reference(arrays), rtol=2e-5)
    expected = central_differences(reference, arrays, "policy_logps")
    np.testing.assert_allclose(gradient, expected, rtol=2e-4, atol=5e-6)
    assert (gradient[arrays["step_ids"] < 0] == 0).all()


def test_merged_steps_are_reported():
    arrays = trees()
    aligned = np.asarray(align_steps(arrays["step_ids"], arrays["mask"], num_steps=S))
    inside = arrays["step_ids"] >= 0
    expected = ((aligned != arrays["step_ids"]) & inside).sum((1, 2)) / inside.sum((1, 2))
    output, _ = evaluate(tree_po_loss, arrays, beta=0.5)
    assert expected.max() > 0.1
    np.testing.assert_allclose(output.metrics["merged_share"], expected, rtol=1e-6)


def test_without_weights_it_is_the_lambda_loss():
    arrays = trees()
    inside = {n: v for n, v in plain(arrays).items() if n != "step_ids"}
    inside["mask"] = arrays["mask"] * (arrays["step_ids"] >= 0)
    (output, gradient), (other, other_gradient) = (
        evaluate(tree_po_plain_loss, plain(arrays), beta=0.5),
        evaluate(lambda_loss, inside, beta=0.5),
    )
    np.testing.assert_allclose(output.loss, other.loss, rtol=1e-5)
    np.testing.assert_allclose(gradient, other_gradient, rtol=1e-5, atol=1e-7)


def test_two_responses_are_dpo():
    arrays = trees(absent=False)
    arrays["mask"][:, 2:] = 0
    arrays["step_ids"][:, 2:] = -1
    arrays["scores"][:, :2] = [1.0, 0.0]
    pair = {}
    for item, side in enumerate(("chosen", "rejected")):
        for name in ("policy", "reference"):
            pair[f"{name}_{side}_logps"] = arrays[f"{name}_logps"][:, item]
        pair[f"{side}_mask"] = (arrays["step_ids"][:, item] >= 0).astype(float)
    expected = 0.5324555 * np.asarray(dpo_loss(**float32(pair), beta=0.5).loss)
    np.testing.assert_allclose(evaluate(tree_po_plain_loss, plain(arrays), beta=0.5)[0].loss, expected, rtol=1e-5)


def test_steps_that_are_all_alike_double_beta():
    arrays = trees()
    arrays["step_similarity"] = np.ones((B, K, K, S))
    (output, gradient), (other, other_gradient) = (
        evaluate(tree_po_loss, arrays, beta=0.5),
        evaluate(tree_po_plain_loss, plain(arrays), beta=1.0),
    )
    np.testing.assert_allclose(output.loss, other.loss, rtol=1e-5)
    np.testing.assert_allclose(gradient, other_gradient, rtol=1e-4, atol=1e-6)


def test_policy_equal_to_reference():
    arrays = trees(absent=False)
    arrays["policy_logps"] = arrays["reference_logps"]
    # All rewards are 0, so ranks are places in the list.
    discount = 1 / np.log(2 + np.arange(K))
    gain = 2 ** arrays["scores"]
    weights = np.abs(gain[:, :, None] - gain[:, None]) * np.abs(discount[:, None] - discount)
    above = arrays["scores"][:, :, None] > arrays["scores"][:, None]
    output, _ = evaluate(tree_po_loss, arrays, beta=0.5)
    np.testing.assert_allclose(output.loss, LOG2 * (weights * above).sum((1, 2)), rtol=1e-5)


def test_tied_scores_teach_nothing():
    arrays = trees()
    arrays["scores"] = np.full((B, K), 0.4)
    output, gradient = evaluate(tree_po_loss, arrays, beta=0.5)
    assert (output.loss == 0).all() and (gradient == 0).all()


def test_responses_have_no_place():
    arrays, order = trees(), np.array([2, 0, 3, 1])
    moved = {name: value[:, order] for name, value in arrays.items()}
    moved["step_similarity"] = moved["step_similarity"][:, :, order]
    (output, gradient), (other, other_gradient) = (evaluate(tree_po_loss, a, beta=0.5) for a in (arrays, moved))
    np.testing.assert_allclose(other.loss, output.loss, rtol=1e-5)
    np.testing.assert_allclose(other_gradient, gradient[:, order], rtol=1e-4, atol=1e-6)


def test_a_shared_step_cancels():
    arrays = trees(absent=False)
    arrays["mask"][:, 2:] = 0
    arrays["step_ids"][:, 2:] = -1
    arrays["mask"][:, :2], arrays["step_ids"][:, :2] = 1, np.arange(T) // 2
    arrays["step_similarity"][..., 0] = 1.0
    for name in ("policy_logps", "reference_logps"):
        arrays[name][:, 1, :2] = arrays[name][:, 0, :2]
    other = {name: value.copy() for name, value in arrays.items()}
    other["policy_logps"][:, :2, :2] -= 3.0
    (output, gradient), (moved, _) = (evaluate(tree_po_loss, a, beta=0.5) for a in (arrays, other))
    np.testing.assert_allclose(moved.loss, output.loss, rtol=1e-5)
    assert (gradient[:, :2, :2] != 0).all()  # its weight is 2 ...
    np.testing.assert_allclose(gradient[:, 0, :2] + gradient[:, 1, :2], 0, atol=1e-7)  # ... on both sides


def test_a_better_order_has_a_lower_loss():
    arrays = trees(absent=False)
    arrays["step_similarity"] = np.zeros((B, K, K, S))
    first = np.arange(T) == 0
    losses = []
    for quality in (1.0, 0.5, -0.5, -1.0):  # rewards in the order of the scores, then against it
        ratio = 4 * quality * (arrays["scores"] - 0.5)
        policy = arrays["reference_logps"] + ratio[..., None] * first
        losses.append(evaluate(tree_po_loss, {**arrays, "policy_logps": policy}, beta=0.5)[0].loss)
    assert (np.diff(np.array(losses), axis=0) > 0).all()


def test_pair_rewards_are_antisymmetric():
    rng = np.random.default_rng(0)
    rho, weights = rng.normal(size=(2, K, S)), rng.uniform(0, 2, (2, K, K, S))
    rewards = np.asarray(step_pair_rewards(rho, weights + weights.swapaxes(1, 2), beta=0.5))
    np.testing.assert_allclose(rewards, -rewards.swapaxes(1, 2), atol=1e-6)


def test_what_stands_at_empty_steps_is_not_read():
    arrays = trees()
    ids = np.asarray(align_steps(arrays["step_ids"], arrays["mask"], num_steps=S))
    sizes = np.asarray(step_sums(np.ones((B, K, T)), ids, num_steps=S))
    both = (sizes[:, :, None] > 0) & (sizes[:, None] > 0)
    assert not both.all()
    spoiled = {**arrays, "step_similarity": np.where(both, arrays["step_similarity"], np.nan)}
    (output, gradient), (other, other_gradient) = (evaluate(tree_po_loss, a, beta=0.5) for a in (arrays, spoiled))
    np.testing.assert_array_equal(other.loss, output.loss)
    np.testing.assert_array_equal(other_gradient, gradient)


def test_log_ratios_that_run_away_stay_finite():
    arrays = trees()
    arrays["policy_logps"] = arrays["reference_logps"] + 2e3 * (-1.0) ** np.arange(K)[:, None]
    output, gradient = evaluate(tree_po_loss, arrays, beta=0.5)
    assert np.isfinite(output.loss).all() and np.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("step_ids", "num_steps", "expected"),
    [
        ([[0, 1, 2, -1], [0, 0, 1, 1]], 4, [[0, 1, 1, -1], [0, 0, 1, 1]]),
        ([[0, 1, 2, 3], [0, 1, 2, 2]], 2, [[0, 1, 1, 1], [0, 1, 1, 1]]),
        ([[0, 1, 2, 3], [-1, -1, -1, -1]], 4, [[0, 1, 2, 3], [-1, -1, -1, -1]]),  # no step: not the fewest
        ([[-1] * 4, [-1] * 4], 3, [[-1] * 4, [-1] * 4]),
    ],
)
def test_align_steps_by_hand(step_ids, num_steps, expected):
    aligned = align_steps(np.array(step_ids), np.ones((2, 4)), num_steps=num_steps)
    np.testing.assert_array_equal(aligned, expected)
    hidden = align_steps(np.array([[0, 1, 2, 9]]), np.array([[1, 1, 1, 0]]), num_steps=4)
    np.testing.assert_array_equal(hidden, [[0, 1, 2, -1]])  # ids behind the mask are not read


def test_steps_are_sums_and_means_of_their_tokens():
    ids = np.array([[0, 0, 2, -1], [1, 1, 1, 3]])
    values = np.array([[1.0, 2.0, 4.0, np.nan], [1.0, 2.0, 6.0, 5.0]])
    np.testing.assert_allclose(step_sums(values, ids, num_steps=3), [[3, 0, 4], [0, 9, 0]])
    means = step_means(np.stack([values, -values], -1), ids, num_steps=3)
    np.testing.assert_allclose(means[..., 0], [[1.5, 0, 4], [0, 3, 0]])
    np.testing.assert_allclose(means[..., 1], -means[..., 0])


def test_similarity_is_the_cosine_of_mean_states():
    rng = np.random.default_rng(0)
    arrays = trees()
    ids = np.asarray(align_steps(arrays["step_ids"], arrays["mask"], num_steps=S))
    hidden = rng.normal(size=(B, K, T, 5))
    got = np.asarray(jax.jit(lambda h: step_similarity(h, ids, num_steps=S))(hidden))
    assert got.shape == (B, K, K, S)
    for b, i, j, k in itertools.product(range(B), range(K), range(K), range(S)):
        a, c = hidden[b, i][ids[b, i] == k], hidden[b, j][ids[b, j] == k]
        expected = 0.0
        if len(a) and len(c):
            a, c = a.mean(0), c.mean(0)
            expected = a @ c / np.sqrt((a @ a) * (c @ c))
        np.testing.assert_allclose(got[b, i, j, k], expected, atol=1e-5)


def test_weights_stop_the_gradient_and_lie_between_0_and_2():
    similarity, sizes = jnp.array([[[[1.0, -1.0]] * 2] * 2]), jnp.array([[[2.0, 1.0], [1.0, 0.0]]])
    weights = step_similarity_weights(similarity, sizes)
    np.testing.assert_array_equal(weights, [[[[2, 0], [2, 0]], [[2, 0], [2, 0]]]])
    assert (jax.grad(lambda x: step_similarity_weights(x, sizes).sum())(similarity) == 0).all()


def test_split_tree():
    tree = [
        {
            "tokens": [1, 2],
            "children": [
                {"tokens": [3], "score": 100},
                {"tokens": [4, 5], "children": [{"tokens": [6], "score": -20.0}, {"tokens": [7], "score": 3}]},
            ],
        },
        {"tokens": [8], "score": -100.0},
    ]
    responses = split_tree(tree)
    assert responses.completions == [[1, 2, 3], [1, 2, 4, 5, 6], [1, 2, 4, 5, 7], [8]]
    assert responses.step_ids == [[0, 0, 1], [0, 0, 1, 1, 2], [0, 0, 1, 1, 2], [0]]
    assert responses.scores == [100.0, -20.0, 3.0, -100.0]
    assert split_tree([]) == ([], [], [])


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"tokens": [], "score": 1.0}, "node 1.0 has no tokens"),
        ({"tokens": [3]}, "node 1.0 should have either"),
        ({"tokens": [3], "children": [{"tokens": [4], "score": 1.0}], "score": 1.0}, "node 1.0 should have either"),
    ],
)
def test_a_bad_tree_is_refused(node, message):
    with pytest.raises(ValueError, match=message):
        split_tree([{"tokens": [1], "score": 0.0}, {"tokens": [2], "children": [node]}])


def test_unit_scores():
    np.testing.assert_allclose(unit_scores([100, 95, 0, -100, -130]), [1.0, 0.975, 0.5, 0.0, 0.0])
    np.testing.assert_allclose(unit_scores([1, 3, 5], low=1, high=5), [0.0, 0.5, 1.0])
    with pytest.raises(ValueError, match="low is 5 and high is 1"):
        unit_scores([1, 3, 5], low=5, high=1)

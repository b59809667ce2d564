"""The reward model's side of the game and the aligners, against float64 NumPy written from the formulas."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numeric import central_differences, softplus

from dpo_jax.language.methods.adversarial_po import (
    adversarial_difference_loss,
    adversarial_reward_loss,
    adversarial_term_mean_loss,
    rrhf_loss,
    select_best,
)
from dpo_jax.language.methods.reward_model import reward_pairs_loss

B, K, T = 6, 4, 5
GAME = (adversarial_reward_loss, adversarial_difference_loss, adversarial_term_mean_loss)


def lists(seed=0):
    """Human rows and gold-against-sample rows with absent items; the last place is empty."""
    rng = np.random.default_rng(seed)
    there = rng.random((B, K)) < 0.8
    there[0], there[-1] = True, False
    is_adversarial = np.arange(B) % 2
    is_adversarial[-1] = 0
    scores = rng.integers(0, 3, (B, K)).astype(float)
    scores = np.where(is_adversarial[:, None] == 1, np.arange(K) == 0, scores).astype(float)
    there[is_adversarial == 1, 0] = True
    return dict(
        policy_reward=rng.normal(0, 1.5, (B, K)),
        policy_logps=-rng.gamma(2.0, 0.7, (B, K, T)),
        scores=scores,
        mask=there[..., None] * (np.arange(T) < rng.integers(1, T + 1, (B, K, 1))).astype(float),
        is_adversarial=is_adversarial,
    )


def ordered(a):
    """(row, i, j) of all pairs with the score of i above that of j, both there."""
    for row, there in enumerate(a["mask"].any(-1)):
        for i, j in itertools.permutations(np.flatnonzero(there), 2):
            if a["scores"][row, i] > a["scores"][row, j]:
                yield row, i, j


def row_sums(a, difference=False):
    nll, count, r = np.zeros(B), np.zeros(B), a["policy_reward"]
    for row, i, j in ordered(a):
        gap = r[row, i] - r[row, j]
        nll[row] += -gap if difference and a["is_adversarial"][row] else softplus(-gap)
        count[row] += 1
    return nll, count


def numpy_game(a, preference_coef, adversarial_coef, samples, difference=False):
    nll, count = row_sums(a, difference)
    weight = np.where(a["is_adversarial"] == 1, adversarial_coef / samples, preference_coef)
    return weight * nll / count.sum() * a["mask"].any((-1, -2)).sum()


def numpy_term_mean(a, preference_coef, adversarial_coef):
    nll, count = row_sums(a)
    out, adversarial = np.zeros(B), a["is_adversarial"] == 1
    for kind, weight in ((adversarial, adversarial_coef), (~adversarial, preference_coef)):
        out[kind] = weight * nll[kind] / max(count[kind].sum(), 1)
    return out * a["mask"].any((-1, -2)).sum()


def numpy_rrhf(a, rank_coef, length_power):
    length = a["mask"].sum(-1)
    total = (a["policy_logps"] * a["mask"]).sum(-1)
    p = total / np.maximum(length, 1) ** length_power
    loss = np.zeros(B)
    for row, i, j in ordered(a):
        loss[row] += rank_coef * max(0.0, p[row, j] - p[row, i])
    for row in range(B):
        there = np.flatnonzero(length[row])
        if there.size:
            best = there[np.argmax(a["scores"][row, there])]
            loss[row] -= total[row, best] / length[row, best]
    return loss


GAME_NAMES = ("policy_reward", "mask", "scores", "is_adversarial")
RRHF_NAMES = ("policy_logps", "mask", "scores")
MEMBERS = [
    (adversarial_reward_loss, numpy_game, dict(preference_coef=1.0, adversarial_coef=0.1, samples=4)),
    (adversarial_reward_loss, numpy_game, dict(preference_coef=0.7, adversarial_coef=2.0, samples=1)),
    (
        adversarial_difference_loss,
        lambda a, **o: numpy_game(a, **o, difference=True),
        dict(preference_coef=0.7, adversarial_coef=2.0, samples=2),
    ),
    (adversarial_term_mean_loss, numpy_term_mean, dict(preference_coef=1.3, adversarial_coef=0.4)),
    (rrhf_loss, numpy_rrhf, dict(rank_coef=1.0, length_power=1.0)),
    (rrhf_loss, numpy_rrhf, dict(rank_coef=3.0, length_power=0.5)),
]


@functools.cache
def compiled(loss, options):
    def total(policy, rest):
        output = loss(**policy, **rest, **dict(options))
        return output.loss.sum(), output

    return jax.jit(jax.grad(total, has_aux=True))


def evaluate(loss, arrays, **options):
    """Output and gradient of the summed loss by the policy's array."""
    names = RRHF_NAMES if loss is rrhf_loss else GAME_NAMES
    inputs = {n: np.asarray(arrays[n], np.int32 if n == "is_adversarial" else np.float32) for n in names}
    policy = {names[0]: inputs.pop(names[0])}
    gradient, output = jax.device_get(compiled(loss, tuple(options.items()))(policy, inputs))
    return output, gradient[names[0]]


@pytest.mark.parametrize(("loss", "formula", "options"), MEMBERS)
@pytest.mark.parametrize("seed", [0, 1])
def test_value_and_gradient_against_the_formula(loss, formula, options, seed):
    arrays = lists(seed)
    output, gradient = evaluate(loss, arrays, **options)
    np.testing.assert_allclose(output.loss, formula(arrays, **options), rtol=1e-5, atol=1e-6)
    name = "policy_logps" if loss is rrhf_loss else "policy_reward"
    numeric = central_differences(lambda a: formula(a, **options), arrays, name)
    np.testing.assert_allclose(gradient, numeric, rtol=1e-4, atol=1e-6)


def test_defaults_are_the_authors():
    arrays = lists(2)
    expected = numpy_game(arrays, preference_coef=1.0, adversarial_coef=0.1, samples=4)
    np.testing.assert_allclose(evaluate(adversarial_reward_loss, arrays)[0].loss, expected, rtol=1e-5)


def test_without_adversarial_rows_it_is_the_list_loss():
    arrays = {**lists(), "is_adversarial": np.zeros(B, int)}
    inputs = {n: jnp.asarray(arrays[n], jnp.float32) for n in ("policy_reward", "mask", "scores")}
    expected = jax.jit(reward_pairs_loss)(**inputs)
    for loss in GAME:
        np.testing.assert_allclose(evaluate(loss, arrays)[0].loss, expected.loss, rtol=1e-5)


def test_adversarial_rows_count_in_the_denominator_even_at_weight_zero():
    arrays = lists()
    human = arrays["is_adversarial"] == 0
    nll, count = row_sums(arrays)
    there = arrays["mask"].any((-1, -2))
    loss = evaluate(adversarial_reward_loss, arrays, adversarial_coef=0.0)[0].loss
    assert not np.any(loss[~human])
    assert loss[there].mean() == pytest.approx(nll[human].sum() / count.sum(), rel=1e-5)
    by_term = evaluate(adversarial_term_mean_loss, arrays, adversarial_coef=0.0)[0].loss
    assert by_term[there].mean() == pytest.approx(nll[human].sum() / count[human].sum(), rel=1e-5)


@pytest.mark.parametrize("loss", GAME)
def test_symmetries(loss):
    """An offset of a row's rewards and the order of its items do not matter; equal scores have no gradient."""
    arrays = lists()
    output, gradient = evaluate(loss, arrays)
    moved = {**arrays, "policy_reward": arrays["policy_reward"] + np.arange(B)[:, None]}
    np.testing.assert_allclose(evaluate(loss, moved)[0].loss, output.loss, rtol=1e-4, atol=1e-6)
    order = [2, 0, 3, 1]
    turned = {n: v[:, order] if v.ndim > 1 else v for n, v in arrays.items()}
    other, other_gradient = evaluate(loss, turned)
    np.testing.assert_allclose(other.loss, output.loss, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(other_gradient, gradient[:, np.array(order)], rtol=1e-5, atol=1e-7)
    tied = {**arrays, "scores": arrays["scores"].copy()}
    tied["scores"][:2] = 1.0
    assert not np.any(evaluate(loss, tied)[1][:2])
    assert not np.any(gradient[~arrays["mask"].any(-1)])


def test_the_difference_has_the_same_slope_everywhere_and_the_ranking_loss_saturates():
    near = lists()
    adversarial = near["is_adversarial"] == 1
    far = {**near, "policy_reward": near["policy_reward"] + 100.0 * near["scores"]}
    for loss, same in ((adversarial_difference_loss, True), (adversarial_reward_loss, False)):
        slopes = [evaluate(loss, a)[1][adversarial] for a in (near, far)]
        assert np.any(slopes[0])
        assert np.allclose(slopes[0], slopes[1], atol=1e-7) == same
    assert not np.any(np.abs(evaluate(adversarial_reward_loss, far)[1][adversarial]) > 1e-6)


def test_metrics_tell_the_gap_of_gold_to_samples():
    arrays = lists()
    metrics = evaluate(adversarial_reward_loss, arrays)[0].metrics
    gaps = {row: [] for row in range(B)}
    for row, i, j in ordered(arrays):
        gaps[row].append(arrays["policy_reward"][row, i] - arrays["policy_reward"][row, j])
    for row, gap in gaps.items():
        assert metrics["pairs"][row] == len(gap)
        assert metrics["margin"][row] == pytest.approx(np.mean(gap) if gap else 0.0, rel=1e-4)
        assert metrics["accuracy"][row] == pytest.approx(np.mean(np.array(gap) > 0) if gap else 0.0)


def test_a_reward_model_of_the_game_moves_a_best_response_towards_gold():
    """Tabular game: the policy answers with softmax(log ref + r / beta); descent of r brings it to gold."""
    rng = np.random.default_rng(3)
    log_ref = jnp.asarray(np.log(rng.dirichlet(np.ones(5))), jnp.float32)
    gold = jnp.asarray(rng.dirichlet(np.ones(5)), jnp.float32)
    beta, answers = 1.0, jnp.arange(5)

    def loss(reward, policy):
        """All 25 pairs (gold answer, sample), weighted by their probabilities."""
        rewards = jnp.stack([jnp.repeat(reward, 5), jnp.tile(reward, 5)], -1)
        output = adversarial_difference_loss(
            policy_reward=rewards,
            mask=jnp.ones((25, 2, 1)),
            scores=jnp.tile(jnp.array([1.0, 0.0]), (25, 1)),
            is_adversarial=jnp.ones(25, int),
            adversarial_coef=1.0,
            samples=1,
        )
        return jnp.sum(output.loss * jnp.outer(gold, policy).ravel())

    reward, distances = jnp.zeros_like(gold) * answers, []
    slope = jax.jit(jax.grad(loss))
    for _ in range(40):
        policy = jax.nn.softmax(log_ref + reward / beta)
        distances.append(float(jnp.abs(policy - gold).sum() / 2))
        reward = reward - 0.5 * slope(reward, policy)
    assert distances[-1] < 0.2 * distances[0] and np.all(np.diff(distances) < 1e-6)


# RRHF and RAFT


def test_rrhf_without_a_rank_term_is_sft_on_the_best():
    arrays = lists()
    output = evaluate(rrhf_loss, arrays, rank_coef=0.0)[0]
    np.testing.assert_array_equal(output.loss, output.metrics["nll"])
    tied = {**arrays, "scores": np.ones((B, K))}
    tied["mask"][:, 0] = np.maximum(tied["mask"][:, 0], np.arange(T) == 0)
    output = evaluate(rrhf_loss, tied)[0]
    first = (tied["policy_logps"][:, 0] * tied["mask"][:, 0]).sum(-1) / tied["mask"][:, 0].sum(-1)
    np.testing.assert_allclose(output.loss, -first, rtol=1e-5)
    assert not np.any(output.metrics["rank"])


def test_rrhf_asks_nothing_of_a_policy_in_order():
    scores = np.tile(np.arange(K, dtype=float), (2, 1))
    logps = -np.tile((K - np.arange(K, dtype=float))[:, None], (2, 1, 1)) * np.ones((2, K, 3))
    arrays = dict(policy_logps=logps, mask=np.ones((2, K, 3)), scores=scores)
    output, gradient = evaluate(rrhf_loss, arrays)
    np.testing.assert_array_equal(output.metrics["rank"], 0.0)
    np.testing.assert_array_equal(output.metrics["accuracy"], 1.0)
    np.testing.assert_allclose(gradient[:, -1], -1 / 3, rtol=1e-6)
    assert not np.any(gradient[:, :-1])


def test_the_best_answer():
    scores = jnp.array([[1.0, 5.0, 3.0], [2.0, 2.0, 9.0], [1.0, 1.0, 1.0], [7.0, 8.0, np.nan]])
    there = jnp.array([[1, 1, 1], [0, 1, 0], [0, 0, 0], [1, 1, 0]])
    best = select_best(scores, there)
    np.testing.assert_array_equal(best.index, [1, 1, 0, 1])
    np.testing.assert_array_equal(best.keep, [1, 1, 0, 1])
    np.testing.assert_array_equal(select_best(jnp.zeros((1, 3)), jnp.ones((1, 3))).index, [0])


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (adversarial_reward_loss, dict(samples=0)),
        (rrhf_loss, dict(rank_coef=-1.0)),
        (rrhf_loss, dict(length_power=-1.0)),
    ]
    + [(loss, {name: -1.0}) for loss in GAME for name in ("preference_coef", "adversarial_coef")],
)
def test_options_out_of_range(loss, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        evaluate(loss, lists(), **options)

"""ADPO against float64 NumPy written from the formulas, its minimum and curvature, its targets and anchors."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lists import evaluate, lists, log_ratios, there, with_log_ratios
from numeric import assert_formula, central_differences, completions, float32, log_ratio, softplus

from dpo_jax.language.methods.adpo import (
    adaptive_temperature,
    adpo_adaptive_loss,
    adpo_loss,
    adpo_pair_loss,
    adpo_plackett_luce_loss,
    adpo_rewards_loss,
    advantage_targets,
    ema_anchor,
    kde_targets,
    kl_triggered_anchor,
    renormalise,
    softmax_targets,
    triggered_anchor,
)
from dpo_jax.language.methods.dpo import dpo_loss


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def with_targets(seed=0, **shape):
    arrays = lists(seed, **shape)
    arrays["target_probs"] = np.random.default_rng([seed, 1]).dirichlet(np.ones(arrays["scores"].shape[1]), 4)
    arrays["target_probs"][2, 0] = 0.0  # a target without mass: 0 log 0
    del arrays["scores"]
    return arrays


def targets_of(arrays):
    """Renormalised targets per list, absent candidates left out."""
    return [q[t] / q[t].sum() for q, t in zip(arrays["target_probs"], there(arrays))]


def entropy(q):
    return -(q[q > 0] * np.log(q[q > 0])).sum()


def kl(q, u):
    return (q[q > 0] * (np.log(q[q > 0]) - np.log(softmax(u))[q > 0])).sum()


def k3(arrays):
    d = arrays["reference_logps"] - arrays["policy_logps"]
    return ((np.exp(d) - d - 1) * arrays["mask"]).sum((1, 2)) / arrays["mask"].sum((1, 2))


def numpy_adpo(tau, anchor_kl_coef):
    def reference(arrays):
        items = zip(targets_of(arrays), log_ratios(arrays), there(arrays))
        return np.array([kl(q, r[t] / tau) for q, r, t in items]) + anchor_kl_coef * k3(arrays)

    return reference


def numpy_adaptive(tau, alpha, tau_min):
    def reference(arrays):
        out = []
        for q, r, t in zip(targets_of(arrays), log_ratios(arrays), there(arrays)):
            out.append(kl(q, r[t] / max(tau_min, tau * (1 - alpha * entropy(q) / math.log(len(q))))))
        return np.array(out)

    return reference


def numpy_rewards(tau, reward_temperature):
    def reference(arrays):
        items = zip(arrays["scores"], log_ratios(arrays), there(arrays))
        return np.array([kl(softmax(s[t] / reward_temperature), r[t] / tau) for s, r, t in items])

    return reference


def numpy_plackett_luce(tau):
    def reference(arrays):
        out = []
        means = log_ratios(arrays) / np.maximum(arrays["mask"].sum(-1), 1) / tau
        for u, s, t in zip(means, arrays["scores"], there(arrays)):
            u = u[t][np.argsort(-s[t])]
            out.append(sum(np.log(np.exp(u[k:]).sum()) - u[k] for k in range(len(u))))
        return np.array(out)

    return reference


def assert_list_formula(loss, reference, arrays, **options):
    output, gradient = evaluate(loss, arrays, **options)
    np.testing.assert_allclose(output.loss, reference(arrays), rtol=2e-5, atol=1e-6)
    expected = central_differences(reference, arrays, "policy_logps")
    np.testing.assert_allclose(gradient, expected, rtol=2e-4, atol=5e-6)


@pytest.mark.parametrize(("tau", "anchor_kl_coef"), [(1.0, 0.0), (0.3, 0.7)])
def test_list_value_and_gradient(tau, anchor_kl_coef):
    reference = numpy_adpo(tau, anchor_kl_coef)
    assert_list_formula(adpo_loss, reference, with_targets(), tau=tau, anchor_kl_coef=anchor_kl_coef)


@pytest.mark.parametrize("options", [(0.8, 0.5, 0.05), (2.0, 1.0, 1.2)])
def test_adaptive_value_and_gradient(options):
    named = dict(zip(("tau", "alpha", "tau_min"), options))
    assert_list_formula(adpo_adaptive_loss, numpy_adaptive(*options), with_targets(), **named)


def test_rewards_value_and_gradient():
    options = {"tau": 0.7, "reward_temperature": 0.4}
    assert_list_formula(adpo_rewards_loss, numpy_rewards(**options), lists(), **options)


def test_plackett_luce_value_and_gradient():
    assert_list_formula(adpo_plackett_luce_loss, numpy_plackett_luce(0.5), lists(), tau=0.5)


@pytest.mark.parametrize("tau", [2.0, 10.0])
def test_pair_value_and_gradient(tau):
    arrays = completions(("chosen", "rejected"), reference=True)
    arrays["label_prob"] = np.array([0.0, 0.3, 0.5, 0.8, 1.0])

    def formula(a):
        x, q = (log_ratio(a, "chosen") - log_ratio(a, "rejected")) / tau, a["label_prob"]
        return q * softplus(-x) + (1 - q) * softplus(x)

    assert_formula(adpo_pair_loss, formula, arrays, tau=tau)


def test_hard_pairs_are_dpo():
    arrays = float32(completions(("chosen", "rejected"), reference=True))
    hard = adpo_pair_loss(**arrays, label_prob=jnp.ones(5), tau=4.0)
    soft = dpo_loss(**arrays, beta=0.25)
    np.testing.assert_allclose(hard.loss, soft.loss, rtol=1e-6)
    np.testing.assert_allclose(hard.metrics["margin"], soft.metrics["margin"], rtol=1e-6)


def test_a_list_of_two_is_a_pair_up_to_the_targets_entropy():
    q = np.array([0.9, 0.4, 0.5, 1.0])
    arrays = with_log_ratios([[0.3, -0.8]] * 4, target_probs=np.stack([q, 1 - q], -1))
    x = 1.1 / 0.3
    entropies = np.array([entropy(np.array([p, 1 - p])) for p in q])
    expected = q * softplus(-x) + (1 - q) * softplus(x) - entropies
    np.testing.assert_allclose(
        evaluate(adpo_loss, arrays, tau=0.3, anchor_kl_coef=0.7)[0].metrics["list_kl"], expected, rtol=1e-5
    )


@pytest.mark.parametrize("tau", [0.3, 1.0])
def test_minimum_is_the_anchor_times_a_power_of_the_targets(tau):
    q = np.array([[0.5, 0.3, 0.15, 0.05], [0.25] * 4])
    arrays = with_log_ratios(tau * np.log(q) + 1.7, target_probs=q)  # a constant of the list is free
    output, gradient = evaluate(adpo_loss, arrays, tau=tau)
    np.testing.assert_allclose(output.loss, 0, atol=1e-6)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_a_fixed_teacher_is_sharpened():
    teacher, tau = np.array([[0.6, 0.3, 0.1]]), 1.0
    arrays = with_log_ratios(np.zeros((1, 3)), target_probs=teacher)
    arrays["reference_logps"][0, :3, 0] = np.log(teacher)
    arrays["policy_logps"][0, :3, 0] = (1 + tau) * np.log(teacher)
    assert np.abs(evaluate(adpo_loss, arrays, tau=tau)[1]).max() < 1e-6
    arrays["policy_logps"][0, :3, 0] = np.log(teacher)
    assert np.abs(evaluate(adpo_loss, arrays, tau=tau)[1]).max() > 0.1


def test_gradient_and_curvature():
    q, tau = np.array([0.5, 0.3, 0.15, 0.05]), 0.4
    ratios = np.array([0.3, -0.2, 0.6, 0.0])
    fixed = {n: v[:1] for n, v in float32(with_log_ratios([ratios], target_probs=[q])).items()}

    def total(sums, reference):
        logps = jnp.zeros((1, 4, 3)).at[0, :, 0].set(sums)
        anchor = jnp.zeros((1, 4, 3)).at[0, :, 0].set(reference)
        return adpo_loss(**{**fixed, "policy_logps": logps, "reference_logps": anchor}, tau=tau).loss.sum()

    gradient = jax.jit(jax.grad(total))(jnp.asarray(ratios, jnp.float32), jnp.zeros(4))
    np.testing.assert_allclose(gradient, (softmax(ratios / tau) - q) / tau, rtol=1e-4, atol=1e-6)
    anchor = jnp.asarray([1.0, -2.0, 0.5, 3.0])  # the curvature at the minimum does not know it
    hessian = jax.jit(jax.hessian(total))(anchor + tau * jnp.log(jnp.asarray(q, jnp.float32)), anchor)
    np.testing.assert_allclose(hessian, (np.diag(q) - np.outer(q, q)) / tau**2, rtol=1e-4, atol=1e-5)


def test_a_constant_of_the_list_is_free():
    arrays = with_targets()
    shifted = {**arrays, "policy_logps": arrays["policy_logps"] + 5.0 * (np.arange(3) == 0)}
    (before, gradient), (after, other) = (evaluate(adpo_loss, a, tau=1.0) for a in (arrays, shifted))
    np.testing.assert_allclose(after.loss, before.loss, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(other, gradient, rtol=1e-4, atol=1e-5)


def test_policy_equal_to_anchor_has_cross_entropy_log_p():
    arrays = with_targets()
    arrays["policy_logps"] = arrays["reference_logps"]
    output, _ = evaluate(adpo_loss, arrays, tau=1.0)
    expected = np.log(there(arrays).sum(-1))
    np.testing.assert_allclose(output.loss + output.metrics["target_entropy"], expected, rtol=1e-6)


@pytest.mark.parametrize("loss", [adpo_loss, adpo_adaptive_loss], ids=lambda f: f.__name__)
def test_one_candidate_and_no_mass_teach_nothing(loss):
    arrays = with_log_ratios([[0.7, 0.0], [2.0, -1.0], [0.0, 0.0]], target_probs=[[0.4, 0.6], [0.0, 0.0], [0.5, 0.5]])
    arrays["mask"][0, 1] = arrays["mask"][2] = 0
    output, gradient = evaluate(loss, arrays)
    assert (output.loss == 0).all() and (gradient == 0).all()


def test_uniform_anchor_is_distillation_on_the_list():
    q = np.array([[0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    logps = np.array([[-1.0, -2.0, -3.0, -1.5]] * 2)
    output, _ = evaluate(adpo_loss, with_log_ratios(logps, target_probs=q), tau=1.0)
    cross_entropy = -(q * np.log(softmax(logps[0]))).sum(-1)
    np.testing.assert_allclose((output.loss + output.metrics["target_entropy"])[:2], cross_entropy, rtol=1e-6)


def test_metrics_of_a_list():
    arrays = with_log_ratios([[0.0, 2.0, 1.0]], target_probs=[[0.7, 0.2, 0.1]])
    arrays["reference_logps"][0, :3, 0] = [-3.0, -1.0, -4.0]
    arrays["policy_logps"][0, :3, 0] = [-3.0, 1.0, -3.0]
    metrics = evaluate(adpo_loss, arrays, tau=1.0)[0].metrics
    assert metrics["accuracy"][0] == 0
    np.testing.assert_allclose(metrics["win_mass"][0], softmax(np.array([-3.0, 1.0, -3.0]))[0], rtol=1e-5)
    np.testing.assert_allclose(metrics["target_entropy"][0], entropy(np.array([0.7, 0.2, 0.1])), rtol=1e-6)


def test_log_ratios_that_run_away_stay_finite():
    arrays = with_log_ratios([[1e4, -1e4, 0.0], [-1e4, 0.0, 1e4]], target_probs=[[1.0, 0.0, 0.0]] * 2)
    output, gradient = evaluate(adpo_loss, arrays, tau=0.3, anchor_kl_coef=0.7)
    assert np.isfinite(output.loss).all() and np.isfinite(gradient).all()
    np.testing.assert_allclose(output.metrics["list_kl"][:2], [0, 2e4 / 0.3], rtol=1e-6)
    assert gradient[0, 1, 0] == 0  # beyond the cap the token penalty neither pulls nor pushes


@pytest.mark.parametrize("make", [softmax_targets, advantage_targets, kde_targets], ids=lambda f: f.__name__)
def test_targets_are_distributions_in_the_order_of_the_scores(make):
    targets = jax.jit(lambda scores, item: make(scores, item, reward_temperature=0.3))
    arrays = lists(seed=2)
    item, scores = there(arrays), np.where(there(arrays), arrays["scores"], np.nan)
    q = np.asarray(targets(scores, item))
    np.testing.assert_allclose(q.sum(-1), 1, rtol=1e-6)
    assert (q[~item] == 0).all()
    for row, s, t in zip(q, scores, item):
        np.testing.assert_array_equal(np.argsort(row[t]), np.argsort(s[t]))
    equal = targets(np.ones((4, 4)), np.array([[1, 1, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 1, 1]], bool))
    np.testing.assert_allclose(equal, [[1 / 3, 1 / 3, 0, 1 / 3], [0] * 4, [0, 1, 0, 0], [0.25] * 4], rtol=1e-6)
    with pytest.raises(ValueError, match="reward_temperature is 0"):
        make(scores, item, reward_temperature=0.0)


def test_targets_by_the_formula():
    scores, item = np.array([[2.0, -1.0, 0.5, 9.0, 0.0]]), np.array([[1, 1, 1, 0, 1]])
    s = scores[0][item[0] == 1]
    adv = (s - s.mean()) / s.std(ddof=1)
    width = 1.06 * s.std(ddof=1) * 4**-0.2
    cdf = [np.mean([0.5 * (1 + math.erf((a - b) / width / math.sqrt(2))) for b in s]) for a in s]
    logit = np.log(cdf) - np.log1p(-np.array(cdf))
    for make, values in ((softmax_targets, s), (advantage_targets, adv), (kde_targets, logit)):
        q = np.asarray(jax.jit(functools.partial(make, reward_temperature=0.7))(scores, item))[0]
        np.testing.assert_allclose(q[item[0] == 1], softmax(values / 0.7), rtol=1e-5, err_msg=make.__name__)


def test_an_outlier_has_no_size_in_kernel_targets():
    item, scores = np.ones((1, 5)), np.array([[0.0, 0.1, 0.2, 0.3, 1e6]])
    assert jax.jit(kde_targets)(scores, item)[0, 4] < 0.999
    assert jax.jit(softmax_targets)(scores, item)[0, 4] == 1


def test_renormalise():
    q = renormalise(
        jnp.array([[0.2, np.nan, 0.6], [0.0, 0.5, 0.0], [-1.0, 0.5, 1.5]]), jnp.array([[1, 0, 1], [1, 0, 1], [1, 1, 1]])
    )
    np.testing.assert_allclose(q, [[0.25, 0, 0.75], [0, 0, 0], [0, 0.25, 0.75]], rtol=1e-6)


def test_adaptive_temperature():
    q = jnp.array([[1.0, 0.0, 0.0], [1 / 3] * 3, [0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    item = jnp.array([[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 0, 0]])
    np.testing.assert_allclose(adaptive_temperature(q, item, tau=0.8, alpha=0.5), [0.8, 0.4, 0.4, 0.8], rtol=1e-5)
    np.testing.assert_allclose(adaptive_temperature(q, item, alpha=1.0, tau_min=0.1), [0.8, 0.1, 0.1, 0.8], rtol=1e-5)


def test_moving_average_anchor():
    anchor, policy = {"w": jnp.array([0.0, 2.0])}, {"w": jnp.array([1.0, 4.0])}
    np.testing.assert_allclose(ema_anchor(anchor, policy, decay=0.9)["w"], [0.1, 2.2], rtol=1e-6)
    for _ in range(50):
        anchor = ema_anchor(anchor, policy, decay=0.9)
    np.testing.assert_allclose(anchor["w"], [1 - 0.9**50, 4 - 2 * 0.9**50], rtol=1e-4)


def test_triggered_anchor_waits_for_the_mean_kl():
    state = triggered_anchor({"w": jnp.zeros(2, jnp.bfloat16)})
    step = jax.jit(lambda state, value, kl: kl_triggered_anchor(state, {"w": jnp.full(2, value)}, kl, threshold=0.1))
    seen = []
    for value, divergence in ((1.0, 0.05), (2.0, 0.12), (3.0, 0.2), (4.0, 0.05), (5.0, 0.3)):
        state = step(state, value, divergence)
        seen.append((float(state.anchor["w"][0]), int(state.steps)))
    # Means: 0.05, 0.085, 0.123 moves; then 0.05, 0.175 moves.
    assert seen == [(0.0, 1), (0.0, 2), (3.0, 0), (3.0, 1), (5.0, 0)]
    assert state.anchor["w"].dtype == jnp.bfloat16 and state.kl_sum == 0


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (adpo_loss, {"tau": 0.0}),
        (adpo_loss, {"anchor_kl_coef": -0.1}),
        (adpo_adaptive_loss, {"alpha": 1.5}),
        (adpo_adaptive_loss, {"tau_min": 0.0}),
        (adpo_rewards_loss, {"reward_temperature": -1.0}),
        (adpo_plackett_luce_loss, {"tau": float("inf")}),
    ],
)
def test_bad_options_are_refused(loss, options):
    arrays = lists() if loss in (adpo_rewards_loss, adpo_plackett_luce_loss) else with_targets()
    with pytest.raises(ValueError, match=next(iter(options))):
        loss(**float32(arrays), **options)


def test_bad_anchor_options_are_refused():
    with pytest.raises(ValueError, match="decay"):
        ema_anchor({}, {}, decay=1.5)
    with pytest.raises(ValueError, match="threshold"):
        kl_triggered_anchor(triggered_anchor({}), {}, jnp.zeros(()), threshold=0.0)

"""TDPO against float64 NumPy on logits, by which the divergences' gradients are checked too, and its reductions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numeric import central_differences

from dpo_jax.language.methods.dpo import dpo_loss
from dpo_jax.language.methods.token_dpo import sequential_kl, tdpo1_loss, tdpo2_loss, token_kl

B, T, V = 3, 4, 5
SIDES = ("chosen", "rejected")


def make_logits(seed=0, spread=1.0):
    """Float64 logits of policy and reference on both sides, tokens and ragged masks."""
    rng = np.random.default_rng(seed)
    case = {}
    for side in SIDES:
        case[f"reference_{side}"] = rng.normal(0, 1.5, (B, T, V))
        case[f"policy_{side}"] = case[f"reference_{side}"] + rng.normal(0, spread, (B, T, V))
        case[f"{side}_tokens"] = rng.integers(0, V, (B, T))
        case[f"{side}_mask"] = (np.arange(T) < rng.integers(1, T + 1, (B, 1))).astype(float)
    return case


def log_softmax(logits):
    return logits - np.logaddexp.reduce(logits, -1, keepdims=True)


def taken(logp, tokens):
    return np.take_along_axis(logp, tokens[..., None], -1)[..., 0]


def numpy_sums(case, side):
    """(M, K) of one side, float64 [B]."""
    log_pi, log_ref = log_softmax(case[f"policy_{side}"]), log_softmax(case[f"reference_{side}"])
    tokens, mask = case[f"{side}_tokens"], case[f"{side}_mask"]
    kl = (np.exp(log_ref) * (log_ref - log_pi)).sum(-1)
    return ((taken(log_pi, tokens) - taken(log_ref, tokens)) * mask).sum(-1), (kl * mask).sum(-1)


def numpy_tdpo1(case, beta):
    (m_w, k_w), (m_l, k_l) = numpy_sums(case, "chosen"), numpy_sums(case, "rejected")
    return np.logaddexp(0.0, -beta * (m_w - m_l - (k_l - k_w)))


def numpy_tdpo2(case, beta, alpha, k_chosen):
    """With K of the chosen side handed in as a number, since no gradient flows through it."""
    (m_w, _), (m_l, k_l) = numpy_sums(case, "chosen"), numpy_sums(case, "rejected")
    return np.logaddexp(0.0, -beta * (m_w - m_l - alpha * (k_l - k_chosen)))


def from_logits(case):
    """The arrays of the losses as functions of logits, float32."""
    arrays = {}
    for side in SIDES:
        tokens = jnp.asarray(case[f"{side}_tokens"])
        logits = {who: jnp.asarray(case[f"{who}_{side}"], jnp.float32) for who in ("policy", "reference")}
        for who, values in logits.items():
            logp = jax.nn.log_softmax(values, axis=-1)
            arrays[f"{who}_{side}_logps"] = jnp.take_along_axis(logp, tokens[..., None], -1)[..., 0]
        arrays[f"{side}_kl"] = token_kl(policy_logits=logits["policy"], reference_logits=logits["reference"])
        arrays[f"{side}_mask"] = jnp.asarray(case[f"{side}_mask"], jnp.float32)
    return arrays


def logit_gradients(loss, case):
    policy = {f"policy_{side}": jnp.asarray(case[f"policy_{side}"], jnp.float32) for side in SIDES}
    return jax.jit(jax.grad(lambda policy: loss(**from_logits({**case, **policy})).loss.sum()))(policy)


def formulas(case):
    k_chosen = numpy_sums(case, "chosen")[1]
    return [
        (tdpo1_loss, numpy_tdpo1, dict(beta=0.7)),
        (tdpo2_loss, functools.partial(numpy_tdpo2, k_chosen=k_chosen), dict(beta=0.7, alpha=0.5)),
        (tdpo2_loss, functools.partial(numpy_tdpo2, k_chosen=k_chosen), dict(beta=0.3, alpha=2.0)),
    ]


@pytest.mark.parametrize("member", range(3))
@pytest.mark.parametrize("seed", [0, 1])
def test_value_and_gradient_by_logits(member, seed):
    case = make_logits(seed)
    loss, formula, options = formulas(case)[member]
    function, loss = functools.partial(formula, **options), functools.partial(loss, **options)
    np.testing.assert_allclose(loss(**from_logits(case)).loss, function(case), rtol=2e-5)
    for name, gradient in logit_gradients(loss, case).items():
        np.testing.assert_allclose(gradient, central_differences(function, case, name), rtol=2e-4, atol=2e-6)


def test_defaults_are_the_papers():
    case = make_logits(2)
    k_chosen = numpy_sums(case, "chosen")[1]
    np.testing.assert_allclose(tdpo1_loss(**from_logits(case)).loss, numpy_tdpo1(case, 0.1), rtol=2e-5)
    expected = numpy_tdpo2(case, 0.1, 0.5, k_chosen)
    np.testing.assert_allclose(tdpo2_loss(**from_logits(case)).loss, expected, rtol=2e-5)


@pytest.mark.parametrize("loss", [tdpo1_loss, tdpo2_loss])
def test_metrics(loss):
    case, beta = make_logits(3), 0.3
    (m_w, k_w), (m_l, k_l) = numpy_sums(case, "chosen"), numpy_sums(case, "rejected")
    metrics = loss(**from_logits(case), beta=beta).metrics
    expected = dict(
        chosen_reward=beta * (m_w + k_w),
        rejected_reward=beta * (m_l + k_l),
        margin=beta * (m_w + k_w - m_l - k_l),
        chosen_log_ratio=m_w,
        rejected_log_ratio=m_l,
        chosen_kl=k_w,
        rejected_kl=k_l,
    )
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def without_kl(arrays):
    return {name: value for name, value in arrays.items() if not name.endswith("_kl")}


def dpo_by_logits(beta):
    return lambda **arrays: dpo_loss(**without_kl(arrays), beta=beta)


def test_tdpo2_without_alpha_is_dpo():
    case = make_logits(4)
    zero = functools.partial(tdpo2_loss, beta=0.4, alpha=0.0)
    dpo = dpo_by_logits(0.4)
    np.testing.assert_allclose(zero(**from_logits(case)).loss, dpo(**from_logits(case)).loss, rtol=1e-6)
    expected = logit_gradients(dpo, case)
    for name, gradient in logit_gradients(zero, case).items():
        np.testing.assert_allclose(gradient, expected[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("loss", [tdpo1_loss, tdpo2_loss])
def test_policy_equal_to_reference_starts_as_dpo(loss):
    case = make_logits(5, spread=0.0)
    output = loss(**from_logits(case), beta=0.4)
    np.testing.assert_allclose(output.loss, np.log(2.0), rtol=1e-6)
    for side in SIDES:
        np.testing.assert_allclose(output.metrics[f"{side}_kl"], 0.0, atol=1e-6)
    expected = logit_gradients(dpo_by_logits(0.4), case)
    for name, gradient in logit_gradients(functools.partial(loss, beta=0.4), case).items():
        np.testing.assert_allclose(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_tdpo2_with_alpha_one_has_the_value_of_tdpo1_and_another_gradient():
    case = make_logits(6)
    one = functools.partial(tdpo2_loss, alpha=1.0)
    np.testing.assert_allclose(one(**from_logits(case)).loss, tdpo1_loss(**from_logits(case)).loss, rtol=1e-6)
    a, b = logit_gradients(one, case), logit_gradients(tdpo1_loss, case)
    np.testing.assert_allclose(a["policy_rejected"], b["policy_rejected"], rtol=1e-5, atol=1e-7)
    assert np.abs(a["policy_chosen"] - b["policy_chosen"]).max() > 1e-3


def test_tdpo2_has_no_kl_gradient_on_the_chosen_side():
    case, beta = make_logits(7), 0.6
    z = -np.log(np.expm1(numpy_tdpo2(case, beta, 0.5, numpy_sums(case, "chosen")[1])))  # beta z from its softplus
    slope = -beta / (1 + np.exp(z))
    p = np.exp(log_softmax(case["policy_chosen"]))
    of_ratio = (np.eye(V)[case["chosen_tokens"]] - p) * case["chosen_mask"][..., None]
    gradient = logit_gradients(functools.partial(tdpo2_loss, beta=beta, alpha=0.5), case)["policy_chosen"]
    np.testing.assert_allclose(gradient, slope[:, None, None] * of_ratio, rtol=1e-4, atol=1e-6)


# The divergence


def test_token_kl_against_float64_and_under_shifts():
    case = make_logits(8, spread=3.0)
    policy, reference = case["policy_chosen"], case["reference_chosen"]
    log_pi, log_ref = log_softmax(policy), log_softmax(reference)
    expected = (np.exp(log_ref) * (log_ref - log_pi)).sum(-1)
    shift = np.random.default_rng(0).normal(0, 20, (2, B, T, 1))
    kl = token_kl(
        policy_logits=jnp.asarray(policy + shift[0], jnp.float32),
        reference_logits=jnp.asarray(reference + shift[1], jnp.float32),
    )
    assert np.all(kl >= 0)
    np.testing.assert_allclose(kl, expected, rtol=1e-4, atol=1e-5)


def test_log_ratios_centred_under_the_reference_cancel():
    case = make_logits(9)
    policy, reference = (jnp.asarray(case[f"{who}_chosen"], jnp.float32) for who in ("policy", "reference"))
    kl = token_kl(policy_logits=policy, reference_logits=reference)
    ratio = jax.nn.log_softmax(policy) - jax.nn.log_softmax(reference)
    centred = jnp.sum(jax.nn.softmax(reference) * (ratio + kl[..., None]), axis=-1)
    np.testing.assert_allclose(centred, 0.0, atol=1e-5)


@pytest.mark.parametrize("low", [-1e4, -np.inf])
def test_one_hot_reference_leaves_the_cross_entropy(low):
    case = make_logits(10)
    tokens, mask = case["chosen_tokens"], case["chosen_mask"]
    reference = jnp.asarray(np.where(np.eye(V)[tokens] > 0, 0.0, low), jnp.float32)

    def total(policy):
        return sequential_kl(policy_logits=policy, reference_logits=reference, mask=jnp.asarray(mask))

    policy = jnp.asarray(case["policy_chosen"], jnp.float32)
    expected = -(taken(log_softmax(case["policy_chosen"]), tokens) * mask).sum(-1)
    np.testing.assert_allclose(total(policy), expected, rtol=1e-5)
    gradient = jax.grad(lambda policy: total(policy).sum())(policy)
    by_hand = (np.exp(log_softmax(case["policy_chosen"])) - np.eye(V)[tokens]) * mask[..., None]
    np.testing.assert_allclose(gradient, by_hand, rtol=1e-4, atol=1e-6)


def test_words_that_both_models_rule_out_count_nothing():
    policy, reference = jnp.array([[0.3, -0.2, -jnp.inf]]), jnp.array([[1.0, 0.0, -jnp.inf]])
    kl = token_kl(policy_logits=policy, reference_logits=reference)
    np.testing.assert_allclose(kl, token_kl(policy_logits=policy[:, :2], reference_logits=reference[:, :2]), rtol=1e-6)
    gradient = jax.grad(lambda p: token_kl(policy_logits=p, reference_logits=reference).sum())(policy)
    assert np.all(np.isfinite(gradient))


def test_reference_gets_no_gradient_and_padding_none_at_all():
    case = make_logits(11)
    mask = jnp.asarray(case["chosen_mask"])
    policy, reference = (jnp.asarray(case[f"{who}_chosen"], jnp.float32) for who in ("policy", "reference"))
    of_policy, of_reference = jax.grad(
        lambda p, r: sequential_kl(policy_logits=p, reference_logits=r, mask=mask).sum(), argnums=(0, 1)
    )(policy, reference)
    assert np.all(of_reference == 0) and np.all(of_policy[mask == 0] == 0) and np.any(of_policy != 0)


@pytest.mark.parametrize(
    ("loss", "name", "value"),
    [(tdpo1_loss, "beta", 0.0), (tdpo2_loss, "beta", float("inf")), (tdpo2_loss, "alpha", -0.1)],
)
def test_options_out_of_range_are_refused(loss, name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        loss(**from_logits(make_logits()), **{name: value})

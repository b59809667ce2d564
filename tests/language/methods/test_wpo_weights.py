"""WPO's pair weights and loss against float64 NumPy, and what the weights promise for known policies."""

import functools

import jax
import jax.numpy as jnp
import numeric
import numpy as np
import pytest
from numeric import central_differences, float32, gradients

from dpo_jax.language.methods.dpo import dpo_loss
from dpo_jax.language.methods.wpo_weights import (
    greedy_alignment,
    pair_weight,
    sampled_alignment,
    sequence_log_weight,
    wpo_loss,
)

B, T, V = 5, 6, 9
SIDES = ("chosen", "rejected")


def pairs(seed=0):
    """Float64 pairs with ragged masks and collision statistics."""
    arrays, rng = numeric.pairs(seed), np.random.default_rng([seed, 1])
    return arrays | {f"policy_{side}_collision": -rng.gamma(2.0, 0.7, (B, T)) for side in SIDES}


def numpy_weight(a):
    log_weight = 0.0
    for side in SIDES:
        gap = a[f"policy_{side}_logps"] - a[f"policy_{side}_collision"]
        log_weight = log_weight + (gap * a[f"{side}_mask"]).sum(-1) / a[f"{side}_mask"].sum(-1)
    return np.minimum(1.0, np.exp(log_weight))


def numpy_dpo(a, beta):
    u, v = (((a[f"policy_{s}_logps"] - a[f"reference_{s}_logps"]) * a[f"{s}_mask"]).sum(-1) for s in SIDES)
    return np.logaddexp(0.0, -beta * (u - v))


def log_softmax(logits):
    return logits - np.logaddexp.reduce(logits, -1, keepdims=True)


def taken(logp, tokens):
    return np.take_along_axis(logp, tokens[..., None], -1)[..., 0]


@pytest.mark.parametrize("seed", [0, 1])
def test_loss_is_dpo_times_a_constant_weight(seed):
    arrays, beta = pairs(seed), 0.4
    weight = numpy_weight(arrays)
    assert (weight < 0.99).sum() >= 2, "the case must not be trivial"
    output = wpo_loss(**float32(arrays), beta=beta)
    np.testing.assert_allclose(output.metrics["pair_weight"], weight, rtol=1e-5)
    np.testing.assert_allclose(output.loss, weight * numpy_dpo(arrays, beta), rtol=2e-5)
    for name, gradient in gradients(functools.partial(wpo_loss, beta=beta), arrays).items():
        frozen = central_differences(lambda a: weight * numpy_dpo(a, beta), arrays, name)
        np.testing.assert_allclose(gradient, frozen, rtol=1e-4, atol=1e-6)


def test_default_is_the_papers():
    arrays = pairs(2)
    expected = numpy_weight(arrays) * numpy_dpo(arrays, 0.01)
    np.testing.assert_allclose(wpo_loss(**float32(arrays)).loss, expected, rtol=2e-5)


@pytest.mark.parametrize("kind", ["uniform", "argmax", "argmin"])
def test_weight_of_known_policies(kind):
    rng = np.random.default_rng(4)
    arrays = pairs()
    for side in SIDES:
        logits = np.zeros((B, T, V)) if kind == "uniform" else rng.normal(0, 2, (B, T, V))
        tokens = logits.argmin(-1) if kind == "argmin" else logits.argmax(-1)
        arrays[f"policy_{side}_logps"] = taken(log_softmax(logits), tokens)
        arrays[f"policy_{side}_collision"] = sampled_alignment(policy_logits=jnp.asarray(logits, jnp.float32))
    output = wpo_loss(**float32(arrays), beta=0.1)
    weight = output.metrics["pair_weight"]
    if kind == "argmin":
        assert np.all(weight < 1e-2)
    else:  # uniform: l = 0 exactly; greedy text: l > 0 and the cap binds
        np.testing.assert_allclose(weight, 1.0, rtol=1e-6)
        dpo = dpo_loss(**{n: v for n, v in float32(arrays).items() if not n.endswith("collision")}, beta=0.1)
        np.testing.assert_allclose(output.loss, dpo.loss, rtol=1e-6)


def test_alignments_against_float64():
    logp = log_softmax(np.random.default_rng(5).normal(0, 3, (B, T, V)))
    shifted = jnp.asarray(logp + 7.0, jnp.float32)  # a constant of the position cancels
    sampled, greedy = sampled_alignment(policy_logits=shifted), greedy_alignment(policy_logits=shifted)
    np.testing.assert_allclose(sampled, np.log(np.exp(2 * logp).sum(-1)), rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(greedy, logp.max(-1), rtol=1e-5, atol=2e-6)
    assert np.all(sampled <= greedy + 1e-6)


def test_sampled_alignment_of_a_vocabulary_that_underflows_squares():
    logits = jnp.zeros((1, 4)).at[0, 0].set(-200.0)
    np.testing.assert_allclose(sampled_alignment(policy_logits=logits), [-np.log(3.0)], rtol=1e-6)
    everything = jax.nn.log_softmax(jnp.zeros((1, 1 << 17)))  # p = 2^-17
    np.testing.assert_allclose(sampled_alignment(policy_logits=everything), -17 * np.log(2.0), rtol=1e-5)


def test_sampled_alignment_has_expectation_one_over_the_policy():
    logits = np.random.default_rng(6).normal(0, 2, V)
    logp = jnp.asarray(log_softmax(logits), jnp.float32)
    weight = jnp.exp(logp - sampled_alignment(policy_logits=jnp.asarray(logits, jnp.float32)))
    assert float(jnp.sum(jnp.exp(logp) * weight)) == pytest.approx(1.0, rel=1e-5)


def test_greedy_weights_never_exceed_one_nor_the_sampled_weights():
    rng = np.random.default_rng(7)
    logits = rng.normal(0, 2, (B, T, V))
    policy = jnp.asarray(logits, jnp.float32)
    mask = jnp.asarray(np.arange(T) < rng.integers(1, T + 1, (B, 1)))

    def log_weight(tokens, alignment):
        logps = jnp.asarray(taken(log_softmax(logits), tokens), jnp.float32)
        return sequence_log_weight(policy_logps=logps, alignment=alignment(policy_logits=policy), mask=mask)

    tokens = rng.integers(0, V, (B, T))
    assert np.all(log_weight(tokens, greedy_alignment) <= 0)
    assert np.all(log_weight(tokens, greedy_alignment) <= log_weight(tokens, sampled_alignment) + 1e-6)
    np.testing.assert_allclose(log_weight(logits.argmax(-1), greedy_alignment), 0.0, atol=1e-6)


def test_log_weight_is_a_mean_over_completion_tokens_and_zero_for_none():
    logps, alignment = jnp.array([[-1.0, -4.0, jnp.nan], [-1.0, -2.0, -3.0]]), jnp.full((2, 3), -0.5)
    mask = jnp.array([[1, 1, 0], [0, 0, 0]])
    np.testing.assert_allclose(sequence_log_weight(policy_logps=logps, alignment=alignment, mask=mask), [-2.0, 0.0])


def test_pair_weight_caps_the_sum_and_not_its_parts():
    weight = pair_weight(
        chosen_log_weight=jnp.array([1.0, 1.0, -800.0]), rejected_log_weight=jnp.array([-1.5, 0.5, 0.0])
    )
    np.testing.assert_allclose(weight, [np.exp(-0.5), 1.0, 0.0], rtol=1e-6)


def test_no_gradient_reaches_the_weight():
    def total(log_weight):
        return pair_weight(chosen_log_weight=log_weight, rejected_log_weight=log_weight).sum()

    np.testing.assert_array_equal(jax.grad(total)(jnp.array([-0.3, -2.0])), 0.0)


@pytest.mark.parametrize("beta", [0.0, float("inf")])
def test_beta_out_of_range_is_refused(beta):
    with pytest.raises(ValueError, match=f"beta is {beta}"):
        wpo_loss(**float32(pairs()), beta=beta)

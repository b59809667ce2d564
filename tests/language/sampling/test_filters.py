"""Logit filters against plain NumPy, against transformers, and by what they promise for any logits."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dpo_jax.language.sampling.filters import (
    GREEDY,
    Sampling,
    filtered_logps,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalise_repetition,
)

RNG = np.random.default_rng(0)
# Few different values, so that ties are common.
LOGITS = arrays(np.float32, (7,), elements=st.sampled_from([-4.0, -1.5, 0.0, 0.25, 0.5, 2.0, 6.0]))


def softmax(logits):
    logits = np.asarray(logits, np.float64)
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def kept_by_top_k(logits, k):
    return np.sum(logits[:, None] < logits, axis=1) < k


def kept_by_top_p(logits, p):
    kept, mass = np.zeros(len(logits), bool), 0.0
    for place in np.argsort(-logits, kind="stable"):
        if mass >= p - 1e-7:
            break
        kept[place] = True
        mass += softmax(logits)[place]
    return kept


def wanted(logits, sampling):
    """Probabilities after all filters, float64."""
    logits = np.asarray(logits, np.float64) / sampling.temperature
    if sampling.top_k:
        logits = np.where(kept_by_top_k(logits, sampling.top_k), logits, -np.inf)
    if sampling.top_p < 1:
        logits = np.where(kept_by_top_p(logits, sampling.top_p), logits, -np.inf)
    probs = softmax(logits)
    return softmax(np.where(probs >= sampling.min_p * probs.max() * (1 - 1e-7), logits, -np.inf))


@settings(max_examples=60, deadline=None)
@given(
    LOGITS,
    st.builds(
        Sampling,
        temperature=st.sampled_from([0.5, 1.0, 3.0]),
        top_k=st.sampled_from([0, 1, 3, 7, 90]),
        top_p=st.sampled_from([0.01, 0.33, 0.71, 0.993, 1.0]),
        min_p=st.sampled_from([0.0, 0.05, 0.31]),
    ),
)
def test_all_filters_together_are_those_of_numpy(logits, sampling):
    got = np.exp(filtered_logps(jnp.asarray(logits), sampling))
    assert got.dtype == np.float32 and got.sum() == pytest.approx(1, abs=1e-5)
    assert got[logits.argmax()] > 0  # the most probable word is never ruled out
    np.testing.assert_allclose(got, wanted(logits, sampling), atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(LOGITS, st.integers(1, 9), st.floats(0.05, 0.95))
def test_each_filter_only_takes_words_away(logits, k, p):
    for kept in (
        keep_top_k(jnp.asarray(logits), k=k),
        keep_top_p(jnp.asarray(logits), p=p),
        keep_min_p(jnp.asarray(logits), p=p),
    ):
        there = np.isfinite(kept)
        np.testing.assert_array_equal(kept[there], logits[there])
        assert logits[there].min() >= logits[~there].max(initial=-np.inf)  # the improbable go first
    assert np.isfinite(keep_top_k(jnp.asarray(logits), k=k)).sum() >= min(k, 7)
    assert softmax(logits)[np.isfinite(keep_top_p(jnp.asarray(logits), p=p))].sum() >= p - 1e-5


def test_ties_are_kept_by_top_k_and_cut_in_order_by_top_p():
    logits = jnp.array([0.0, 1.0, 1.0, 1.0])
    np.testing.assert_array_equal(np.isfinite(keep_top_k(logits, k=1)), [False, True, True, True])
    np.testing.assert_array_equal(np.isfinite(keep_top_p(logits, p=0.5)), [False, True, True, False])


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(top_k=1), Sampling(top_p=1e-6), Sampling(min_p=1.0)])
def test_the_narrowest_filters_take_the_most_probable_word(sampling):
    logits = RNG.normal(size=(5, 11)).astype(np.float32)
    logps = np.asarray(filtered_logps(jnp.asarray(logits), sampling))
    np.testing.assert_array_equal(logps.argmax(-1), logits.argmax(-1))
    np.testing.assert_allclose(logps.max(-1), 0, atol=1e-6)
    assert np.isneginf(np.sort(logps)[:, :-1]).all()


def test_greedy_takes_the_first_of_equals_and_words_at_minus_infinity_stay_out():
    logits = jnp.array([-jnp.inf, 2.0, 2.0])
    np.testing.assert_array_equal(filtered_logps(logits, GREEDY), [-np.inf, 0, -np.inf])
    everything = Sampling(temperature=0.5, top_k=2, top_p=0.9, min_p=0.1, repetition_penalty=1.5)
    logps = filtered_logps(logits, everything, jnp.array([True, False, False]))
    np.testing.assert_allclose(logps, [-np.inf, np.log(0.5), np.log(0.5)], atol=1e-6)


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    logits, seen = jnp.array([3.0, -3.0, 3.0, -3.0]), jnp.array([True, True, False, False])
    np.testing.assert_allclose(penalise_repetition(logits, seen, penalty=1.5), [2.0, -4.5, 3.0, -3.0])


def test_filters_and_penalty_are_those_of_transformers():
    torch = pytest.importorskip("torch", reason="compares filtered logits with those of transformers' processors")
    from transformers import (
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits, ids = RNG.normal(size=(6, 50)).astype(np.float32) * 3, RNG.integers(0, 50, (6, 9))
    theirs = torch.tensor(logits)
    for processor in (
        RepetitionPenaltyLogitsProcessor(1.3),
        TemperatureLogitsWarper(0.7),
        TopKLogitsWarper(20),
        TopPLogitsWarper(0.9),
        MinPLogitsWarper(0.05),
    ):
        theirs = processor(torch.tensor(ids), theirs)
    seen = np.zeros((6, 50), bool)
    np.put_along_axis(seen, ids, True, axis=1)
    sampling = Sampling(temperature=0.7, top_k=20, top_p=0.9, min_p=0.05, repetition_penalty=1.3)
    ours = filtered_logps(jnp.asarray(logits), sampling, jnp.asarray(seen))
    np.testing.assert_allclose(np.exp(ours), torch.softmax(theirs, -1).numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperature": -1.0}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -2}, "top_k is -2"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"min_p": 2.0}, "min_p is 2"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0"),
    ],
)
def test_numbers_out_of_range_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        Sampling(**options)


def test_a_penalty_needs_the_words_so_far():
    with pytest.raises(ValueError, match="seen"):
        filtered_logps(jnp.zeros(3), Sampling(repetition_penalty=2.0))

"""Dealing: every example once an epoch, batches of nearly equal totals, rows that are full."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_jax.language.data.dealing import assign_rows, deal_examples, plan_layout, plan_padded_layout, steps_per_epoch
from dpo_jax.language.data.pack import Layout, Lengths


def dialogue_lengths(count, seed=0):
    """Log-normal lengths: about 150 tokens of prompt, 60 of each completion, at most 1000 in all."""
    random = np.random.default_rng(seed)

    def draw(mean, most, *shape):
        sigma = 0.8
        sizes = random.lognormal(np.log(mean) - sigma**2 / 2, sigma, shape)
        return np.clip(sizes, 1, most).astype(np.int64)

    prompt, completions = draw(150, 500, count), draw(60, 250, count, 2)
    return Lengths(prompt, completions, completions)


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 90), batch_size=st.integers(1, 20), seed=st.none() | st.integers(0, 99))
def test_every_example_once_an_epoch(count, batch_size, seed):
    lengths = dialogue_lengths(count)
    dealt = deal_examples(lengths, batch_size=batch_size, seed=seed, epoch=3)
    assert dealt.shape == (steps_per_epoch(count, batch_size), batch_size)
    assert sorted(dealt[dealt >= 0]) == list(range(count))
    # Only the last batch may have empty places, and they are its last ones.
    assert (dealt.reshape(-1)[:count] >= 0).all()
    if seed is None:
        assert dealt.reshape(-1)[:count].tolist() == list(range(count))


def test_epochs_and_seeds_bring_other_examples_together():
    lengths = dialogue_lengths(320)
    some = [deal_examples(lengths, batch_size=16, seed=s, epoch=e) for s, e in [(0, 0), (0, 0), (0, 1), (1, 0)]]
    np.testing.assert_array_equal(some[0], some[1])

    def pairs(dealt):
        return {pair for batch in dealt for pair in itertools.combinations(sorted(batch.tolist()), 2)}

    # Two random deals of 320 examples to batches of 16 share 15 / 319 = 4.7 % of the pairs.
    for other in some[2:]:
        assert len(pairs(some[0]) & pairs(other)) / len(pairs(some[0])) < 0.1


@pytest.mark.parametrize("count", [400, 4000])
def test_batches_have_nearly_equal_totals(count):
    lengths = dialogue_lengths(count)
    dealt = deal_examples(lengths, batch_size=16, seed=0)
    totals = lengths.total[dealt].sum(1)
    shuffled = lengths.total[np.random.default_rng(0).permutation(count)].reshape(-1, 16).sum(1)
    assert totals.mean() / totals.max() > 0.975
    assert shuffled.mean() / shuffled.max() < 0.8
    predicted = lengths.completions.sum(1)[dealt].sum(1)
    assert predicted.mean() / predicted.max() > 0.7


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 99), st.integers(1, 6), st.integers(1, 12))
def test_rows_take_the_longest_first(seed, rows, batch_size):
    totals = np.random.default_rng(seed).integers(0, 30, (5, batch_size))
    assigned = assign_rows(totals, rows)
    assert ((assigned == -1) == (totals == 0)).all() and assigned.max() < rows
    for sizes, row in zip(totals, assigned, strict=True):
        loads = [0] * rows
        for size in sorted(sizes.tolist(), reverse=True):
            loads[loads.index(min(loads))] += size
        assert sorted(np.bincount(row[row >= 0], sizes[row >= 0], rows).tolist()) == sorted(loads)


@pytest.mark.parametrize("count", [1600, 20_000])
def test_dialogues_fill_packed_rows(count):
    lengths = dialogue_lengths(count)
    plan = plan_layout(lengths, batch_size=16, seed=0, steps=3 * steps_per_epoch(count, 16))
    assert plan.fill_rate >= 0.97
    padded = plan_padded_layout(lengths, batch_size=16)
    assert padded.fill_rate < 0.3
    assert plan.source_fill_rate > 3 * padded.source_fill_rate


def test_more_and_shorter_rows_while_they_stay_full():
    lengths = dialogue_lengths(6400)
    plan = plan_layout(lengths, batch_size=64, seed=0)
    assert plan.layout.rows > 1 and plan.fill_rate >= 0.97
    equal = Lengths(np.full(100, 8), np.full((100, 2), 4), np.full((100, 2), 4))
    assert plan_layout(equal, batch_size=8, seed=0).layout == Layout(8, 16, 16, 1, 2, 4)
    assert plan_layout(equal, batch_size=8, row_multiple=6, seed=0).layout.rows == 6


def test_row_length_can_be_bounded():
    lengths = dialogue_lengths(640)
    free = plan_layout(lengths, batch_size=16, seed=0)
    bound = int(lengths.total.max()) + 16
    short = plan_layout(lengths, batch_size=16, seed=0, max_row_length=bound)
    assert short.layout.length <= bound < free.layout.length
    with pytest.raises(ValueError, match="no row of at most 100 tokens"):
        plan_layout(lengths, batch_size=16, seed=0, max_row_length=100)
    with pytest.raises(ValueError, match="should be at least 1"):
        plan_layout(lengths, batch_size=0, seed=0)

"""Batches: every example once an epoch, one shape for all, the same on every mesh, host and after every resume."""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_jax.language.data.batches import (
    BatchIterator,
    BatchSource,
    assign_rows,
    batches,
    deal_examples,
    epoch_batches,
    plan_layout,
    plan_padded_layout,
    split_examples,
    steps_per_epoch,
)
from dpo_jax.language.data.pack import Layout, Lengths, example_lengths, fill_rate
from dpo_jax.language.types import Example


def make_examples(count, seed=0, most=20):
    """Pairs whose column `index` tells them apart."""
    random = np.random.default_rng(seed)

    def ids():
        return random.integers(0, 100, random.integers(1, most + 1)).astype(np.int32)

    return [Example(ids(), (ids(), ids()), {"index": np.int32(i)}) for i in range(count)]


def dialogue_lengths(count, seed=0):
    """Log-normal lengths: about 150 tokens of prompt, 60 of each completion, at most 1000 in all."""
    random = np.random.default_rng(seed)

    def draw(mean, most, *shape):
        sigma = 0.8
        sizes = random.lognormal(np.log(mean) - sigma**2 / 2, sigma, shape)
        return np.clip(sizes, 1, most).astype(np.int64)

    prompt, completions = draw(150, 500, count), draw(60, 250, count, 2)
    return Lengths(prompt, completions, completions)


def members(batch):
    return sorted(batch.columns["index"][batch.weight > 0].tolist())


def assert_same(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


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


@settings(max_examples=15, deadline=None)
@given(
    count=st.integers(1, 60),
    batch_size=st.integers(1, 9),
    row_multiple=st.integers(1, 4),
    seed=st.none() | st.integers(0, 9),
)
def test_plan_holds_every_planned_batch(count, batch_size, row_multiple, seed):
    examples = make_examples(count, count)
    steps = steps_per_epoch(count, batch_size) * (1 if seed is None else 2)
    options = {"batch_size": batch_size, "row_multiple": row_multiple}
    plan = plan_layout(example_lengths(examples), seed=seed, steps=steps, **options)
    padded = plan_padded_layout(example_lengths(examples), **options)
    for layout_plan, is_padded in [(plan, False), (padded, True)]:
        layout = layout_plan.layout
        assert layout.rows % row_multiple == 0
        source = BatchSource(examples, layout, batch_size=batch_size, seed=seed, padded=is_padded)
        made = [source[step] for step in range(steps)]
        assert np.mean([fill_rate(batch) for batch in made]) == pytest.approx(layout_plan.fill_rate, rel=1e-6)
        found = np.mean([(batch.target >= 0).mean() for batch in made])
        assert found == pytest.approx(layout_plan.source_fill_rate, rel=1e-6)
        epoch = [i for batch in made[: steps_per_epoch(count, batch_size)] for i in members(batch)]
        assert sorted(epoch) == list(range(count))


def test_members_do_not_depend_on_the_mesh_or_the_layout():
    examples = make_examples(50)
    lengths = example_lengths(examples)
    layouts = [plan_layout(lengths, batch_size=8, row_multiple=m, seed=5, steps=20).layout for m in (1, 4, 8)]
    sources = [BatchSource(examples, layout, batch_size=8, seed=5) for layout in layouts]
    padded_layout = plan_padded_layout(lengths, batch_size=8, row_multiple=3).layout
    sources.append(BatchSource(examples, padded_layout, batch_size=8, seed=5, padded=True))
    for step in (0, 6, 7, 19):  # the seventh batch is the last, partial one
        assert len({tuple(members(source[step])) for source in sources}) == 1
    assert len(members(sources[0][6])) == 2


@pytest.mark.parametrize("padded", [False, True])
def test_host_slices_make_up_the_batch(padded):
    examples = make_examples(30)
    lengths = example_lengths(examples)
    plan = plan_padded_layout if padded else plan_layout
    options = {} if padded else {"seed": 1, "steps": 10}
    layout = plan(lengths, batch_size=8, row_multiple=4, **options).layout
    shared = {"batch_size": 8, "seed": 1, "padded": padded}
    whole = BatchSource(examples, layout, **shared)
    parts = [BatchSource(examples, layout, host=host, hosts=4, **shared) for host in range(4)]
    for step in (0, 3, 5):  # the fourth batch has six examples, so that some hosts may have none
        joined = jax.tree.map(lambda *leaves: np.concatenate(leaves), *(part[step] for part in parts))
        assert_same(joined, whole[step])
        for part in parts:
            np.testing.assert_array_equal(part.places(step), whole.places(step))
    with pytest.raises(ValueError, match="do not divide among 3 hosts"):
        BatchSource(examples, layout, batch_size=8, seed=1, hosts=3)


@pytest.mark.parametrize("seed", [None, 4])
def test_places_tell_the_examples(seed):
    examples = make_examples(21)
    layout = plan_layout(example_lengths(examples), batch_size=4, row_multiple=2, seed=seed).layout
    source = BatchSource(examples, layout, batch_size=4, seed=seed)
    for step in range(6):
        batch, places = source[step], source.places(step)
        np.testing.assert_array_equal(places >= 0, batch.weight > 0)
        np.testing.assert_array_equal(places[places >= 0], batch.columns["index"][batch.weight > 0])


def test_resume_at_any_step_equals_the_uninterrupted_run():
    examples = make_examples(22)
    layout = plan_layout(example_lengths(examples), batch_size=4, seed=7, steps=16).layout
    options = {"batch_size": 4, "seed": 7}
    run = batches(examples, layout, **options)
    states, whole = [], []
    for _ in range(15):
        states.append(run.get_state())
        whole.append(next(run))
    source = BatchSource(examples, layout, **options)
    for step, batch in enumerate(whole):
        assert_same(batch, source[step])
    for step in (0, 1, 5, 6, 14):
        assert_same(next(batches(examples, layout, start_step=step, **options)), whole[step])
        resumed = batches(examples, layout, start_step=3, **options)
        next(resumed)
        resumed.set_state(states[step])
        assert resumed.step == step
        for batch in whole[step : step + 3]:
            assert_same(next(resumed), batch)


def test_evaluation_is_one_pass_in_order():
    examples = make_examples(10)
    layout = plan_layout(example_lengths(examples), batch_size=4, seed=None).layout
    source = epoch_batches(examples, layout, batch_size=4)
    assert len(source) == 3
    assert [members(batch) for batch in source] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [members(batch) for batch in BatchIterator(source)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert list(BatchIterator(source, start_step=3)) == []
    with pytest.raises(ValueError, match=r"not in \[0, 3\]"):
        BatchIterator(source, start_step=4)


def test_error_of_a_batch_reaches_the_loop():
    examples = make_examples(10)
    with pytest.raises(ValueError, match="plan a layout"):
        next(batches(examples, Layout(1, 16, 16, 4, 2, 20), batch_size=4, seed=0))


@settings(max_examples=50, deadline=None)
@given(
    prompts=st.lists(st.integers(0, 8), min_size=2, max_size=40),
    share=st.floats(0.01, 0.9) | st.integers(0, 10),
    seed=st.integers(0, 9),
)
def test_split_is_disjoint_and_keeps_prompts_together(prompts, share, seed):
    examples = [
        Example(np.array([p], np.int32), (np.array([1], np.int32),), {"index": i}) for i, p in enumerate(prompts)
    ]
    target = max(1, round(share * len(prompts))) if isinstance(share, float) else share
    if target >= len(prompts):
        with pytest.raises(ValueError, match="give a smaller part"):
            split_examples(examples, held_out=share, seed=seed)
        return
    train, held_out = split_examples(examples, held_out=share, seed=seed)
    indices = [[e.columns["index"] for e in side] for side in (train, held_out)]
    assert sorted(indices[0] + indices[1]) == list(range(len(prompts)))
    assert indices == [sorted(side) for side in indices]
    assert not {prompts[i] for i in indices[0]} & {prompts[i] for i in indices[1]}
    assert len(held_out) <= target
    # What is missing is less than the smallest group that was left in the training part.
    rest = [prompts.count(prompts[i]) for i in indices[0]]
    assert target - len(held_out) < min(rest)
    again = split_examples(examples, held_out=share, seed=seed)[1]
    assert [e.columns["index"] for e in again] == indices[1]


def test_split_depends_on_the_seed():
    examples = make_examples(60)
    chosen = [tuple(e.columns["index"] for e in split_examples(examples, held_out=0.2, seed=s)[1]) for s in range(3)]
    assert len(set(chosen)) == 3 and all(len(side) == 12 for side in chosen)

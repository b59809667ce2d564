"""Batches: one shape for all, the same on every mesh, host and after every resume."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_jax.language.data.batches import BatchIterator, BatchSource, batches, epoch_batches, split_examples
from dpo_jax.language.data.dealing import plan_layout, plan_padded_layout, steps_per_epoch
from dpo_jax.language.data.pack import Layout, example_lengths, fill_rate
from dpo_jax.language.types import Example


def make_examples(count, seed=0, most=20):
    """Pairs whose column `index` tells them apart."""
    random = np.random.default_rng(seed)

    def ids():
        return random.integers(0, 100, random.integers(1, most + 1)).astype(np.int32)

    return [Example(ids(), (ids(), ids()), {"index": np.int32(i)}) for i in range(count)]


def members(batch):
    return sorted(batch.columns["index"][batch.weight > 0].tolist())


def assert_same(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


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

"""Layouts: every prediction's visible keys are its own path; counts follow the FLOP model of prefix sharing."""

from dataclasses import fields, replace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_jax.language.data.pack import Layout, example_lengths, fill_rate, pack_rows, pad_rows
from dpo_jax.language.types import IGNORE, Example


def make_example(random, prompt, completions, columns=None, contexts=()):
    ids = [random.integers(0, 50, n).astype(np.int32) for n in (prompt, *completions)]
    before = tuple(random.integers(0, 50, n).astype(np.int32) for n in contexts)
    return Example(ids[0], tuple(ids[1:]), columns or {}, before)


def visible(subtree_end):
    """bool [..., q, k] by the rule k <= q < subtree_end[k]."""
    index = np.arange(subtree_end.shape[-1])
    return (index[None] <= index[:, None]) & (index[:, None] < subtree_end[..., None, :])


def visible_by_segments(row, length):
    """bool [q, k] from segment and branch numbers (arXiv 2410.20305), written from the examples alone."""
    segment, branch = np.zeros(length, int), np.zeros(length, int)
    at = 0
    for number, example in enumerate(row, 1):
        for part, ids in enumerate([example.prompt, *example.branches()]):
            segment[at : at + len(ids)], branch[at : at + len(ids)] = number, part
            at += len(ids)
    q, k = np.arange(length)[:, None], np.arange(length)[None]
    same = (segment[q] == segment[k]) & (segment[q] > 0)
    return same & (k <= q) & ((branch[k] == 0) | (branch[k] == branch[q]))


def tight_layout(assignment, *, padded=False):
    every = [example for row in assignment for example in row]
    completions = len(every[0].completions)
    lengths = example_lengths(every)
    longest = int(lengths.completions.max())
    if padded:
        segment = int((lengths.prompt + lengths.branches.max(1)).max())
        return Layout(len(assignment), completions * segment, completions * longest, 1, completions, longest)
    totals = [sum(len(e.prompt) + sum(map(len, e.branches())) for e in row) for row in assignment]
    predicted = [sum(sum(map(len, e.completions)) for e in row) for row in assignment]
    return Layout(len(assignment), max(totals), max(predicted), max(map(len, assignment)), completions, longest)


def read_back(batch):
    """What the source of each token sees (tokens, positions), and the targets, from the batch's arrays alone."""
    length = batch.tokens.shape[1]
    segment = length // batch.split
    found = {}
    for place in zip(*np.nonzero(batch.weight)):
        for k in range(batch.slots.shape[2]):
            slots = batch.slots[(*place, k)]
            slots = slots[slots >= 0]
            target, source = batch.target[place[0], slots], batch.source[place[0], slots]
            paths = []
            for where in source:
                block = slice(where // segment * segment, (where // segment + 1) * segment)
                mask = visible(batch.subtree_end[place[0], block])[where % segment]
                paths.append((batch.tokens[place[0], block][mask], batch.positions[place[0], block][mask]))
            found[(*place, k)] = (paths, target)
    return found


def assert_holds(batch, assignment):
    """Each slot's target is the right token, and what its source sees is exactly the tokens before it, in order."""
    found = read_back(batch)
    for r, row in enumerate(assignment):
        for e, example in enumerate(row):
            for k, completion in enumerate(example.completions):
                paths, target = found.pop((r, e, k))
                np.testing.assert_array_equal(target, completion)
                whole = np.concatenate([example.prompt, example.branches()[k]])
                start = len(whole) - len(completion)
                for i, (tokens, positions) in enumerate(paths):
                    np.testing.assert_array_equal(tokens, whole[: start + i])
                    np.testing.assert_array_equal(positions, np.arange(start + i))
                end = batch.ends[r, e, k]
                assert (end >= 0) == (len(completion) > 0) and (end < 0 or batch.tokens[r, end] == completion[-1])
    assert not found
    real = sum(map(len, (c for row in assignment for e in row for c in e.completions)))
    assert (batch.slots >= 0).sum() == real == (batch.target != IGNORE).sum()


@st.composite
def assignments(draw, most_in_row=3):
    seed, completions = draw(st.integers(0, 2**32)), draw(st.integers(1, 3))
    random = np.random.default_rng(seed)
    shape = draw(st.lists(st.integers(0, most_in_row), min_size=1, max_size=3).filter(any))
    # A length of zero is an absent item of a list; contexts stand before all completions or before none.
    lengths = st.lists(st.integers(0, 6), min_size=completions, max_size=completions).filter(any)
    contexts = st.lists(st.integers(0, 4), min_size=completions, max_size=completions) if draw(st.booleans()) else None

    def example():
        return make_example(
            random, draw(st.integers(1, 7)), draw(lengths), contexts=draw(contexts) if contexts is not None else ()
        )

    return [[example() for _ in range(n)] for n in shape]


@settings(max_examples=60, deadline=None)
@given(assignments(), st.integers(0, 5))
def test_packed_rows_hold_the_examples(assignment, spare):
    layout = tight_layout(assignment)
    loose = Layout(
        layout.rows + spare % 2,
        layout.length + spare,
        layout.source_length + spare,
        layout.examples + spare % 3,
        layout.completions,
        layout.completion_length + spare,
    )
    batch, padded = pack_rows(assignment, layout), pack_rows(assignment, loose)
    for each in (batch, padded):
        assert_holds(each, assignment)
    # Room that is not needed changes nothing in what is.
    for name in ("tokens", "positions", "subtree_end", "source", "target", "slots", "ends", "weight"):
        small, large = getattr(batch, name), getattr(padded, name)
        np.testing.assert_array_equal(small, large[tuple(slice(n) for n in small.shape)])
    assert (padded.target == IGNORE).sum() == padded.target.size - (batch.target != IGNORE).sum()


@settings(max_examples=40, deadline=None)
@given(assignments(most_in_row=1))
def test_padded_rows_hold_the_examples(assignment):
    layout = tight_layout(assignment, padded=True)
    batch = pad_rows(assignment, layout)
    assert batch.split == layout.completions
    assert_holds(batch, assignment)


@settings(max_examples=40, deadline=None)
@given(assignments())
def test_mask_is_that_of_segments_and_branches(assignment):
    batch = pack_rows(assignment, tight_layout(assignment))
    for row, subtree_end in zip(assignment, batch.subtree_end, strict=True):
        np.testing.assert_array_equal(visible(subtree_end), visible_by_segments(row, len(subtree_end)))


def test_counts_follow_the_flop_model():
    def triangle(n):
        return n * (n + 1) // 2

    random = np.random.default_rng(0)
    p, c, r = 9, 5, 3
    example = make_example(random, p, (c, r))
    packed = pack_rows([[example]], tight_layout([[example]]))
    mask = visible(packed.subtree_end)[0]
    assert mask.sum() == triangle(p) + c * p + triangle(c) + r * p + triangle(r)
    assert (packed.subtree_end > 0).sum() == p + c + r
    np.testing.assert_array_equal(mask.sum(1), [*range(1, p + 1), *range(p + 1, p + c + 1), *range(p + 1, p + r + 1)])
    padded = pad_rows([[example]], tight_layout([[example]], padded=True))
    segments = padded.subtree_end.reshape(2, -1)
    assert visible(segments).sum() == triangle(p + c) + triangle(p + r)
    assert (segments > 0).sum() == 2 * p + c + r
    assert fill_rate(packed) == 1.0
    assert fill_rate(padded) == (2 * p + c + r) / (2 * (p + c))


def test_order_of_examples_only_moves_them():
    random = np.random.default_rng(1)
    row = [make_example(random, p, (2, p), {"score": np.float32(p)}) for p in (3, 1, 5)]
    layout = tight_layout([row])
    one, other = pack_rows([row], layout), pack_rows([row[::-1]], layout)
    found = read_back(other)
    for (r, e, k), (paths, target) in read_back(one).items():
        other_paths, other_target = found[r, 2 - e, k]
        np.testing.assert_array_equal(target, other_target)
        for path, other_path in zip(paths, other_paths, strict=True):
            np.testing.assert_array_equal(path, other_path)
    np.testing.assert_array_equal(one.columns["score"], other.columns["score"][:, ::-1])


def test_columns_are_padded_to_the_layout():
    random = np.random.default_rng(2)

    def columns(n):
        return {
            "margin": np.float64(n),
            "label": np.bool_(True),
            "weights": np.full((2, n), 0.5, np.float32),
            "step_ids": np.full((2, n), 7, np.int64),
            "chosen_gain": np.full(n - 1, 2.0, np.float32),
            "scores": np.arange(3, dtype=np.float32),
        }

    row = [make_example(random, 2, (n - 1, n), columns(n)) for n in (3, 4)]
    batch = pack_rows([row], Layout(2, 30, 20, 3, 2, 6))
    shapes = {name: (value.shape, value.dtype.name) for name, value in batch.columns.items()}
    assert shapes == {
        "margin": ((2, 3), "float32"),
        "label": ((2, 3), "bool"),
        "weights": ((2, 3, 2, 6), "float32"),
        "step_ids": ((2, 3, 2, 6), "int32"),
        "chosen_gain": ((2, 3, 6), "float32"),
        "scores": ((2, 3, 3), "float32"),
    }
    np.testing.assert_array_equal(batch.columns["margin"], [[3, 4, 0], [0, 0, 0]])
    np.testing.assert_array_equal(batch.columns["weights"][0, 0, 1], [0.5, 0.5, 0.5, 0, 0, 0])
    np.testing.assert_array_equal(batch.columns["step_ids"][0, 1, 0], [7, 7, 7, 7, -1, -1])
    assert (batch.columns["step_ids"][1] == -1).all()
    np.testing.assert_array_equal(batch.columns["chosen_gain"][0, 0], [2, 2, 0, 0, 0, 0])
    np.testing.assert_array_equal(batch.weight, [[1, 1, 0], [0, 0, 0]])
    empty = pack_rows([], Layout(1, 30, 20, 3, 2, 6), like=row[0])
    assert {name: (value.shape[1:], value.dtype) for name, value in empty.columns.items()} == {
        name: (value.shape[1:], value.dtype) for name, value in batch.columns.items()
    }


def test_empty_batch_is_all_padding():
    for build in (pack_rows, pad_rows):
        batch = build([], Layout(2, 8, 4, 1, 2, 2))
        assert fill_rate(batch) == 0 and not batch.weight.any()
        assert (batch.target == IGNORE).all() and (batch.slots == -1).all()


def test_batch_is_a_pytree_led_by_rows():
    example = make_example(np.random.default_rng(3), 3, (2, 2), {"margin": np.float32(1)})
    batch = pack_rows([[example]] * 4, replace(tight_layout([[example]]), rows=4))
    leaves = jax.tree.leaves(batch)
    assert len(leaves) == len(fields(batch)) - 1 and all(leaf.shape[0] == 4 for leaf in leaves)
    assert {leaf.dtype.name for leaf in leaves} == {"int32", "float32"}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rows": 1}, "2 rows do not fit"),
        ({"length": 9}, "10 tokens do not fit"),
        ({"source_length": 5}, "6 completion tokens do not fit"),
        ({"examples": 1}, "2 examples in a row do not fit"),
        ({"completion_length": 1}, "2 tokens of a completion do not fit"),
        ({"completions": 3}, "has 2 completions; the layout has 3"),
    ],
)
def test_what_does_not_fit_is_an_error(change, message):
    random = np.random.default_rng(4)
    assignment = [[make_example(random, 2, (1, 2)) for _ in range(2)], []]
    with pytest.raises(ValueError, match=message):
        pack_rows(assignment, replace(tight_layout(assignment), **change))


def test_bad_examples_are_errors():
    random, layout = np.random.default_rng(5), Layout(1, 40, 20, 2, 2, 5)
    for lengths in [(0, (1, 1)), (1, (0, 0))]:
        with pytest.raises(ValueError, match="empty prompt or no completion"):
            pack_rows([[make_example(random, *lengths)]], layout)
    with pytest.raises(ValueError, match="segments"):
        pad_rows([[make_example(random, 1, (1, 1))]], Layout(1, 41, 20, 2, 2, 5))
    with pytest.raises(ValueError, match="segment length"):
        pad_rows([[make_example(random, 5, (1, 1))]], Layout(1, 10, 20, 2, 2, 5))
    good = make_example(random, 1, (1, 1), {"margin": np.float32(1)})
    for columns in ({}, {"other": np.float32(1)}, {"margin": np.zeros(3, np.float32)}):
        with pytest.raises(ValueError, match="column"):
            pack_rows([[good, make_example(random, 1, (1, 1), columns)]], layout)
    integer = make_example(random, 1, (1, 1), {"margin": np.int32(1)})
    with pytest.raises(ValueError, match="column 'margin' is float32"):
        pack_rows([[integer, good]], layout)
    with pytest.raises(ValueError, match=r"\[1, 2\] completions"):
        example_lengths([make_example(random, 1, (1,)), good])
    with pytest.raises(ValueError, match="no examples"):
        example_lengths([])

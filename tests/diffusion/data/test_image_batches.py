"""Batches of images: a function of seed and step, in buckets, on any number of hosts, with captions dropped."""

from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_jax.diffusion.data.batches import ImageExample, batches, collate, deal, epoch_batches, steps_per_epoch

BUCKETS = ((2, 2), (2, 4))
EMPTY = "nothing"


def examples_of(count: int, *, captions: int = 1) -> list[ImageExample]:
    """Pairs with the number of their row in every array; every third in the wide bucket."""
    return [
        ImageExample(
            images=(f"i{n}", f"j{n}"),
            captions=tuple(f"c{n}.{place}" for place in range(captions)),
            bucket=BUCKETS[n % 3 == 2],
            sizes=np.full((2, 6), n),
            columns={"row": n, "margin": n / 2, "scores": [n, 0.5]},
        )
        for n in range(count)
    ]


def store_of(examples: list[ImageExample]) -> dict[str, dict[str, np.ndarray]]:
    store = {EMPTY: {"states": np.full((3, 2), -1, np.float32), "pooled": np.full(4, -1, np.float32)}}
    for n, example in enumerate(examples):
        for sign, key in zip((1, -1), example.images):
            shape = (*example.bucket, 4)
            store[key] = {"latents": np.full(shape, sign * n, np.float16), "spread": np.ones(shape, np.float16)}
        for place, key in enumerate(example.captions):
            states = np.full((3, 2), n + place / 10, np.float32)
            store[key] = {"states": states, "pooled": states[:2].ravel()}
    return store


def rows_of(batch) -> list[int]:
    """Numbers of the rows of the places that are not empty."""
    return [int(n) for n in batch.columns["row"][batch.weight > 0]]


def equal(a, b) -> None:
    import jax

    jax.tree.map(np.testing.assert_array_equal, a, b)


EXAMPLES = examples_of(11)
STORE = store_of(EXAMPLES)


def stream(**options):
    given = {"batch_size": 4, "seed": 3, "caption_dropout": 0.5, "empty": EMPTY, **options}
    return batches(EXAMPLES, STORE, **given)


def test_arrays_of_a_batch():
    batch = collate(EXAMPLES, np.array([4, 0, -1]), STORE, filler=0)
    assert batch.spread is not None and batch.latents.shape == batch.spread.shape == (3, 2, 2, 2, 4)
    np.testing.assert_array_equal(batch.latents[:, :, 0, 0, 0], [[4, -4], [0, 0], [0, 0]])
    np.testing.assert_array_equal(batch.weight, [1, 1, 0])
    assert batch.weight.dtype == np.float32
    assert batch.condition.states.shape == (3, 1, 3, 2) and batch.condition.pooled.shape == (3, 1, 4)
    np.testing.assert_array_equal(batch.condition.sizes, np.broadcast_to([[[4]], [[0]], [[0]]], (3, 2, 6)))
    assert batch.condition.mask is None
    assert {name: (x.dtype, x.shape) for name, x in batch.columns.items()} == {
        "row": (np.int32, (3,)),
        "margin": (np.float32, (3,)),
        "scores": (np.float32, (3, 2)),
    }


def test_captions_of_each_image_and_no_posterior():
    examples = examples_of(3, captions=2)
    store = store_of(examples)
    store = {key: {name: x for name, x in entry.items() if name != "spread"} for key, entry in store.items()}
    batch = collate(examples, np.array([1]), store, filler=1)
    np.testing.assert_allclose(batch.condition.states[0, :, 0, 0], [1, 1.1])
    assert batch.spread is None


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 17), size=st.integers(1, 6), seed=st.integers(0, 9), epoch=st.integers(0, 3))
def test_every_epoch_holds_every_example_once_and_buckets_never_mix(count, size, seed, epoch):
    examples = examples_of(count)
    dealt = deal(examples, batch_size=size, seed=seed, epoch=epoch)
    assert len(dealt) == steps_per_epoch(examples, size)
    assert sorted(place for places in dealt for place in places if place >= 0) == list(range(count))
    for places in dealt:
        assert len(places) == size and places.max() >= 0
        assert len({examples[place].bucket for place in places if place >= 0}) == 1


def test_epochs_and_seeds_differ_and_evaluation_keeps_the_order():
    def dealt(**options):
        return np.concatenate(deal(EXAMPLES, batch_size=4, **options)).tolist()

    assert dealt(seed=0) != dealt(seed=0, epoch=1) and dealt(seed=0) != dealt(seed=1)
    assert dealt(seed=0) == dealt(seed=0, epoch=0)
    assert dealt(seed=None) == [0, 1, 3, 4, 6, 7, 9, 10, 2, 5, 8, -1]


def test_a_stream_goes_on_anywhere():
    whole = list(islice(stream(), 9))
    for start in (1, 2, 3, 4, 7, 8):
        for a, b in zip(whole[start:], stream(start_step=start)):
            equal(a, b)


@pytest.mark.parametrize("hosts", [2, 4])
def test_slices_of_hosts_are_the_batch_of_one(hosts):
    import jax

    several = [islice(stream(host=host, hosts=hosts), 7) for host in range(hosts)]
    for whole, *parts in zip(stream(), *several):
        equal(whole, jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts))


def test_an_epoch_of_a_stream_and_of_an_evaluation():
    count = steps_per_epoch(EXAMPLES, 4)
    assert count == 3
    for start in (0, count, 2 * count):
        rows = [row for batch in islice(stream(start_step=start), count) for row in rows_of(batch)]
        assert sorted(rows) == list(range(11))
    held = list(epoch_batches(EXAMPLES, STORE, batch_size=4))
    assert [rows_of(batch) for batch in held] == [[0, 1, 3, 4], [6, 7, 9, 10], [2, 5, 8]]
    halves = [epoch_batches(EXAMPLES, STORE, batch_size=4, host=host, hosts=2) for host in range(2)]
    for whole, a, b in zip(held, *halves):
        np.testing.assert_array_equal(whole.latents, np.concatenate([a.latents, b.latents]))


def test_seeds_of_rows_differ_with_place_step_and_run_and_are_fixed_in_an_evaluation():
    seeds = np.stack([batch.seeds for batch in islice(stream(), 8)])
    assert seeds.dtype == np.uint32 and np.unique(seeds).size == 32
    other = np.stack([batch.seeds for batch in islice(stream(seed=4), 8)])
    assert not np.intersect1d(seeds, other).size
    held = np.stack([batch.seeds for batch in epoch_batches(EXAMPLES, STORE, batch_size=4)])
    assert held.dtype == np.uint32 and held.ravel()[:11].tolist() == [0, 1, 3, 4, 6, 7, 9, 10, 2, 5, 8]


def test_a_host_may_have_nothing_but_empty_places():
    (batch,) = epoch_batches(EXAMPLES[:1], STORE, batch_size=4, host=1, hosts=2)
    assert batch.weight.tolist() == [0, 0] and np.isfinite(batch.latents.astype(np.float32)).all()
    batch = next(batches(EXAMPLES[:1], STORE, batch_size=4, seed=0, host=1, hosts=2))
    assert batch.weight.tolist() == [0, 0]


def dropped_of(batch) -> np.ndarray:
    return np.asarray(batch.condition.states)[:, 0, 0, 0] == -1


def test_captions_are_dropped_at_their_rate():
    drawn = np.concatenate([dropped_of(batch) for batch in islice(stream(caption_dropout=0.2), 300)])
    assert abs(drawn.mean() - 0.2) < 4 * np.sqrt(0.2 * 0.8 / len(drawn))
    assert not any(dropped_of(batch).any() for batch in islice(stream(caption_dropout=0.0), 20))
    assert all(dropped_of(batch).all() for batch in islice(stream(caption_dropout=1.0), 20))


def test_dropping_changes_nothing_else_and_is_drawn_anew_for_every_step():
    with_captions, without = islice(stream(caption_dropout=0.0), 60), islice(stream(), 60)
    drops = []
    for a, b in zip(with_captions, without):
        np.testing.assert_array_equal(a.latents, b.latents)
        gone = dropped_of(b)
        np.testing.assert_array_equal(a.condition.states[~gone], b.condition.states[~gone])
        np.testing.assert_array_equal(b.condition.pooled[gone], -1)
        drops.append(tuple(gone))
    assert len(set(drops)) > 10
    assert drops == [tuple(dropped_of(batch)) for batch in islice(stream(), 60)]
    assert drops != [tuple(dropped_of(batch)) for batch in islice(stream(seed=4), 60)]


def test_all_captions_of_a_row_are_dropped_together():
    examples = examples_of(8, captions=2)
    drawn = batches(examples, store_of(examples), batch_size=4, seed=0, caption_dropout=0.5, empty=EMPTY)
    for batch in islice(drawn, 20):
        first, second = np.asarray(batch.condition.states)[:, :, 0, 0].T
        np.testing.assert_array_equal(first == -1, second == -1)


def test_what_cannot_be_dealt_is_refused():
    with pytest.raises(ValueError, match="batches of 5 do not fall evenly on 2 processes"):
        next(batches(EXAMPLES, STORE, batch_size=5, seed=0, hosts=2))
    with pytest.raises(ValueError, match=r"caption_dropout is 0\.1, but there is no empty caption"):
        next(batches(EXAMPLES, STORE, batch_size=5, seed=0, caption_dropout=0.1))

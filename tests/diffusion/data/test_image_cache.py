"""The cache: keys of content, files that are whole or not there, fills that go on, and several hosts."""

import multiprocessing
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_jax.diffusion.data.cache import Cache, content_key, fill


def entry(number: int) -> dict[str, np.ndarray]:
    return {"latents": np.full((2, 3), number, np.float16), "spread": np.full((2, 3), -number, np.float32)}


def maker(calls: list[list[int]]):
    def make(places):
        calls.append(places)
        return [entry(place) for place in places]

    return make


def assert_holds(cache, keys):
    for number, key in enumerate(keys):
        for name, array in entry(number).items():
            np.testing.assert_array_equal(cache[key][name], array)
            assert cache[key][name].dtype == array.dtype


KEYS = [content_key("image", number) for number in range(7)]
parts = st.lists(st.binary(max_size=4) | st.text(max_size=4) | st.integers() | st.lists(st.integers(), max_size=2))


@given(parts, parts)
def test_keys_are_equal_where_their_parts_are(first, second):
    assert (content_key(*first) == content_key(*second)) == (first == second)
    assert len(content_key(*first)) == 32


def test_a_key_knows_where_its_parts_end():
    assert len({content_key("ab", "c"), content_key("a", "bc"), content_key("abc"), content_key("", "abc")}) == 4
    assert content_key(b"1") != content_key("1") and content_key(1) != content_key("1")


def test_entries_are_made_once_and_read_by_another(tmp_path):
    calls: list[list[int]] = []
    cache = Cache(tmp_path / "new" / "cache")
    said = []
    assert fill(cache, KEYS, maker(calls), together=3, progress=lambda *n: said.append(n)) == 7
    assert calls == [[0, 1, 2], [3, 4, 5], [6, 6, 6]]
    assert said == [(3, 7), (6, 7), (7, 7)]
    for again in (cache, Cache(tmp_path / "new" / "cache")):
        assert len(again) == 7 and set(again) == set(KEYS) and not again.broken
        assert_holds(again, KEYS)
        assert fill(again, KEYS, maker(calls), together=3) == 0
    assert len(calls) == 3
    assert {path.suffix for path in cache.folder.iterdir()} == {".safetensors"}


def test_repeated_keys_are_made_once(tmp_path):
    calls: list[list[int]] = []
    fill(Cache(tmp_path), [KEYS[0], KEYS[1], KEYS[0], KEYS[1], KEYS[2]], maker(calls), together=4)
    assert calls == [[0, 1, 4, 4]]


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_passed_over_and_made_again(tmp_path, keep):
    cache = Cache(tmp_path)
    fill(cache, KEYS, maker([]), together=4)
    path = sorted(tmp_path.glob("*"))[0]
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    again, calls = Cache(tmp_path), []
    assert again.broken == [path]
    missing = [place for place, key in enumerate(KEYS) if key not in again]
    assert 0 < len(missing) < 7
    fill(again, KEYS, maker(calls), together=4)
    assert [place for call in calls for place in call[: len(missing)]] == missing
    assert_holds(again, KEYS)
    again.refresh()
    assert not again.broken  # the same entries stand in a file of the same name
    assert_holds(Cache(tmp_path), KEYS)


@pytest.mark.parametrize("data", [b"", b"\0" * 64, b"\xff" * 64, b'{"a": 1}'])
def test_any_other_file_is_passed_over(tmp_path, data):
    (tmp_path / "x.safetensors").write_bytes(data)
    cache = Cache(tmp_path)
    assert not cache and cache.broken == [tmp_path / "x.safetensors"]


def _die(folder: str) -> None:
    def make(places):
        if places[0] == 4:
            os._exit(9)
        return [entry(place) for place in places]

    fill(Cache(folder), KEYS, make, together=2)


def test_a_killed_fill_goes_on_with_what_is_missing(tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=_die, args=(str(tmp_path),))
    process.start()
    process.join(60)
    assert process.exitcode == 9
    (tmp_path / "half.partial").write_bytes(b"half a file")
    cache, calls = Cache(tmp_path), []
    assert fill(cache, KEYS, maker(calls), together=2) == 3 and calls == [[4, 5], [6, 6]]
    assert_holds(cache, KEYS)


@pytest.mark.parametrize("hosts, together", [(2, 4), (3, 6), (3, 9)])
def test_each_host_makes_its_share(tmp_path, hosts, together):
    caches = [Cache(tmp_path) for _ in range(hosts)]
    calls: list[list[list[int]]] = [[] for _ in range(hosts)]
    for host, cache in enumerate(caches):
        assert fill(cache, KEYS, maker(calls[host]), together=together, host=host, hosts=hosts) == 7
    lengths = [[len(places) for places in of_host] for of_host in calls]
    assert all(of_host == lengths[0] for of_host in lengths)  # collectives need as many calls of the same size
    written = list(tmp_path.glob("*"))
    for cache in caches:
        cache.refresh()
        assert_holds(cache, KEYS)
    # What is only padding is not written again.
    assert len(written) == sum(min(hosts, -(-len(part) // (together // hosts))) for part in split(KEYS, together))


def split(keys, size):
    return [keys[start : start + size] for start in range(0, len(keys), size)]


def test_two_processes_write_the_same_entries(tmp_path, monkeypatch):
    """The second writes while the first is between its file and the file's name."""
    from pathlib import Path

    first, second, replace = Cache(tmp_path), Cache(tmp_path), Path.replace
    inside = []

    def slow(self, target):
        if not inside:
            inside.append(1)
            second.write({KEYS[0]: entry(0)})
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", slow)
    first.write({KEYS[0]: entry(0)})
    for cache in (first, second, Cache(tmp_path)):
        assert_holds(cache, KEYS[:1])


def test_a_share_that_is_not_even_is_refused(tmp_path):
    with pytest.raises(ValueError, match="5 entries at a time do not fall evenly on 2 processes"):
        fill(Cache(tmp_path), KEYS, maker([]), together=5, hosts=2)


def test_a_key_that_is_not_there_and_nothing_to_write(tmp_path):
    cache = Cache(tmp_path)
    cache.write({})
    assert not list(tmp_path.iterdir())
    with pytest.raises(KeyError):
        cache["x"]

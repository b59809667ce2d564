"""The study's grid, its nested subsets and the arithmetic of its report."""

import itertools

import jax
import numpy as np
import pytest

from dpo_jax.language.methods.insights_into_alignment import (
    METHODS,
    SCENARIOS,
    SFT_KEPT,
    average,
    delta,
    nested_subsets,
    ranks,
    relative_gain,
    run_grid,
    saturation_size,
    study_report,
    updates_of_epochs,
)

SCORES = {"dpo": {"a": 0.6, "b": 0.3}, "kto": {"a": 0.6, "b": 0.5}, "cpo": {"a": 0.3, "b": 0.4}}
SFT = {"a": 0.5, "b": 0.3}


def test_grid_has_every_run_once():
    runs = run_grid(sizes=(100, 10), seeds=(0, 1))
    assert len(runs) == len(set(runs)) == 3 * 4 * 2 * 2
    assert {(r.scenario, r.method, r.size, r.seed) for r in runs} == set(
        itertools.product(SCENARIOS, METHODS, (10, 100), (0, 1))
    )
    assert all(r.has_reference == (r.method != "cpo") for r in runs)
    assert {r.scenario.name for r in runs if r.scenario.runs_sft} == {"sft_kept"}
    assert {r.scenario.baseline for r in runs if r.scenario.start == "instruct"} == {"instruct"}
    assert [r.size for r in run_grid(sizes=(30, 3), scenarios=(SFT_KEPT,), methods=("dpo",))] == [3, 30]


def test_other_methods_may_do_without_a_reference():
    runs = run_grid(sizes=(1,), scenarios=(SFT_KEPT,), methods=("simpo", "dpo"), reference_free=frozenset({"simpo"}))
    assert [r.has_reference for r in runs] == [False, True]


def test_subsets_are_nested_and_fixed_by_the_key():
    subsets = nested_subsets(50, (50, 0, 7, 20), jax.random.key(0))
    assert list(subsets) == [0, 7, 20, 50] and all(len(rows) == size for size, rows in subsets.items())
    for small, large in itertools.pairwise(subsets.values()):
        np.testing.assert_array_equal(large[: len(small)], small)
    np.testing.assert_array_equal(np.sort(subsets[50]), np.arange(50))
    np.testing.assert_array_equal(nested_subsets(50, (20,), jax.random.key(0))[20], subsets[20])
    assert set(nested_subsets(50, (20,), jax.random.key(1))[20]) != set(subsets[20])


@pytest.mark.parametrize(
    ("size", "epochs", "expected"), [(64, 1, 1), (65, 1, 2), (640, 3, 30), (640, 0.5, 5), (0, 3, 0)]
)
def test_updates(size, epochs, expected):
    assert updates_of_epochs(size, batch_size=64, epochs=epochs) == expected


def test_arithmetic_by_hand():
    scores, base = np.array([[60.0, 30.0, 50.0], [66.0, 15.0, 50.0]]), np.array([60.0, 20.0, 0.0])
    np.testing.assert_allclose(average(scores), [140 / 3, 131 / 3])
    np.testing.assert_allclose(delta(scores, base), [[0, 10, 50], [6, -5, 50]])
    np.testing.assert_allclose(relative_gain(scores, base), [[0, 50, np.nan], [10, -25, np.nan]])
    assert relative_gain([47.0], [40.0]) == pytest.approx(17.5)


def test_ranks_share_ties_and_sum_up():
    scores = np.array([[3.0, 1.0, 5.0], [3.0, 2.0, 5.0], [1.0, 3.0, 5.0], [4.0, 0.0, 5.0]])
    np.testing.assert_array_equal(ranks(scores).T, [[2.5, 2.5, 4, 1], [3, 2, 1, 4], [2.5, 2.5, 2.5, 2.5]])
    many = ranks(np.random.default_rng(0).integers(0, 4, (7, 20)))
    np.testing.assert_allclose(many.sum(0), 7 * 8 / 2)


@pytest.mark.parametrize(
    ("sizes", "scores", "fraction", "expected"),
    [
        ([0, 20, 60, 200, 600], [0.67, 0.78, 0.84, 0.91, 0.92], 0.95, 200),
        ([600, 200, 0, 20], [0.92, 0.91, 0.67, 0.78], 0.95, 200),
        ([0, 20, 60], [0.5, 0.9, 0.8], 1.0, 20),  # the best need not be the largest
        ([0, 20, 60], [0.5, 0.4, 0.3], 0.95, 0),  # nothing is gained
        ([0, 20, 60], [0.0, 0.5, 1.0], 0.5, 20),
    ],
)
def test_saturation(sizes, scores, fraction, expected):
    assert saturation_size(sizes, scores, fraction=fraction) == expected


def test_report_of_a_scenario():
    best, *rest = study_report(SCORES, SFT)
    assert best == ("kto", pytest.approx(0.55), pytest.approx(0.15), pytest.approx(37.5), 1.25, ("a", "b"))
    assert [row.method for row in rest] == ["dpo", "cpo"]
    assert rest[0].best_on == ("a",) and rest[0].mean_rank == 2.25
    assert rest[1].delta == pytest.approx(-0.05) and rest[1].best_on == ()
    start = study_report({method: SFT for method in METHODS}, SFT)  # size 0: every method is the start
    assert all(row.delta == 0 and row.mean_rank == 2.5 and row.best_on == ("a", "b") for row in start)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: run_grid(sizes=(0, 10)), "start stands for 0"),
        (lambda: run_grid(sizes=(10, 10)), "sizes repeat"),
        (lambda: run_grid(sizes=(10,), methods=("dpo", "dpo")), "methods repeat"),
        (lambda: nested_subsets(10, (11,), jax.random.key(0)), "the 10 rows"),
        (lambda: updates_of_epochs(10, batch_size=0), "batch_size is 0"),
        (lambda: saturation_size([10, 20], [0.1, 0.2]), "size 0 among them"),
        (lambda: saturation_size([0, 20], [0.1, 0.2], fraction=1.5), "fraction 1.5"),
        (lambda: study_report(SCORES, {"a": 0.5}), "dpo has the tasks"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()

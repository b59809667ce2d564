"""Insights into Alignment: four methods from three starting points on growing subsets, as a grid and its arithmetic.

Saeidi et al. 2024, arXiv 2404.14723. Evidence: the protocol from the abstract and public summaries; the exact sizes are
not published.

    start         sft_kept: base after SFT;  sft_skipped: base;  instruction_tuned: an instruction-tuned model
    methods       dpo, ipo, kto, cpo; the reference is the frozen start, cpo has none
    sizes         nested: the first n entries of one permutation of the preference data
    report        average over tasks; delta and relative gain (percent) against SFT, or the instruction-tuned model in
                  the third scenario; ranks (1 is best); best method per task; saturation size
    saturation    the smallest size with at least 95 % of the best gain over size 0, the start itself

Everything runs on the host: plain values and float64 NumPy, scores [M methods, S tasks] with larger better. At a fixed
number of epochs a larger subset also means more updates (`updates_of_epochs`): repeat the study at a fixed number of
updates before calling it an effect of size. Rank methods on at least 300 prompts and several seeds.

>>> scores, sft = [[0.6, 0.3], [0.5, 0.4]], [0.4, 0.4]
>>> relative_gain(scores, sft).round(1).tolist(), ranks(scores).tolist()
([[50.0, -25.0], [25.0, 0.0]], [[1.0, 2.0], [2.0, 1.0]])
>>> saturation_size([0, 10, 100, 1000], [0.2, 0.5, 0.98, 1.0])
100
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from numpy.typing import ArrayLike

from dpo_jax.types import Array


class Scenario(NamedTuple):
    """A starting point.

    Attributes:
      name: of the scenario.
      start: checkpoint to begin with, "base" or "instruct".
      runs_sft: whether SFT comes before the preferences.
      baseline: whose scores the gains are measured against, "sft" or "instruct".
    """

    name: str
    start: str
    runs_sft: bool
    baseline: str


class Run(NamedTuple):
    """One training run of the study; `has_reference` says whether its start is kept as the frozen reference."""

    scenario: Scenario
    method: str
    size: int
    seed: int
    has_reference: bool


class MethodSummary(NamedTuple):
    """One row of the report; gains are those of the averages, `relative_gain` in percent of the baseline's average.

    Attributes:
      mean_rank: over tasks, 1 is best.
      best_on: tasks on which no method is better.
    """

    method: str
    average: float
    delta: float
    relative_gain: float
    mean_rank: float
    best_on: tuple[str, ...]


SFT_KEPT = Scenario("sft_kept", "base", True, "sft")
SFT_SKIPPED = Scenario("sft_skipped", "base", False, "sft")
INSTRUCTION_TUNED = Scenario("instruction_tuned", "instruct", False, "instruct")
SCENARIOS = (SFT_KEPT, SFT_SKIPPED, INSTRUCTION_TUNED)
METHODS = ("dpo", "ipo", "kto", "cpo")
REFERENCE_FREE = frozenset({"cpo"})


# The grid


def run_grid(
    *,
    sizes: Sequence[int],
    seeds: Sequence[int] = (0,),
    scenarios: Sequence[Scenario] = SCENARIOS,
    methods: Sequence[str] = METHODS,
    reference_free: frozenset[str] = REFERENCE_FREE,
) -> list[Run]:
    """Every run of the study, smaller sizes before larger ones of the same scenario and method.

    Args:
      sizes: numbers of preference pairs, above 0: the start's own scores stand for size 0 whatever the method.
      seeds: of training.
      scenarios, methods: those to compare.
      reference_free: methods among them that keep no reference.

    Raises:
      ValueError: a size below 1, or a value that occurs twice.
    """
    if any(size < 1 for size in sizes):
        raise ValueError(f"sizes are {list(sizes)}; give numbers of pairs of at least 1, the start stands for 0")
    for name, values in dict(sizes=sizes, seeds=seeds, scenarios=scenarios, methods=methods).items():
        if len(set(values)) != len(values):
            raise ValueError(f"{name} repeat a value: {list(values)}")
    return [
        Run(scenario, method, size, seed, method not in reference_free)
        for scenario in scenarios
        for method in methods
        for size in sorted(sizes)
        for seed in seeds
    ]


def nested_subsets(total: int, sizes: Sequence[int], key: Array) -> dict[int, np.ndarray]:
    """Subsets of the rows 0 ... total - 1, each of which holds all smaller ones: size -> int [size].

    Args:
      total: number of rows.
      sizes: each in [0, total].
      key: of jax.random, for the one permutation whose beginnings the subsets are.

    Raises:
      ValueError: a size out of range.
    """
    if any(not 0 <= size <= total for size in sizes):
        raise ValueError(f"sizes are {list(sizes)}; give numbers from 0 to the {total} rows")
    order = np.asarray(jax.random.permutation(key, total))
    return {size: order[:size] for size in sorted(sizes)}


def updates_of_epochs(size: int, *, batch_size: int, epochs: float = 1.0) -> int:
    """Optimizer steps of some epochs over `size` rows, the last batch of an epoch may be ragged.

    Raises:
      ValueError: batch_size below 1, epochs not finite or below 0.
    """
    if batch_size < 1 or not (epochs >= 0 and math.isfinite(epochs)):
        raise ValueError(f"batch_size is {batch_size}, epochs {epochs}; give at least 1 row and a number of at least 0")
    return math.ceil(epochs * math.ceil(size / batch_size))


# The table


def average(scores: ArrayLike) -> np.ndarray:
    """Mean over tasks, [..., S] -> [...]."""
    return np.asarray(scores, np.float64).mean(-1)


def delta(scores: ArrayLike, baseline: ArrayLike) -> np.ndarray:
    """Scores less those of the baseline, [M, S] and [S] -> [M, S]."""
    return np.asarray(scores, np.float64) - np.asarray(baseline, np.float64)


def relative_gain(scores: ArrayLike, baseline: ArrayLike) -> np.ndarray:
    """Gain in percent of the baseline's score, [M, S] and [S] -> [M, S]; nan where that is 0."""
    base = np.asarray(baseline, np.float64)
    return 100 * delta(scores, base) / np.where(base == 0, np.nan, np.abs(base))


def ranks(scores: ArrayLike) -> np.ndarray:
    """Rank of each method per task, 1 the best, equals share their mean rank, [M, S] -> [M, S]."""
    scores = np.asarray(scores, np.float64)
    above = (scores[None, :] > scores[:, None]).sum(1)
    equal = (scores[None, :] == scores[:, None]).sum(1)  # itself too
    return above + (equal + 1) / 2


def saturation_size(sizes: Sequence[int], scores: Sequence[float], *, fraction: float = 0.95) -> int:
    """The smallest size that brings at least a fraction of the best gain over size 0; 0 if nothing is gained.

    Args:
      sizes: of the subsets, 0 among them.
      scores: one per size, of one method in one scenario.
      fraction: in (0, 1].

    Raises:
      ValueError: no size 0, numbers that differ, a score that is not finite, fraction out of range.
    """
    if len(sizes) != len(scores) or 0 not in sizes or not all(map(math.isfinite, scores)) or not 0 < fraction <= 1:
        raise ValueError(
            f"sizes {list(sizes)}, scores {list(scores)}, fraction {fraction}; "
            "give one finite score per size, size 0 among them, and a fraction in (0, 1]"
        )
    start = scores[list(sizes).index(0)]
    needed = fraction * (max(scores) - start)
    return min(size for size, score in zip(sizes, scores) if score - start >= needed)


def study_report(scores: Mapping[str, Mapping[str, float]], baseline: Mapping[str, float]) -> list[MethodSummary]:
    """One row per method of one scenario at one size, the best average first, equals in the order given.

    Args:
      scores: method -> task -> score, means over seeds.
      baseline: task -> score of the scenario's baseline.

    Raises:
      ValueError: a method lacks a task of the baseline, or has another one.
    """
    tasks = list(baseline)
    for method, found in scores.items():
        if set(found) != set(tasks):
            raise ValueError(f"{method} has the tasks {sorted(found)}, the baseline {sorted(tasks)}")
    table = np.array([[scores[method][task] for task in tasks] for method in scores], np.float64)
    base = float(average([baseline[task] for task in tasks]))
    averages, places = average(table), ranks(table)
    best = table == table.max(0)
    rows = [
        MethodSummary(
            method=method,
            average=float(averages[i]),
            delta=float(delta(averages[i], base)),
            relative_gain=float(relative_gain(averages[i], base)),
            mean_rank=float(places[i].mean()),
            best_on=tuple(task for task, first in zip(tasks, best[i]) if first),
        )
        for i, method in enumerate(scores)
    ]
    return sorted(rows, key=lambda row: -row.average)

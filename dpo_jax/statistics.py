"""Statistics of finished evaluations: intervals, exact tests, agreement of judges, logistic regression.

Everything runs on the host in float64 NumPy, over one value per example; keys are jax.random's.

>>> print("{:.4f} {:.4f}".format(*wilson_interval(81, 263)), sign_test(8, 1))
0.2553 0.3662 0.0390625
>>> print(f"{cohen_kappa([1, 1, 0, 0], [1, 1, 1, 0]):.2f}")
0.50
>>> print(logistic_regression([[1.0], [1.0]], [0.75, 0.75], weights=[0.5, 0.5]).round(4))  # log 3
[1.0986]
"""

import math
from collections.abc import Iterable
from statistics import NormalDist, fmean, stdev
from typing import NamedTuple

import jax
import numpy as np
from numpy.typing import ArrayLike

from dpo_jax.types import Array

NEWTON_STEPS = 100  # most fits need below ten
NEWTON_HALVINGS = 40


def generator(key: Array) -> np.random.Generator:
    """NumPy's generator for a key of jax.random: the same key gives the same draws."""
    return np.random.default_rng(np.asarray(jax.random.bits(key, (4,), "uint32")))


# Intervals


class Interval(NamedTuple):
    """The bounds of a confidence interval."""

    low: float
    high: float


def wilson_interval(successes: float, total: int, confidence: float = 0.95) -> Interval:
    """Score interval of a proportion (Wilson 1927), sound near 0 and 1 and for few trials.

        (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n),  z the normal quantile

    Args:
      successes: in [0, total]; a tie may count one half.
      total: number of independent trials, at least 1.

    Raises:
      ValueError: successes lie outside [0, total], total is below 1 or confidence outside (0, 1).
    """
    if total < 1 or not 0 <= successes <= total:
        raise ValueError(f"{successes} successes of {total} trials; give 0 <= successes <= total and total >= 1")
    z = NormalDist().inv_cdf(_upper(confidence))
    share, spread = successes / total, z * z / total
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread * spread / 4) / (1 + spread)
    # At the ends the bound is 0 or 1 exactly; rounding would leave it a little beside.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == total else centre + half
    return Interval(low, high)


def mean_interval(values: Iterable[float], confidence: float = 0.95) -> Interval:
    """Student interval of a mean: mean -+ t s / sqrt(n), t the quantile with n - 1 degrees of freedom.

    Exact for normal values, and for many values of any kind that has a variance. One value alone says nothing about
    its spread: the bounds are infinite.

    Raises:
      ValueError: there are no values, or confidence is outside (0, 1).
    """
    numbers = [float(value) for value in values]
    if not numbers:
        raise ValueError("no values to average; give at least one")
    upper, mean = _upper(confidence), fmean(numbers)
    if len(numbers) == 1:
        return Interval(-math.inf, math.inf)
    half = _student_quantile(upper, len(numbers) - 1) * stdev(numbers) / math.sqrt(len(numbers))
    return Interval(mean - half, mean + half)


def bootstrap_interval(values: ArrayLike, key: Array, *, resamples: int = 1000, confidence: float = 0.95) -> Interval:
    """Percentile interval of a mean, examples drawn with replacement; of differences for two runs on the same examples.

    Args:
      values: [N], one per example.
      key: of jax.random.
      resamples: number of draws of N examples.
      confidence: in (0, 1).

    Raises:
      ValueError: no values, resamples below 1, confidence outside (0, 1).
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not values.size or resamples < 1:
        raise ValueError(f"values {values.shape}, {resamples} resamples; give [N] and at least one of both")
    upper, rng = _upper(confidence), generator(key)
    means = [values[rng.integers(0, values.size, values.size)].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [1 - upper, upper])
    return Interval(float(low), float(high))


def _upper(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; give a number between 0 and 1, such as 0.95")
    return 0.5 + confidence / 2


def _student_quantile(probability: float, freedom: int) -> float:
    """Quantile above the median of Student's t with a whole number of degrees of freedom."""
    z = NormalDist().inv_cdf(probability)
    if freedom > 200:
        # Abramowitz and Stegun 26.7.5; the first term left out is below 1e-9 here for the usual confidences.
        terms = (
            (z**3 + z) / 4,
            (5 * z**5 + 16 * z**3 + 3 * z) / 96,
            (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
            (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
        )
        return z + sum(term / freedom ** (order + 1) for order, term in enumerate(terms))
    # The distribution is a finite sum in the angle atan(t / sqrt(freedom)), which bisection inverts to the last bit.
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        if 0.5 + _within(middle, freedom) / 2 < probability:
            low = middle
        else:
            high = middle
    return math.tan((low + high) / 2) * math.sqrt(freedom)


def _within(angle: float, freedom: int) -> float:
    """P(|T| <= sqrt(freedom) tan angle), Abramowitz and Stegun 26.7.3 (odd) and 26.7.4 (even)."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = 0.0
    for order in range(freedom // 2):
        total += term
        # odd: 1, 2/3, 2 4 / 3 5, ...; even: 1, 1/2, 1 3 / 2 4, ...
        term *= cosine * cosine * (2 * order + 1 + odd) / (2 * order + 2 + odd)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


# Tests and agreement


def sign_test(one: int, other: int) -> float:
    """Exact two-sided p-value of two counts under a fair coin, min(1, 2 sum_{i <= min} C(n, i) / 2^n).

    Of wins and losses, draws left out; of the examples on which two runs differ it is McNemar's exact test.

    Raises:
      ValueError: a number below 0.
    """
    if one < 0 or other < 0:
        raise ValueError(f"counts {one} and {other}; give numbers of at least 0")
    count, term, tail = one + other, 1, 0
    for i in range(min(one, other) + 1):  # whole numbers: exact at any size
        tail += term
        term = term * (count - i) // (i + 1)
    return min(1.0, 2 * tail / 2**count)


def cohen_kappa(first: ArrayLike, second: ArrayLike) -> float:
    """Agreement of two judges beyond chance, (p_o - p_e) / (1 - p_e); nan if both always say the same word.

    Raises:
      ValueError: no labels, or numbers of labels that differ.
    """
    a, b = np.asarray(first), np.asarray(second)
    if a.size == 0 or a.shape != b.shape:
        raise ValueError(f"{a.size} and {b.size} labels; give as many of both, at least one")
    observed = float(np.mean(a == b))
    chance = sum(float(np.mean(a == label) * np.mean(b == label)) for label in np.union1d(a, b))
    return (observed - chance) / (1 - chance) if chance < 1 else float("nan")


# Logistic regression


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + e^-x) without overflow, float64."""
    return np.exp(-np.logaddexp(0.0, -x))


def logistic_regression(
    features: ArrayLike, targets: ArrayLike, *, weights: ArrayLike, penalty: ArrayLike = 0.0
) -> np.ndarray:
    """Coefficients w [D] of the least sum_n weight_n NLL_n + sum_d (penalty_d / 2) w_d^2, by damped Newton steps.

    A step costs O(N D^2 + D^3). Separable data need a penalty.

    Args:
      features: [N, D]; an intercept is a column of ones.
      targets: [N] in [0, 1], probabilities of the label 1.
      weights: [N], at least 0.
      penalty: [D] or one number for all, at least 0.
    """
    x, y, rows = (np.asarray(v, np.float64) for v in (features, targets, weights))
    ridge = np.broadcast_to(np.asarray(penalty, np.float64), x.shape[1:])

    def slope(w: np.ndarray) -> np.ndarray:
        return x.T @ (rows * (sigmoid(x @ w) - y)) + ridge * w

    w = np.zeros(x.shape[1])
    now = slope(w)
    for _ in range(NEWTON_STEPS):
        p = sigmoid(x @ w)
        hessian = (x * (rows * p * (1 - p))[:, None]).T @ x + np.diag(ridge)
        # Directions that no row sees and no penalty holds have no curvature: this keeps the system solvable.
        step = np.linalg.solve(hessian + 1e-13 * np.trace(hessian) * np.eye(len(w)), now)
        # A full step may leave the region where the quadratic model holds: halve it until the slope falls. The slope
        # falls along Newton's direction like the objective, and rounding stops it much later.
        for halvings in range(NEWTON_HALVINGS):
            moved = w - 0.5**halvings * step
            then = slope(moved)
            if np.linalg.norm(then) < np.linalg.norm(now):
                break
        else:
            break
        w, now = moved, then
    return w

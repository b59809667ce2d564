"""Win rates of judged comparisons: raw, length-controlled, as ratings; and how sure they are.

Length control: Dubois et al. 2024, arXiv 2404.04475 (AlpacaEval 2). Evidence: official code for the conventions of
preferences and the length-controlled model; Bradley and Terry 1952 and Elo: standard definitions.

    win rate        mean(preference - 1), preference in [1, 2]: 1 the baseline wins, 2 the model, 1.5 (or 0) a draw
    controlled      mean sigma(g difficulty + b), fitted as sigma(a tanh((l_baseline - l_model) / s) + g difficulty + b)
    Bradley-Terry   max_t sum_ij wins_ij log sigma(t_i - t_j)
    Elo             R_a += k (score - 1 / (1 + 10^((R_b - R_a) / 400)))

Everything here runs on the host in float64 NumPy over a whole evaluation set; keys are jax.random's. Arrays are one
value per prompt [N]. Wilson's interval is `wilson_interval(win_rate * N, N)` of `statistics`, next to
`bootstrap_interval` and `sign_test`.
The model is extrapolated where the answers of one side are always longer: then the controlled rate over-corrects, and
a warning says so.

>>> win_rate([2, 2, 1, 1.5]).win_rate, elo([(0, 1, 1.0)], players=2).tolist()
(0.625, [1016.0, 984.0])
>>> print(bradley_terry([[0, 3], [1, 0]]).round(4))  # the difference is log 3
[ 0.5493 -0.5493]
"""

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from dpo_jax.statistics import generator, logistic_regression, sigmoid
from dpo_jax.types import Array

MIN_OPPOSITE_SHARE = 0.1  # of prompts whose length difference has the rarer sign


class WinRate(NamedTuple):
    """Result of N comparisons with one baseline.

    Attributes:
      win_rate: mean preference of the model, in [0, 1].
      standard_error: of that mean, n - 1 degrees of freedom; nan for one prompt.
      discrete_win_rate: every preference rounded to a win, half a win or a loss first.
      wins, draws, losses: numbers of prompts above, at and below one half.
    """

    win_rate: float
    standard_error: float
    discrete_win_rate: float
    wins: int
    draws: int
    losses: int


class ControlledWinRate(NamedTuple):
    """Win rate with the effect of length taken out.

    Attributes:
      win_rate: at equal lengths, in [0, 1].
      raw_win_rate: as judged.
      length_coef: the model's a; below 0 if the judge favours length.
      difficulty_coef: g, 0 without difficulties.
      intercept: b.
      opposite_share: share of prompts whose length difference has the rarer sign.
    """

    win_rate: float
    raw_win_rate: float
    length_coef: float
    difficulty_coef: float
    intercept: float
    opposite_share: float


def win_rate(preferences: ArrayLike) -> WinRate:
    """Win rate of a model over a baseline from one preference per prompt.

    Args:
      preferences: [N] in [1, 2] or 0 for a draw; 1 + P(model) from a judge that weighs.

    Raises:
      ValueError: no preferences, or one outside of 0 and [1, 2].
    """
    share = _shares(preferences)
    wins, draws = int(np.sum(share > 0.5)), int(np.sum(share == 0.5))
    error = float(share.std(ddof=1) / math.sqrt(share.size)) if share.size > 1 else math.nan
    discrete = (wins + 0.5 * draws) / share.size
    return WinRate(float(share.mean()), error, discrete, wins, draws, share.size - wins - draws)


def both_orders(model_first: ArrayLike, model_second: ArrayLike) -> np.ndarray:
    """Preference per prompt, the mean of a judge's two verdicts with the answers in either order, float64 [N].

    Args:
      model_first: [N] preferences (2: the model wins) with the model's answer shown first.
      model_second: [N] the same with the model's answer shown second.
    """
    return 1 + 0.5 * (_shares(model_first) + _shares(model_second))


def position_consistency(model_first: ArrayLike, model_second: ArrayLike) -> float:
    """Share of prompts on which both orders have the same winner (or both none)."""
    first, second = _shares(model_first), _shares(model_second)
    return float(np.mean(np.sign(first - 0.5) == np.sign(second - 0.5)))


# Length control


def length_controlled_win_rate(
    preferences: ArrayLike,
    *,
    model_lengths: ArrayLike,
    baseline_lengths: ArrayLike,
    difficulty: ArrayLike | None = None,
    l2: float = 1e-6,
) -> ControlledWinRate:
    """Win rate that the logistic model predicts for answers of equal length (AlpacaEval 2), unregularised.

    The public tool adds an L1 penalty, chosen by cross-validation, and a pull towards two gamed baselines.

    Args:
      preferences: [N] in [1, 2] or 0 for a draw.
      model_lengths, baseline_lengths: [N] characters of the answers.
      difficulty: [N] of the instructions, fitted before over many models; the intercept alone by default.
      l2: penalty (l2/2) |coefficients|^2 on the mean log loss, against separable data; above 0.

    Raises:
      ValueError: shapes that differ, preferences out of range, l2 not above 0.

    Warns:
      UserWarning: fewer than 10 % of the length differences have the rarer sign, so that equal length is extrapolated.
    """
    share = _shares(preferences)
    difference = np.asarray(baseline_lengths, np.float64) - np.asarray(model_lengths, np.float64)
    hardness = np.zeros_like(share) if difficulty is None else np.asarray(difficulty, np.float64)
    if not share.shape == difference.shape == hardness.shape:
        raise ValueError(f"preferences {share.shape}, lengths {difference.shape}, difficulty {hardness.shape} differ")
    if not l2 > 0:
        raise ValueError(f"l2 is {l2}; give a number above 0")
    opposite = float(min(np.mean(difference > 0), np.mean(difference < 0)))
    if opposite < MIN_OPPOSITE_SHARE and np.any(difference):
        warnings.warn(
            f"only {opposite:.0%} of the prompts have the rarer sign of the length difference: the win rate at equal "
            "length is an extrapolation and tends to over-correct",
            stacklevel=2,
        )
    spread = difference.std(ddof=1) if share.size > 1 else 0.0
    length = np.tanh(difference / spread) if spread > 0 else np.zeros_like(share)
    features = np.stack([length, hardness, np.ones_like(share)], axis=1)
    a, g, b = logistic_regression(features, share, weights=np.full(share.size, 1 / share.size), penalty=l2)
    controlled = float(np.mean(sigmoid(g * hardness + b)))
    return ControlledWinRate(controlled, float(share.mean()), float(a), float(g), float(b), opposite)


# Ratings


def elo(
    games: Iterable[tuple[int, int, float]], *, players: int, k: float = 32.0, initial: float = 1000.0
) -> np.ndarray:
    """Elo ratings after games in order, float64 [players]; their sum never changes.

    Args:
      games: (a, b, score of a), score 1, 1/2 or 0 and anything between.
      players: number of players; a and b count from 0.
      k: largest change in a game; 4 for long arenas.
      initial: rating before the first game.

    Raises:
      ValueError: a score outside [0, 1], or a player that does not exist or plays against itself.
    """
    ratings = np.full(players, float(initial))
    for a, b, score in games:
        if not (0 <= score <= 1 and 0 <= a < players and 0 <= b < players and a != b):
            raise ValueError(f"game {(a, b, score)}; give two of {players} players and a score in [0, 1]")
        change = k * (score - 1 / (1 + 10 ** ((ratings[b] - ratings[a]) / 400)))
        ratings[a] += change
        ratings[b] -= change
    return ratings


def win_matrix(games: Iterable[tuple[int, int, float]], *, players: int) -> np.ndarray:
    """How often each player beat each other, float64 [M, M]; a game of score s counts s for a and 1 - s for b."""
    wins = np.zeros((players, players))
    for a, b, score in games:
        wins[a, b] += score
        wins[b, a] += 1 - score
    return wins


def bradley_terry(wins: ArrayLike, *, prior: float = 0.0) -> np.ndarray:
    """Strengths of largest likelihood, float64 [M], mean 0; P(i beats j) = sigma(t_i - t_j).

    Args:
      wins: [M, M], [i, j] how often i beat j, a tie one half for both; the diagonal is not read.
      prior: virtual draws added between every two players, at least 0; 0.1 keeps strengths finite.

    Raises:
      ValueError: the strengths would be infinite: some group of players never lost to the others, or never met them.
    """
    wins = np.asarray(wins, np.float64)
    players = len(wins)
    if wins.shape != (players, players) or not np.all(wins >= 0) or not prior >= 0:
        raise ValueError(f"wins {wins.shape} and prior {prior}; give a square table and numbers of at least 0")
    counts = (wins + prior / 2) * (1 - np.eye(players))
    reached = (counts > 0) | np.eye(players, dtype=bool)
    for _ in range(players.bit_length()):  # paths of twice the length each time
        reached = reached @ reached
    if not reached.all():
        raise ValueError("some players never lost to the others, or never met them; give a prior such as 0.1")
    winner, loser = np.nonzero(counts)
    features = np.eye(players)[winner] - np.eye(players)[loser]
    weights = counts[winner, loser]
    strengths = logistic_regression(features, np.ones(len(weights)), weights=weights / weights.sum())
    return strengths - strengths.mean()


def elo_scale(strengths: ArrayLike) -> np.ndarray:
    """Bradley-Terry strengths in Elo points, 1000 + 400 / ln 10 * t."""
    return 1000.0 + 400.0 / math.log(10.0) * np.asarray(strengths, np.float64)


def bootstrap_ratings(
    games: Sequence[tuple[int, int, float]],
    rate: Callable[[list[tuple[int, int, float]]], np.ndarray],
    key: Array,
    *,
    resamples: int = 1000,
) -> np.ndarray:
    """Ratings of resampled games, float64 [resamples, M]: quantiles over axis 0 are intervals.

    Args:
      games: (a, b, score of a).
      rate: ratings of a list of games, such as `lambda games: bradley_terry(win_matrix(games, players=3), prior=0.1)`.
      key: of jax.random.
      resamples: number of draws of as many games.
    """
    draws = generator(key).integers(0, len(games), (resamples, len(games)))
    return np.stack([rate([games[i] for i in draw]) for draw in draws])


def _shares(preferences: ArrayLike) -> np.ndarray:
    """Preferences in [1, 2] as the model's share of the win in [0, 1]; 0 is a draw."""
    values = np.asarray(preferences, np.float64)
    values = np.where(values == 0, 1.5, values)
    if values.ndim != 1 or not values.size:
        raise ValueError(f"preferences have the shape {values.shape}; give [N] with N at least 1")
    if not np.all((values >= 1) & (values <= 2)):
        raise ValueError("preferences must be 0 (a draw) or lie in [1, 2]; leave unjudged prompts out")
    return values - 1

"""Agreement of scores with labelers, and win rates of one model's answers over another's, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 2000
LEAST_SHARE = 0.05  # of the prompts on either side of equal length, for a win rate at equal length
Interval = tuple[float, float]


@dataclass(frozen=True)
class PairAccuracy:
    """Share of pairs in which the preferred response scores higher; None without a pair."""

    accuracy: float | None
    ci95: Interval | None
    pairs: int

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ci95": list(self.ci95) if self.ci95 else None}


@dataclass(frozen=True)
class WinRate:
    """Share of prompts on which the candidate's answer is preferred; ties count one half."""

    win_rate: float
    ci95: Interval
    prompts: int

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ci95": list(self.ci95)}


def bootstrap_interval(values: np.ndarray, groups: Sequence[Any] | None = None) -> Interval:
    """95 % interval of a mean of shares in [0, 1], by resampling rows, or whole groups where rows of a group depend on
    each other.

    Rows that are all 0 or all 1 have nothing to resample: the exact binomial bound (Clopper and Pearson 1934) is given,
    for which a group counts once.
    """
    rng = np.random.default_rng(0)
    if groups is None:
        sums, sizes = values, np.ones_like(values)
    else:
        _, index = np.unique(np.asarray(groups), return_inverse=True)
        sums, sizes = np.bincount(index, weights=values), np.bincount(index).astype(float)
    if values.min() == values.max() and values[0] in (0.0, 1.0):
        bound = 0.025 ** (1 / len(sums))
        return (bound, 1.0) if values[0] == 1.0 else (0.0, 1 - bound)
    picks = rng.integers(0, len(sums), (RESAMPLES, len(sums)))
    means = sums[picks].sum(1) / sizes[picks].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def wins_of(candidate: ArrayLike, baseline: ArrayLike) -> np.ndarray:
    """(rows,) 1 where the candidate's score is higher, 0 where lower, 0.5 where equal.

    The scores themselves are compared, not their rounded difference: equal scores stay equal.
    """
    a, b = np.asarray(candidate, float), np.asarray(baseline, float)
    return (a > b) + 0.5 * (a == b)


def pair_accuracy(better: ArrayLike, worse: ArrayLike, groups: Sequence[Any] | None = None) -> PairAccuracy:
    """Accuracy over pairs; equal scores count one half.

    Args:
        better, worse: (pairs,) scores of the preferred and the other response.
        groups: (pairs,) the prompt of each pair; prompts are resampled for the interval.
    """
    right = wins_of(better, worse)
    if not len(right):
        return PairAccuracy(None, None, 0)
    return PairAccuracy(float(right.mean()), bootstrap_interval(right, groups=groups), len(right))


def win_rate(candidate: ArrayLike, baseline: ArrayLike, groups: Sequence[Any] | None = None) -> WinRate:
    """Win rate by one judge.

    Args:
        candidate, baseline: (prompts,) the judge's scores of both answers to each prompt.
        groups: (prompts,) names of the prompts, where one prompt is there several times.
    """
    wins = wins_of(candidate, baseline)
    return WinRate(float(wins.mean()), bootstrap_interval(wins, groups=groups), len(wins))


def length_controlled(wins: np.ndarray, longer: np.ndarray) -> float | None:
    """The win rate at equal length (after Dubois et al. 2024): a logistic regression of wins on the length difference,
    read at no difference.

    Args:
        wins: (prompts,) 1, 0, or 0.5 for a tie; longer: (prompts,) candidate's length minus the baseline's, tokens.

    Returns:
        None where the data does not identify it: fewer than 5 % of the prompts have the candidate's answer as short as
        the baseline's or shorter (or as long or longer), or length alone tells wins from losses.
    """
    from scipy.optimize import minimize

    if min((longer <= 0).mean(), (longer >= 0).mean()) < LEAST_SHARE:
        return None
    if wins.min() == wins.max() or longer.std() == 0:
        return float(wins.mean())
    if _separated(longer[wins > 0.5], longer[wins < 0.5]):
        return None
    x = np.tanh(longer / longer.std())

    def loss(theta: np.ndarray) -> float:
        z = theta[0] + theta[1] * x
        return float((wins * np.logaddexp(0, -z) + (1 - wins) * np.logaddexp(0, z)).mean() + 1e-4 * (theta**2).sum())

    intercept = minimize(loss, np.zeros(2), method="BFGS").x[0]
    return float(1 / (1 + np.exp(-intercept)))


def _separated(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether one threshold parts the values of `a` from those of `b`: the regression's slope would be infinite."""
    return bool(len(a) and len(b) and (a.min() > b.max() or b.min() > a.max()))

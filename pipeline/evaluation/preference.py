"""How well scores agree with labelers, and how often one model's answers beat another's."""

from __future__ import annotations

from typing import Any

from pipeline.evaluation.metric_info import metric_info

import evaluate
import numpy as np

RESAMPLES = 2000


def bootstrap_interval(values: np.ndarray, seed: int = 0, groups: np.ndarray | None = None) -> tuple[float, float]:
    """95 % percentile interval of a mean, resampling rows, or whole groups where rows of a group are not independent."""
    rng = np.random.default_rng(seed)
    if groups is None:
        sums, sizes = values, np.ones_like(values)
    else:
        _, index = np.unique(groups, return_inverse=True)
        sums, sizes = np.bincount(index, weights=values), np.bincount(index).astype(float)
    picks = rng.integers(0, len(sums), (RESAMPLES, len(sums)))
    means = sums[picks].sum(1) / sizes[picks].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


class PairAccuracy(evaluate.Metric):
    """Share of pairs in which the preferred response scores higher; equal scores count one half."""

    def _info(self) -> evaluate.MetricInfo:
        return metric_info(
            self,
            "better, worse: scores of the preferred and the other response of each pair",
            better="float64",
            worse="float64",
        )

    def _compute(self, better: list[float], worse: list[float], groups: list[Any] | None = None) -> dict[str, Any]:
        difference = np.asarray(better) - np.asarray(worse)
        right = (difference > 0) + 0.5 * (difference == 0)
        interval = bootstrap_interval(right, groups=None if groups is None else np.asarray(groups))
        return {"accuracy": float(right.mean()), "ci95": list(interval), "pairs": len(right)}


class WinRate(evaluate.Metric):
    """Share of prompts on which the candidate's score beats the baseline's; ties count one half."""

    def _info(self) -> evaluate.MetricInfo:
        return metric_info(
            self,
            "candidate, baseline: a judge's scores of both answers to each prompt",
            candidate="float64",
            baseline="float64",
        )

    def _compute(self, candidate: list[float], baseline: list[float]) -> dict[str, Any]:
        difference = np.asarray(candidate) - np.asarray(baseline)
        wins = (difference > 0) + 0.5 * (difference == 0)
        return {"win_rate": float(wins.mean()), "ci95": list(bootstrap_interval(wins)), "prompts": len(wins)}


def length_controlled(wins: np.ndarray, longer: np.ndarray) -> float:
    """The win rate at equal length (after Dubois et al. 2024): a logistic regression of wins on the length difference, read
    at no difference.

    Args:
        wins: (prompts,) 1, 0, or 0.5 for a tie; longer: (prompts,) candidate's length minus the baseline's.
    """
    from scipy.optimize import minimize

    spread = longer.std()
    if spread == 0 or wins.min() == wins.max():
        return float(wins.mean())
    x = np.tanh(longer / spread)

    def loss(theta: np.ndarray) -> float:
        z = theta[0] + theta[1] * x
        return float((wins * np.logaddexp(0, -z) + (1 - wins) * np.logaddexp(0, z)).mean() + 1e-4 * (theta**2).sum())

    found = minimize(loss, np.zeros(2), method="BFGS").x
    return float(1 / (1 + np.exp(-found[0])))

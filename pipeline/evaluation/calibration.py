"""Calibration: whether stated probabilities match observed shares."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

BINS = 10


def reliability(probability: ArrayLike, outcome: ArrayLike, low: float = 0.0, bins: int = BINS) -> list[dict[str, Any]]:
    """Outcomes by bins of equal width over [low, 1]; empty bins are left out.

    Args:
        probability: (rows,) stated, in [0, 1]; outcome: (rows,) 1 where it happened, 0 where not.

    Returns:
        of each bin: its edges, rows, mean probability, mean outcome.
    """
    stated, happened = np.asarray(probability, float), np.asarray(outcome, float)
    edges = np.linspace(low, 1.0, bins + 1)
    index = np.clip(np.digitize(stated, edges[1:-1], right=True), 0, bins - 1)
    return [
        {
            "low": float(edges[number]),
            "high": float(edges[number + 1]),
            "rows": int((index == number).sum()),
            "probability": float(stated[index == number].mean()),
            "outcome": float(happened[index == number].mean()),
        }
        for number in np.unique(index)
    ]


def expected_calibration_error(probability: ArrayLike, outcome: ArrayLike, low: float = 0.0) -> float:
    """Mean distance between stated probability and observed share, over ten bins of equal width, weighted by rows
    (Naeini et al. 2015; Guo et al. 2017)."""
    bins = reliability(probability, outcome, low)
    rows = sum(item["rows"] for item in bins)
    return float(sum(item["rows"] * abs(item["probability"] - item["outcome"]) for item in bins) / max(rows, 1))


def preference_logits(margins: ArrayLike, tie_margin: float = 0.0) -> np.ndarray:
    """Log-odds that a labeler who does not call a tie prefers the response that scores `margins` more.

    Without a tie margin: the margin itself (Bradley and Terry 1952). With one, t: log σ(m - t) - log σ(-m - t), since
    a pair that is no tie is won with σ(m - t) and lost with σ(-m - t) (Rao and Kupper 1967).
    """
    values = np.asarray(margins, float)
    if tie_margin == 0:
        return values
    logits: np.ndarray = np.logaddexp(0.0, values + tie_margin) - np.logaddexp(0.0, tie_margin - values)
    return logits


def fit_temperature(margins: ArrayLike, tie_margin: float = 0.0) -> float:
    """The temperature T under which scores divided by T give labelers' choices the highest likelihood.

    Args:
        margins: (pairs,) score of the preferred response minus the other's.

    Returns:
        T in [0.01, 100]; at an end where the scores carry no information or never err.
    """
    from scipy.optimize import minimize_scalar

    values = np.asarray(margins, float)
    result = minimize_scalar(
        lambda log_t: np.logaddexp(0.0, -preference_logits(values / np.exp(log_t), tie_margin)).mean(),
        bounds=(np.log(0.01), np.log(100.0)),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return float(np.exp(result.x))

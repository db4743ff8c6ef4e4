"""Whether a probability means what it says."""

from __future__ import annotations

from typing import Any

from pipeline.evaluation.metric_info import metric_info

import evaluate
import numpy as np
from numpy.typing import ArrayLike

BINS = 10


def reliability(probability: ArrayLike, outcome: ArrayLike, low: float = 0.0, bins: int = BINS) -> list[dict[str, Any]]:
    """Outcomes by bins of equal width over [low, 1]; empty bins are left out.

    Returns:
        of each bin: its edges, rows, mean probability, mean outcome.
    """
    stated, happened = np.asarray(probability, float), np.asarray(outcome, float)
    edges = np.linspace(low, 1.0, bins + 1)
    index = np.clip(np.digitize(stated, edges[1:-1], right=True), 0, bins - 1)
    found = []
    for number in range(bins):
        here = index == number
        if here.any():
            found.append(
                {
                    "low": float(edges[number]),
                    "high": float(edges[number + 1]),
                    "rows": int(here.sum()),
                    "probability": float(stated[here].mean()),
                    "outcome": float(happened[here].mean()),
                }
            )
    return found


class ExpectedCalibrationError(evaluate.Metric):
    """Mean distance between stated probability and observed share, over ten bins of equal width, weighted by rows."""

    def _info(self) -> evaluate.MetricInfo:
        return metric_info(
            self,
            "probability: stated, in [0, 1]; outcome: 1 where it happened, 0 where not",
            "Naeini et al. 2015; Guo et al. 2017",
            probability="float64",
            outcome="float64",
        )

    def _compute(self, probability: list[float], outcome: list[float], low: float = 0.0) -> dict[str, float]:
        bins = reliability(probability, outcome, low)
        rows = sum(item["rows"] for item in bins)
        return {"ece": sum(item["rows"] * abs(item["probability"] - item["outcome"]) for item in bins) / max(rows, 1)}


def fit_temperature(margins: ArrayLike) -> float:
    """The temperature T under which sigmoid(margin / T) gives labelers' choices the highest likelihood.

    Args:
        margins: score of the preferred response minus the other's, one a pair.

    Returns:
        T in [0.01, 100]; at an end where the scores carry no information or never err.
    """
    from scipy.optimize import minimize_scalar

    values = np.asarray(margins, float)
    found = minimize_scalar(
        lambda log_t: np.logaddexp(0.0, -values / np.exp(log_t)).mean(),
        bounds=(np.log(0.01), np.log(100.0)),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return float(np.exp(found.x))

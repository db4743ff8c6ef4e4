"""What scores mean, on scores whose meaning is known."""

from __future__ import annotations

from typing import Any

from pipeline.evaluation.calibration import fit_temperature, reliability
from pipeline.evaluation.metrics import ExpectedCalibrationError
from pipeline.evaluation.reward_model import Judged, calibration, length_bias

import numpy as np
import pytest
from sklearn.calibration import calibration_curve


def rankings(number: int, rng: np.random.Generator, scale: float, length: float = 0.0) -> Judged:
    """Pairs whose labelers follow sigmoid(difference of truth); the model scores `scale` times the truth."""
    rows: list[dict[str, Any]] = []
    scores = []
    for _ in range(number):
        truth = rng.normal(0, 1.5, 2)
        lengths = rng.integers(5, 40, 2)
        first = rng.random() < 1 / (1 + np.exp(truth[1] - truth[0]))
        pair = {"better": 0 if first else 1, "worse": 1 if first else 0, "target": 1.0, "tie": False}
        ids = [[0] * (3 + int(n)) for n in lengths]
        rows.append(
            {"ids": ids, "pairs": [pair], "prompt_tokens": 3, "record": {"ranks": [1, 2], "responses": ["a", "b"]}}
        )
        scores.append((scale * truth + length * lengths).tolist())
    return Judged(rows, scores)


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_temperature_scaling_recovers_what_labelers_do(scale: float) -> None:
    judged = rankings(6000, np.random.default_rng(0), scale)
    found = calibration(judged)
    assert found["temperature"] == pytest.approx(scale, rel=0.1)
    assert found["after"]["ece"] < 0.025
    if scale != 1.0:
        assert found["before"]["ece"] > 0.08
    assert judged.accuracy()["accuracy"] == pytest.approx(0.80, abs=0.03)


def test_calibration_error_by_hand() -> None:
    metric = ExpectedCalibrationError()
    probability, outcome = [0.95, 0.95, 0.95, 0.95, 0.15, 0.15], [1, 1, 1, 0, 0, 1]
    found = metric.compute(probability=probability, outcome=outcome)
    assert found == {"ece": pytest.approx((4 * 0.2 + 2 * 0.35) / 6)}
    assert metric._compute([0.7], [1.0], low=0.5) == {"ece": pytest.approx(0.3)}


def test_reliability_is_scikit_learns() -> None:
    rng = np.random.default_rng(1)
    probability = rng.random(2000)
    outcome = (rng.random(2000) < probability**2).astype(float)
    share, mean = calibration_curve(outcome, probability, n_bins=10)
    bins = reliability(probability, outcome)
    assert [item["outcome"] for item in bins] == pytest.approx(share.tolist())
    assert [item["probability"] for item in bins] == pytest.approx(mean.tolist())


def test_a_perfect_and_an_ignorant_model() -> None:
    assert fit_temperature(np.ones(100)) == pytest.approx(0.01, rel=0.05), "never wrong: as sharp as may be"
    assert fit_temperature(np.tile([1.0, -1.0], 100)) == pytest.approx(100, rel=0.05), "a coin: as flat as may be"


def test_a_length_bias_is_seen_and_none_is_not() -> None:
    rng = np.random.default_rng(2)
    fair, biased = length_bias(rankings(3000, rng, 1.0)), length_bias(rankings(3000, rng, 1.0, length=0.2))
    assert abs(fair["correlation_within_prompt"]) < 0.06
    assert fair["model_prefers_longer"] == pytest.approx(0.5, abs=0.04)
    assert biased["correlation_within_prompt"] > 0.6
    assert biased["model_prefers_longer"] > 0.75
    assert biased["labelers_prefer_longer"] == pytest.approx(0.5, abs=0.04)
    by_length = biased["accuracy_by_length_difference"]
    assert by_length["preferred is longer"]["accuracy"] > by_length["preferred is shorter"]["accuracy"] + 0.3
    assert by_length["lengths match"]["accuracy"] == pytest.approx(0.80, abs=0.06)
    assert sum(item["pairs"] for item in by_length.values()) == 3000


def test_accuracy_by_what_a_ranking_is() -> None:
    rows: list[dict[str, Any]] = [
        {"ids": [[0, 1], [0, 1, 1]], "pairs": [{"better": 0, "worse": 1, "target": 1.0, "tie": False}], "prompt_tokens": 1, "record": {"labeler": who}}
        for who in ("ana", "ana", "ben", "ben")
    ]  # fmt: skip
    rows[3]["pairs"] = [{"better": 0, "worse": 1, "target": 0.5, "tie": True}]
    judged = Judged(rows, [[1.0, 0.0], [0.0, 1.0], [2.0, 2.0], [5.0, 0.0]])
    found = judged.by(lambda row: row["record"]["labeler"])
    assert found["ana"]["accuracy"] == 0.5
    assert (found["ben"]["accuracy"], found["ben"]["pairs"]) == (0.5, 1), "an equal score counts half, a tie not at all"
    assert judged.accuracy(np.zeros(3, bool)) == {"accuracy": None, "ci95": None, "pairs": 0}

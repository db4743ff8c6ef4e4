"""What scores mean, on scores whose meaning is known."""

from __future__ import annotations

from typing import Any

from pipeline.evaluation.calibration import expected_calibration_error, fit_temperature, reliability
from pipeline.evaluation.reward_model import ScoredPairs, calibration, length_bias

import numpy as np
import pytest
from sklearn.calibration import calibration_curve


def rankings(
    number: int, rng: np.random.Generator, scale: float, length: float = 0.0, tie_margin: float = 0.0
) -> ScoredPairs:
    """Pairs whose labelers follow sigmoid(difference of truth), ties left out; the model scores `scale` times the truth.

    With a tie margin t: σ(difference - t) either way round, and a tie otherwise (Rao and Kupper 1967).
    """
    rows: list[dict[str, Any]] = []
    scores = []
    for _ in range(number):
        truth = rng.normal(0, 1.5, 2)
        lengths = rng.integers(5, 40, 2)
        drawn, difference = rng.random(), truth[0] - truth[1]
        first = drawn < 1 / (1 + np.exp(tie_margin - difference))
        second = drawn > 1 - 1 / (1 + np.exp(tie_margin + difference))
        pair = {"better": 0 if first else 1, "worse": 1 if first else 0, "target": 1.0, "tie": not (first or second)}
        ids = [[len(rows), 1, 2] + [0] * int(n) for n in lengths]
        rows.append(
            {"ids": ids, "pairs": [pair], "prompt_tokens": 3, "record": {"ranks": [1, 2], "responses": ["a", "b"]}}
        )
        scores.append((scale * truth + length * lengths).tolist())
    return ScoredPairs(rows, scores)


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_temperature_scaling_recovers_what_labelers_do(scale: float) -> None:
    pairs = rankings(6000, np.random.default_rng(0), scale)
    found = calibration(pairs)
    assert found["temperature"] == pytest.approx(scale, rel=0.1)
    assert found["after"]["ece"] < 0.025
    if scale != 1.0:
        assert found["before"]["ece"] > 0.08
    assert pairs.accuracy().accuracy == pytest.approx(0.80, abs=0.03)


def test_calibration_error_by_hand() -> None:
    probability, outcome = [0.95, 0.95, 0.95, 0.95, 0.15, 0.15], [1, 1, 1, 0, 0, 1]
    assert expected_calibration_error(probability, outcome) == pytest.approx((4 * 0.2 + 2 * 0.35) / 6)
    assert expected_calibration_error([0.7], [1.0], low=0.5) == pytest.approx(0.3)


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


def test_a_true_model_of_ties_is_calibrated_by_its_own_probability() -> None:
    """With `ties: margin` σ(difference) is not what the model says of pairs that are no tie."""
    pairs = rankings(12_000, np.random.default_rng(4), 1.0, tie_margin=0.8)
    own = calibration(pairs, tie_margin=0.8)
    assert own["before"]["ece"] < 0.012
    assert own["temperature"] == pytest.approx(1.0, rel=0.05)
    assert calibration(pairs)["before"]["ece"] > 0.025


def ranking(prompt: int, labeler: str = "ana", tie: bool = False, **more: Any) -> dict[str, Any]:
    pair = {"better": 0, "worse": 1, "target": 0.5 if tie else 1.0, "tie": tie}
    return {
        "ids": [[prompt, 1], [prompt, 1, 1]],
        "pairs": [pair],
        "prompt_tokens": 1,
        "record": {"labeler": labeler},
        **more,
    }


def test_accuracy_by_what_a_ranking_is() -> None:
    rows = [ranking(0), ranking(1), ranking(2, "ben"), ranking(3, "ben", tie=True)]
    pairs = ScoredPairs(rows, [[1.0, 0.0], [0.0, 1.0], [2.0, 2.0], [5.0, 0.0]])
    found = pairs.accuracy_by(lambda row: row["record"]["labeler"])
    assert found["ana"].accuracy == 0.5
    assert (found["ben"].accuracy, found["ben"].pairs) == (0.5, 1), "an equal score counts half, a tie not at all"
    assert pairs.accuracy(np.zeros(3, bool)).as_dict() == {"accuracy": None, "ci95": None, "pairs": 0}


def test_rankings_of_one_prompt_are_one_prompt() -> None:
    """By their token ids, or by `prompt_id` where rows have one; intervals and temperature's halves go by it."""
    rows = [ranking(7), ranking(8), ranking(7), ranking(9), ranking(7)]
    pairs = ScoredPairs(rows, [[1.0, 0.0]] * 5)
    assert pairs.prompt.tolist() == [0, 1, 0, 2, 0]
    assert pairs.ranking.tolist() == [0, 1, 2, 3, 4]
    named = ScoredPairs([{**row, "prompt_id": f"p{i // 3}"} for i, row in enumerate(rows)], [[1.0, 0.0]] * 5)
    assert named.prompt.tolist() == [0, 0, 0, 1, 1]


def test_intervals_of_accuracy_are_as_wide_as_prompts_make_them() -> None:
    rng = np.random.default_rng(5)
    right = rng.random(50) < 0.7
    scores = [[1.0, 0.0] if right[i // 8] else [0.0, 1.0] for i in range(400)]
    low, high = ScoredPairs([ranking(i // 8) for i in range(400)], scores).accuracy().ci95 or (0.0, 0.0)
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.21 / 50), rel=0.25)

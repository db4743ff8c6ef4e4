"""Reward up and an independent judge down is over-optimisation; noise is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.evaluation.over_optimisation import measured_judges, over_optimisation, reward_kl_curve

import numpy as np
import pytest

STANDARD_ERROR = 0.02


def points(proxy: list[float], gold: list[float], error: float | None = STANDARD_ERROR) -> list[dict[str, Any]]:
    known = {} if error is None else {"rubric_se": error}
    return [
        {"step": 10 * i, "kl": 3.0 * i, "reward": a, "rubric": b, "score_reward_model": a, "stopped": 1.0, **known}
        for i, (a, b) in enumerate(zip(proxy, gold, strict=True))
    ]


def fell(proxy: list[float], gold: list[float], error: float | None = STANDARD_ERROR) -> bool | None:
    (found,) = over_optimisation(points(proxy, gold, error), ["rubric"])
    return found.fell


def test_over_optimisation_is_reward_up_and_judge_down() -> None:
    (found,) = over_optimisation(points([0.0, 1.0, 2.0, 3.0], [0.5, 0.8, 0.7, 0.4]), ["rubric"])
    assert (found.fell, found.step, found.gold_best, found.gold_end) == (True, 10, 0.8, 0.4)
    assert (found.proxy_then, found.proxy_end) == (1.0, 3.0)
    assert fell([0.0, 1.0, 2.0, 3.0], [0.5, 0.6, 0.7, 0.8]) is False, "both rise"
    assert fell([0.0, 3.0, 2.0, 1.0], [0.5, 0.8, 0.7, 0.4]) is False, "both fall"
    assert fell([0.0, 1.0, 2.0, 3.0], [0.5, 0.7, 0.8, 0.79]) is False, "a fall of less than its noise"
    assert fell([0.0, 1.0, 2.0, 3.0], [0.5, 0.7, 0.8, 0.78], error=1e-4) is False, (
        "less than a tenth of what was gained"
    )
    assert fell([0.0, 1.0, 2.0, 3.0], [0.80, 0.79, 0.79, 0.75], error=1e-4) is False, "less than a tenth of the best"
    assert fell([0.0, 1.0, 2.0, 3.0], [0.80, 0.79, 0.79, 0.70], error=1e-4) is True
    assert over_optimisation([], ["rubric"]) == []


def test_without_standard_errors_nothing_is_claimed() -> None:
    assert fell([0.0, 1.0, 2.0, 3.0], [0.5, 0.8, 0.7, 0.4], error=None) is None
    assert fell([0.0, 1.0, 2.0, 3.0], [0.5, 0.8, 0.7, 0.4], error=float("nan")) is None
    assert fell([0.0, 1.0, 2.0, 3.0], [0.5, 0.6, 0.7, 0.8], error=None) is False, "no fall needs no test"


@pytest.mark.parametrize("evaluations", [3, 12, 40])
def test_a_flat_judge_is_flagged_in_one_run_of_twenty_at_most(evaluations: int) -> None:
    rng = np.random.default_rng(evaluations)
    runs, flagged = 2000, 0
    for _ in range(runs):
        gold = rng.normal(0.1, STANDARD_ERROR, evaluations)  # so near 0 that a tenth of it is nothing
        flagged += fell([float(i) for i in range(evaluations)], gold.tolist()) is True
    assert flagged / runs <= 0.05


def test_a_real_fall_is_flagged() -> None:
    rng = np.random.default_rng(0)
    truth = np.array([0.5, 0.7, 0.8, 0.8, 0.75, 0.7, 0.6])
    runs = [fell([float(i) for i in range(7)], (truth + rng.normal(0, 0.02, 7)).tolist()) for _ in range(200)]
    assert np.mean([run is True for run in runs]) > 0.95


def test_the_curve_reads_every_evaluation_and_judges_are_those_of_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "ppo").mkdir()
    rows = [
        {"step": 0, "eval_kl": 0.0, "eval_score": -1.0, "eval_rubric": 0.2, "eval_rubric_se": 0.02, "eval_new_metric": 1.0},
        {"step": 1, "kl": 0.5, "score": -0.9},
        {"step": 2, "eval_kl": 1.5, "eval_score": 0.0, "eval_rubric": 0.4, "eval_rubric_se": 0.02, "eval_new_metric": 1.0},
    ]  # fmt: skip
    (tmp_path / "ppo" / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    curve = reward_kl_curve(tmp_path)
    assert [(p["step"], p["kl"], p["reward"], p["rubric"]) for p in curve] == [(0, 0.0, -1.0, 0.2), (2, 1.5, 0.0, 0.4)]
    assert measured_judges(curve, ["rubric", "asked_nowhere"]) == ["rubric"], "new_metric is no judge"

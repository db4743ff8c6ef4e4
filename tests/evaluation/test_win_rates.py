"""Win rates between models, and how the reward's agreement with a judge is measured."""

from __future__ import annotations

from typing import Any

from pipeline.evaluation.answers import ModelAnswers, dialogue_text
from pipeline.evaluation.win_rates import agreement, win_rates
from pipeline.rollout.rewards import Answers

import numpy as np
import pytest


def answers(length: int, number: int = 3) -> ModelAnswers:
    given: Any = [[]] * number
    texts = [""] * number
    return ModelAnswers(Answers(given, given, [[0] * length] * number, texts, given), None, [])  # type: ignore[arg-type]


def test_every_pair_of_models_is_compared_once() -> None:
    names = ("their/model", "pretrain", "sft", "best_of_4", "ppo")
    scores = {name: {"reward": [float(i)] * 3} for i, name in enumerate(names)}
    rows = win_rates(scores, {name: answers(4) for name in scores}, ["a", "b", "c"], ["reward"])
    assert len(rows) == 10
    assert {(row["candidate"], row["baseline"]) for row in rows} >= {
        ("ppo", "sft"),
        ("ppo", "their/model"),
        ("sft", "pretrain"),
    }
    assert all(row["win_rate"] == 1.0 for row in rows)


def test_prompts_that_stand_several_times_count_once_in_intervals() -> None:
    rng = np.random.default_rng(0)
    wins = np.repeat(rng.random(20) < 0.6, 10).astype(float).tolist()
    scores = {"sft": {"rubric": [0.5] * 200}, "ppo": {"rubric": wins}}
    models = {name: answers(4, 200) for name in scores}

    def width(names: list[str]) -> float:
        (row,) = win_rates(scores, models, names, ["rubric"])
        return float(row["ci95"][1] - row["ci95"][0])

    assert width([str(i // 10) for i in range(200)]) > 2.5 * width([str(i) for i in range(200)])


def test_lengths_that_do_not_overlap_leave_the_rate_at_equal_length_open() -> None:
    scores = {"sft": {"rubric": [0.0, 1.0, 0.0]}, "ppo": {"rubric": [1.0, 0.0, 1.0]}}
    (row,) = win_rates(scores, {"sft": answers(4), "ppo": answers(9)}, ["a", "b", "c"], ["rubric"])
    assert row["length_controlled"] is None


def test_agreement_is_of_the_reward_model_with_independent_judges() -> None:
    scores = {
        "ppo": {"reward": [1.0, 1.0, -1.0, 1.0], "reward_model": [1.0, 2.0, 3.0, 4.0], "rubric": [2.0, 4.0, 6.0, 8.0]}
    }
    (row,) = agreement(scores, ["rubric", "asked nothing"])
    assert (row["of"], row["stage"], row["answers"]) == ("reward_model", "ppo", 4)
    assert row["pearson_r"] == pytest.approx(1.0)
    assert agreement({"ppo": {"reward_model": [1.0, 2.0, 3.0], "rubric": [1.0, 1.0, 1.0]}}, ["rubric"]) == []


def test_a_dialogue_is_one_text() -> None:
    assert dialogue_text([{"role": "user", "content": "Hi"}]) == "Hi"
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert dialogue_text(turns) == "system: Be brief.\n\nuser: Hi"

"""The verdict's sentences, the bad news too, on numbers that call for them."""

from __future__ import annotations

from typing import Any

from pipeline.evaluation.verdict import verdict

import pytest


def report(**changes: Any) -> dict[str, Any]:
    """A report in which nothing is wrong."""
    row = {
        "candidate": "ppo", "baseline": "sft", "judge": "rubric", "win_rate": 0.8, "ci95": [0.7, 0.9],
        "length_controlled": 0.75, "prompts": 200,
    }  # fmt: skip
    values: dict[str, Any] = {
        "prompts": 200, "notes": [], "judges": {"independent": ["rubric"]}, "win_rates": [row, {**row, "judge": "reward"}],
        "over_optimisation": [], "agreement": [], "alignment_tax": {"perplexity": {"pretrain": 10.0, "sft": 10.5, "ppo": 10.6}},
        "variety": {name: {"stopped": 1.0, "distinct_2": 0.4} for name in ("sft", "ppo")},
        "stages": {"reward": {"accuracy": 0.75, "accuracy_ci95": [0.7, 0.8], "length_bias": {"correlation": 0.1}}},
    }  # fmt: skip
    return {**values, **changes}


def told(level: str, **changes: Any) -> str:
    return "\n".join(finding.text for finding in verdict(report(**changes)) if finding.level == level)


def reward_model(**metrics: Any) -> dict[str, Any]:
    return {"stages": {"reward": {"accuracy": 0.75, "accuracy_ci95": [0.7, 0.8], **metrics}}}


def test_a_run_in_which_nothing_is_wrong() -> None:
    assert told("bad") == told("warning") == ""
    assert told("good").splitlines()[0] == "ppo beats sft in 80% [70%, 90%] by judge rubric"
    assert "reward" not in told("good").splitlines()[0], "the training reward is no evidence"


def test_few_prompts() -> None:
    assert "only 1 held-out prompt was answered" in told("warning", prompts=1)
    assert "only 49 held-out prompts were answered" in told("warning", prompts=49)
    assert "beats" not in told("good", prompts=49)
    assert "no held-out prompts" in told("warning", prompts=0)


def test_wins_and_losses() -> None:
    row = report()["win_rates"][0]
    assert "ppo loses to sft" in told("bad", win_rates=[{**row, "win_rate": 0.2, "ci95": [0.1, 0.3]}])
    assert "cannot be told apart" in told("warning", win_rates=[{**row, "win_rate": 0.55, "ci95": [0.45, 0.65]}])
    assert "but only 40% at equal length" in told("warning", win_rates=[{**row, "length_controlled": 0.4}])
    assert "not identified" in told("good", win_rates=[{**row, "length_controlled": None}])
    alone = {"win_rates": [{**row, "judge": "reward"}], "judges": {"independent": []}}
    assert "by the reward it was trained on" in told("good", **alone)
    assert "no independent judge" in told("warning", **alone)


def test_perplexity_lost() -> None:
    worse = {"perplexity": {"pretrain": 1.92, "sft": 40.0, "ppo": 89.0}}
    assert "perplexity on held-out pretraining text rose 1.92 (pretrain) → 40 (sft) → 89 (ppo)" in told(
        "bad", alignment_tax=worse
    )
    assert "alignment tax" in told("warning", alignment_tax={"perplexity": {"pretrain": 10.0, "ppo": 12.0}})
    assert told("bad", alignment_tax=None) == ""


def rows(before: float, after: float, answers: int = 200) -> list[dict[str, Any]]:
    return [
        {"stage": stage, "judge": "rubric", "pearson_r": r, "answers": answers}
        for stage, r in (("sft", before), ("ppo", after))
    ]


def test_agreement_that_fell() -> None:
    assert "correlation 0.74 → 0.20" in told("bad", agreement=rows(0.74, 0.20))
    assert told("bad", agreement=rows(0.74, 0.70)) == ""
    assert told("bad", agreement=rows(0.74, 0.50, answers=8)) == "", "eight answers are noise"
    assert told("bad", agreement=rows(1.0, -1.0)), "the ends of the range"


def test_over_optimisation_and_why_it_cannot_be_tested() -> None:
    item = {
        "judge": "rubric", "fell": True, "step": 20, "kl": 3.0, "gold_best": 0.8, "gold_end": 0.6, "proxy_then": 1.0,
        "proxy_end": 2.0, "p_value": 0.001,
    }  # fmt: skip
    assert "over-optimised from rollout 20" in told("bad", over_optimisation=[item])
    untested = told("warning", over_optimisation=[{**item, "fell": None, "p_value": None}])
    assert "cannot be tested" in untested
    assert "eval_rubric_se" in untested
    assert told("bad", over_optimisation=[{**item, "fell": False}]) == ""


@pytest.mark.parametrize(
    ("bias", "level", "words"),
    [
        ({"correlation_within_prompt": 0.94, "correlation": 0.3}, "bad", "correlation 0.94"),
        ({"correlation_within_prompt": 0.1, "correlation": -0.8}, "bad", "correlation -0.80"),
        ({"model_prefers_longer": 0.94, "labelers_prefer_longer": 0.9}, "bad", "in 94% of pairs, labelers in 90%"),
        ({"model_prefers_longer": 0.7, "labelers_prefer_longer": 0.55}, "warning", "in 70% of pairs, labelers in 55%"),
        ({"model_prefers_longer": 0.3, "labelers_prefer_longer": 0.5}, "warning", "in 30% of pairs"),
    ],
)
def test_length_bias_is_said(bias: dict[str, float], level: str, words: str) -> None:
    assert words in told(level, **reward_model(length_bias=bias))


def test_a_reward_model_no_better_than_chance_and_one_that_is_miscalibrated() -> None:
    assert "no better than chance" in told("bad", **reward_model(accuracy=0.52, accuracy_ci95=[0.48, 0.56]))
    assert "miscalibrated: expected calibration error 0.22" in told("warning", **reward_model(ece=0.22))


def test_answers_that_do_not_end_or_all_say_the_same() -> None:
    variety = {"sft": {"stopped": 0.95, "distinct_2": 0.5}, "ppo": {"stopped": 0.4, "distinct_2": 0.1}}
    said = told("warning", variety=variety)
    assert "60% of ppo's answers hit the length limit" in said
    assert "distinct word pairs 0.50 → 0.10" in said

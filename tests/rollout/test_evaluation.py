"""PPO's evaluations: samples that agree with the mean, judges that draw random numbers, an end that survives a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helpers.launches import kill_when, launch, lineage
from helpers.ppo_training import with_training
from helpers.worlds import make_policy, write_recipe
from pipeline.training import history

import pytest


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    return make_policy(tmp_path / "sft", "abcd")


SMALL = {"prompts_per_rollout": 16, "minibatches": 1, "max_response_tokens": 3, "kl_coef": 0.0}


@pytest.mark.parametrize("rule", ["replace", "subtract", "none"])
def test_samples_have_the_scores_of_the_mean(rule: str, policy: Path, tmp_path: Path) -> None:
    """Both are after the rule for responses without a stop token; the score before it stands beside."""
    body = "return float(len(response))"
    rules = {"missing_eos": rule, "missing_eos_score": -2.0}
    found = with_training(
        tmp_path / "run",
        policy,
        body,
        lambda training, _: training.evaluation.evaluate(training.prompts.held_out),
        **SMALL | rules,
    )
    assert len(found.samples) == found.metrics["eval_prompts"]
    for key, metric in (
        ("score", "eval_score"),
        ("score_before_eos_rule", "eval_score_before_eos_rule"),
        ("reference_score", "eval_reference_score"),
    ):
        mean = sum(sample[key] for sample in found.samples) / len(found.samples)
        assert mean == pytest.approx(found.metrics[metric], abs=1e-6), metric
    expected = {"replace": lambda _: -2.0, "subtract": lambda before: before - 2.0, "none": lambda before: before}
    assert {sample["finished"] for sample in found.samples} == {True, False}
    for sample in found.samples:
        before = sample["score_before_eos_rule"]
        assert sample["score"] == (before if sample["finished"] else expected[rule](before))


def write_judge(folder: Path, name: str, body: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.py").write_text(f"import os, time\n\n\ndef score(prompts, responses, rows):\n    {body}\n")
    return f"{name}:score"


def test_a_judge_of_random_numbers_does_not_part_processes(policy: Path, tmp_path: Path) -> None:
    """`patience` ends the run by the judge's scores: both processes must end at the same rollout, or they wait for ever."""
    judge = write_judge(tmp_path / "run", "chance", "return [os.urandom(1)[0] / 255 for _ in responses]")
    changes: dict[str, Any] = {
        "judges": [judge],
        "best_metric": "chance",
        "patience": 2,
        "eval_rollouts": 1,
        "total_rollouts": 40,
    }
    recipe = write_recipe(tmp_path / "run", policy, "return 0.0", **SMALL | changes)
    launch("ppo", ["--config", str(recipe)], processes=2)
    ended = lineage(tmp_path / "run" / "out")["metrics"]
    assert ended["rollouts"] < 40
    evaluated = [row["eval_chance"] for row in history.read(tmp_path / "run" / "out") if "eval_chance" in row]
    assert len(set(evaluated)) == len(evaluated) > 2, "the judge drew numbers"


def test_a_run_that_has_ended_does_not_train_on_after_a_kill(policy: Path, tmp_path: Path) -> None:
    """Killed in its last evaluation, after the checkpoint of the rollout that exceeded `stop_kl`."""
    slow = "time.sleep(float(os.environ.get('SLOW', 0)))\n    return [0.0] * len(responses)"
    changes: dict[str, Any] = {
        "judges": ["slow:score"],
        "stop_kl": 0.05,
        "learning_rate": 5e-5,
        "eval_rollouts": 1,
        "save_steps": 1,
        "total_rollouts": 30,
    }
    for name in ("whole", "killed"):
        write_judge(tmp_path / name, "slow", slow)
        write_recipe(tmp_path / name, policy, "return float(response.count('b'))", **SMALL | changes)
    launch("ppo", ["--config", str(tmp_path / "whole" / "ppo.yaml")])
    whole = lineage(tmp_path / "whole" / "out")
    rollouts = whole["metrics"]["rollouts"]
    assert 1 < rollouts < 30
    killed = tmp_path / "killed" / "out"
    flags = ["--config", str(tmp_path / "killed" / "ppo.yaml")]
    last = killed / f"checkpoint-{rollouts}" / "manifest.json"
    assert kill_when("ppo", flags, last.is_file, more={"SLOW": "1"}, delay=0.3) < 0
    launch("ppo", flags)
    resumed = lineage(killed)
    assert resumed["resumed_from"] == [rollouts]
    assert resumed["metrics"]["rollouts"] == rollouts
    assert resumed["weights_sha256"] == whole["weights_sha256"]

"""Killed anywhere and started again by the same command, a stage ends as if nothing had happened."""

from __future__ import annotations

import random
import signal
from pathlib import Path
from typing import Any

from helpers.launches import STAGES, kill_when, launch, lineage, parents, tiny_flags

import pytest

NOT_COMPARED = (
    "tokens_per_second",
    "model_flops_per_second",
    "seconds",
    "episodes_per_second",
    "response_tokens_per_second",
)


def checkpoint_ready(folder: Path, after: int = 0) -> Any:
    """Whether a sealed checkpoint past step `after` stands in the folder."""
    return lambda: any(
        int(path.parent.name.split("-")[1]) > after for path in folder.glob("checkpoint-*[0-9]/manifest.json")
    )


def same_history(one: Path, other: Path) -> bool:
    from pipeline.training import history

    def rows(folder: Path) -> list[dict[str, Any]]:
        return [{k: v for k, v in row.items() if not k.startswith(NOT_COMPARED)} for row in history.read(folder)]

    return rows(one) == rows(other)


def assert_same(one: Path, other: Path) -> None:
    a, b = lineage(one), lineage(other)
    assert b["weights_sha256"] == a["weights_sha256"]
    assert b["metrics"] == a["metrics"]
    assert b["flops"] == a["flops"]
    assert same_history(one, other)


@pytest.mark.parametrize(
    "stage", [pytest.param(stage, marks=() if stage == "sft" else pytest.mark.full) for stage in STAGES]
)
def test_sigkill_and_resume(chain: Path, recipes: Path, tmp_path: Path, stage: str) -> None:
    flags = tiny_flags(stage, tmp_path, config=recipes / f"{stage}.yaml", report_to=None, **parents(stage, chain))
    delay = random.Random(stage).uniform(0, 0.5)
    code = kill_when(stage, flags, checkpoint_ready(tmp_path / stage), delay=delay)
    assert code != 0
    assert not (tmp_path / stage / "lineage.json").exists()
    launch(stage, flags)
    assert_same(chain / stage, tmp_path / stage)
    resumed = lineage(tmp_path / stage)["resumed_from"]
    assert len(resumed) == 1
    assert resumed[0] > 0


@pytest.mark.full
def test_two_processes_resume(chain: Path, recipes: Path, tmp_path: Path) -> None:
    """PPO in two processes: killed and resumed equals not killed."""
    runs = [tmp_path / "whole", tmp_path / "killed"]
    flags = [
        tiny_flags("ppo", run, config=recipes / "ppo.yaml", report_to=None, **parents("ppo", chain)) for run in runs
    ]
    launch("ppo", flags[0], processes=2)
    kill_when("ppo", flags[1], checkpoint_ready(runs[1] / "ppo"), processes=2)
    launch("ppo", flags[1], processes=2)
    assert_same(runs[0] / "ppo", runs[1] / "ppo")
    assert lineage(runs[1] / "ppo")["processes"] == 2
    assert lineage(runs[1] / "ppo")["resumed_from"]


@pytest.mark.parametrize(
    ("stage", "number"), [("sft", signal.SIGTERM), pytest.param("ppo", signal.SIGINT, marks=pytest.mark.full)]
)
def test_a_signal_ends_politely(chain: Path, recipes: Path, tmp_path: Path, stage: str, number: int) -> None:
    """`python pipeline/<stage>.py` gives the true exit code; the run goes on from where it stopped."""
    flags = tiny_flags(stage, tmp_path, config=recipes / f"{stage}.yaml", report_to=None, **parents(stage, chain))
    code = kill_when(stage, flags, checkpoint_ready(tmp_path / stage), number=number)
    assert code == 128 + number
    assert "ending at the next safe point" in (tmp_path / stage / "log.txt").read_text()
    launch(stage, flags)
    assert_same(chain / stage, tmp_path / stage)


@pytest.mark.full
def test_a_broken_checkpoint_is_not_resumed_from(chain: Path, recipes: Path, tmp_path: Path) -> None:
    """A checkpoint that lost a byte: the run starts over rather than go on from it."""
    flags = tiny_flags("sft", tmp_path, config=recipes / "sft.yaml", report_to=None, **parents("sft", chain))
    kill_when("sft", flags, checkpoint_ready(tmp_path / "sft", after=10))
    for path in (tmp_path / "sft").glob("checkpoint-*/optimizer.pt"):
        path.unlink()  # stock Trainer would go on with a fresh Adam, silently
    launch("sft", flags)
    assert_same(chain / "sft", tmp_path / "sft")
    assert lineage(tmp_path / "sft")["resumed_from"] == []


@pytest.mark.full
@pytest.mark.parametrize("stage", STAGES)
def test_three_kills_at_random_moments(chain: Path, recipes: Path, tmp_path: Path, stage: str) -> None:
    """Killed three times at random moments, also while a checkpoint is written, and resumed each time."""
    longer = (
        {"total_rollouts": 12, "save_steps": 2}
        if stage == "ppo"
        else {"max_steps": 120, "save_steps": 10, "eval_steps": 10}
    )
    changes = {**parents(stage, chain), **longer}
    whole, killed = (
        tiny_flags(stage, tmp_path / name, config=recipes / f"{stage}.yaml", report_to=None, **changes)
        for name in ("whole", "killed")
    )
    launch(stage, whole)
    chance = random.Random(f"three {stage}")
    folder = tmp_path / "killed" / stage
    last = 0
    for _ in range(3):
        kill_when(stage, killed, checkpoint_ready(folder, after=last), delay=chance.uniform(0, 0.4))
        last = max(
            (int(p.parent.name.split("-")[1]) for p in folder.glob("checkpoint-*[0-9]/manifest.json")), default=0
        )
    launch(stage, killed)
    assert_same(tmp_path / "whole" / stage, folder)
    resumed = lineage(folder)["resumed_from"]
    assert len(resumed) == 3
    assert min(resumed) > 0

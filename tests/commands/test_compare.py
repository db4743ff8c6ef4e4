"""`rlhf compare`: what differs between two runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from helpers.launches import rlhf_here
from helpers.runs import change_lineage, make_run

import pytest


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    return make_run(tmp_path_factory.mktemp("compared") / "run", tokenizer)


def test_a_run_and_its_copy(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "copy")
    assert rlhf_here("compare", run, tmp_path / "copy")[0].count("the same weights, nothing differs") == 4
    assert "are the same folder; name two runs" in rlhf_here("compare", run, run, code=2)[1]


def test_two_runs_compared(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run / "reward", other / "reward")
    change_lineage(other, "reward", recipe={"learning_rate": 0.25}, metrics={"accuracy": 0.99}, weights_sha256="0" * 64)
    found = json.loads(rlhf_here("compare", run, other, "--json")[0])
    assert found["only"][str(run)] == ["pretrain", "sft", "ppo"]
    reward = found["stages"]["reward"]
    assert reward["recipe"] == {"learning_rate": [None, 0.25]}
    assert set(reward["result"]) == {"accuracy"}
    assert (reward["same_weights"], "data" in reward) == (False, False)
    shown = rlhf_here("compare", run / "reward", other / "reward")[0]
    assert "reward: other weights" in shown
    assert "learning_rate" in shown
    assert "holds no finished stage" in rlhf_here("compare", run, tmp_path, code=2)[1]
    assert "no stage in common" in rlhf_here("compare", run / "sft", other, code=2)[1]


def test_other_weights_of_a_reward_are_a_difference_and_its_path_is_none(run: Path, tmp_path: Path) -> None:
    for weight, path in ((0.5, "a"), (1.0, "b")):
        folder = tmp_path / path
        shutil.copytree(run / "ppo", folder / "ppo")
        change_lineage(folder, "ppo", recipe={"reward": [{"model": path, "function": None, "weight": weight}]})
    found = json.loads(rlhf_here("compare", tmp_path / "a", tmp_path / "b", "--json")[0])
    ours, theirs = found["stages"]["ppo"]["recipe"]["reward"]
    assert (ours[0]["weight"], theirs[0]["weight"], "model" in ours[0]) == (0.5, 1.0, False)


@pytest.mark.parametrize(
    ("content", "reason"),
    [("[]", "holds a list, not an object"), ("{}", "lacks"), ('{"stage": "sft", "recipe": 3}', "lacks")],
)
def test_a_lineage_of_another_shape_is_one_line(run: Path, tmp_path: Path, content: str, reason: str) -> None:
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "lineage.json").write_text(content, encoding="utf-8")
    assert f"lineage.json: {reason}" in rlhf_here("compare", tmp_path, run, code=2)[1]

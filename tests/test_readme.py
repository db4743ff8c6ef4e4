"""Every command of the README runs as it stands there, on the demo's recipes at tiny size (make targets excepted)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from helpers.launches import ROOT, STAGES, TINY, environment
from pipeline.config.reader import read_recipe
from pipeline.config.stages import STAGES as ARGUMENTS

import pytest
import yaml

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    lines = [line.split("   #")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith(("make ", "source ", "#"))]


def test_the_first_commands_are_the_two_that_need_nothing() -> None:
    assert [line.split("#")[0].strip() for line in blocks("bash")[0].splitlines()] == ["make demo", "make test"]
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"demo", "test", "test-full", "check", "install"} <= set(targets)


def test_no_command_compares_a_run_with_itself() -> None:
    for command in commands():
        words = command.split()
        assert "compare" not in words or words[-1] != words[-2], command


def test_links_lead_somewhere() -> None:
    for path in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "recipes").glob("*/README.md"),
    ]:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_the_yaml_of_the_readme_is_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "sft.yaml"
    path.write_text(blocks("yaml")[0])
    values = read_recipe(path, ARGUMENTS["sft"])
    assert values["lora"].r == 16
    reward = tmp_path / "ppo.yaml"
    reward.write_text(blocks("yaml")[1])
    assert [source.weight for source in read_recipe(reward, ARGUMENTS["ppo"])["reward"]] == [1.0, 0.2]


@pytest.mark.full
def test_every_command_runs(tmp_path: Path) -> None:
    copy = tmp_path / "clone"
    shutil.copytree(
        ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "wandb", "__pycache__", "*_cache")
    )
    for stage in STAGES:
        recipe = copy / "recipes" / "demo" / f"{stage}.yaml"
        values: dict[str, Any] = {**yaml.safe_load(recipe.read_text()), **TINY[stage]}
        for dataset in values["datasets"]:
            dataset["max_rows"] = 400
        recipe.write_text("# Tiny.\n" + yaml.safe_dump(values))
    env = {
        **environment(),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(copy),
    }
    env.pop("ACCELERATE_USE_CPU")
    assert len(commands()) >= 6
    for command in commands():
        done = subprocess.run(["bash", "-c", command], cwd=copy, env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert (copy / "runs" / "first" / "report" / "index.html").is_file()
    assert (copy / "runs" / "first" / "ppo-two" / "lineage.json").is_file()
    printed = []
    for snippet in blocks("python"):
        done = subprocess.run(
            [sys.executable, "-c", snippet], cwd=copy, env=env, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
    assert re.fullmatch(r"\[-?\d+\.\d+\]\n", printed[1])

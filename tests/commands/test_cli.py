"""`rlhf` itself: its commands, their help, what `rlhf run` starts."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from helpers.launches import ROOT, environment, rlhf_here
from pipeline.cli import COMMANDS
from pipeline.commands import run
from pipeline.config.rewards import RewardSource
from pipeline.errors import UserError

import pytest


def test_every_command_is_a_file_and_help_loads_no_torch() -> None:
    files = {path.stem.replace("_", "-") for path in (ROOT / "pipeline" / "commands").glob("*.py")}
    assert set(COMMANDS) <= files
    code = (
        "import sys\nfrom pipeline.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as ended:\n"
        "    print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules], ended.code)"
    )
    for words in (["--help"], *([name, "--help"] for name in COMMANDS)):
        done = subprocess.run(
            [sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=ROOT, env=environment()
        )
        assert done.stdout.splitlines()[-1] == "[] 0", (words, done.stderr)


def arguments(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    return parser.parse_args(["recipe", *flags])


def test_a_run_takes_all_visible_gpus_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    command, environment = run.launch_command(arguments(), 8)
    assert command[command.index("--num_processes") + 1] == "8"
    assert "--multi_gpu" in command
    assert "ACCELERATE_USE_CPU" not in environment
    assert capsys.readouterr().out.startswith("run: 8 GPUs are visible and each stage takes all of them")
    for flags, gpus, processes in ((["--num-processes", "2"], 8, "2"), ([], 1, "1"), ([], 0, "1")):
        command, environment = run.launch_command(arguments(*flags), gpus)
        assert command[command.index("--num_processes") + 1] == processes
        assert ("--cpu" in command) == (gpus == 0)
        assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match="--num-processes must be above 0"):
        run.launch_command(arguments("--num-processes", "0"), 8)


def test_a_stage_gets_each_flag_once() -> None:
    recipe = {
        "parent": "./runs/a/sft/",
        "reward": [RewardSource(model="runs/a/reward", weight=0.5), RewardSource(function="m:f")],
    }
    moved = {"runs/a/sft": "/b/sft", "runs/a/reward": "/b/reward"}
    flags = run.stage_flags(recipe, moved, arguments("--seed", "3", "--quiet"))
    assert flags == {"parent": ["/b/sft"], "reward": ["/b/reward*0.5", "m:f"], "seed": ["3"], "quiet": ["true"]}
    (_, second) = run.stage_variants("reward", "/b/reward", 3, arguments("--reward-seeds", "2"))
    words = run.as_flags({"config": ["c.yaml"], **flags} | second)
    keys = [word for word in words if word.startswith("--")]
    assert len(keys) == len(set(keys))
    assert words[words.index("--seed") + 1] == "4"
    assert words[words.index("--output_dir") + 1] == "/b/reward-seed-1"


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    _, err = rlhf_here("compare", "~/none", "other", code=2)
    assert f"{tmp_path}/none: is no folder of a run" in err
    _, err = rlhf_here("check", tmp_path, "--data-root=~/data", code=2)
    assert "holds none of" in err


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = f"{sys.executable} -m pipeline.cli compare /none /none2 2>&1 | true; {sys.executable} -m pipeline.cli --help | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, env=environment())
    assert done.stdout.startswith("usage: rlhf")
    assert "Traceback" not in done.stderr


def test_a_run_is_not_compared_with_itself(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    _, err = rlhf_here("compare", tmp_path, tmp_path / "link", code=2)
    assert "are the same folder; name two runs" in err

"""Real launches of stages and commands, and the demo's recipes at tiny size."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.cli import main

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
CARDS = ROOT / "data_cards"
STAGES = ("pretrain", "sft", "reward", "ppo")


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


def launch_command(stage: str, flags: list[str], processes: int = 1) -> list[str]:
    """`accelerate launch pipeline/<stage>.py`; two CPU processes need --multi_gpu (anything else starts one)."""
    name = "ddp" if processes > 1 else "cpu"
    kind = ["--config_file", str(ROOT / "recipes" / "accelerate" / f"{name}.yaml")]
    kind += ["--multi_gpu", "--main_process_port", "0"] if processes > 1 else []
    script = stage if stage.endswith(".py") else str(ROOT / "pipeline" / f"{stage}.py")
    return [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        *kind,
        "--num_processes",
        str(processes),
        script,
        *flags,
    ]


def launch(stage: str, flags: list[str], processes: int = 1, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        launch_command(stage, flags, processes),
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert not check or done.returncode == 0, f"{stage} {flags}\n{done.stdout}\n{done.stderr}"
    return done


def kill_when(command: list[str], ready: Callable[[], bool], number: int = signal.SIGKILL, delay: float = 0.0) -> int:
    """Start a command, signal its whole group once `ready()`, return its exit code; fails if it ends before."""
    process = subprocess.Popen(
        command,
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 300
    while not ready():
        assert process.poll() is None, f"{command} ended before it could be killed"
        assert time.monotonic() < deadline, f"{command}: not ready after 300 s"
        time.sleep(0.02)
    time.sleep(delay)
    # torchrun starts its workers in sessions of their own: SIGKILL must reach them one by one.
    workers = psutil.Process(process.pid).children(recursive=True) if number == signal.SIGKILL else []
    os.killpg(process.pid, number)
    for worker in workers:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.kill()
    psutil.wait_procs(workers, timeout=30)
    return process.wait(timeout=120)


def rlhf_here(*arguments: object, code: int = 0) -> tuple[str, str]:
    """The command `rlhf` in this process: (what it printed, what it complained of). Imports are not paid for again."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert ended.value.code == code, f"{out.getvalue()}\n{err.getvalue()}"
    return out.getvalue(), err.getvalue()


def flags_of(values: dict[str, Any]) -> list[str]:
    flags = []
    for name, value in values.items():
        flags += [f"--{name}", str(value)]
    return flags


def lineage(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "lineage.json").read_text(encoding="utf-8"))
    return found


# The demo's recipes, shrunk by flags: the same YAML files, the same code, seconds instead of minutes.
TINY: dict[str, dict[str, Any]] = {
    "pretrain": {"max_steps": 60, "eval_steps": 20, "save_steps": 20, "logging_steps": 5, "threads": 1, "precision": "fp32", "warmup_steps": 5},
    "sft": {"max_steps": 40, "eval_steps": 10, "save_steps": 10, "logging_steps": 5, "threads": 1, "precision": "fp32", "warmup_steps": 5},
    "reward": {"max_steps": 40, "eval_steps": 20, "save_steps": 10, "logging_steps": 5, "threads": 1, "precision": "fp32", "warmup_steps": 5},
    "ppo": {
        "total_rollouts": 6, "prompts_per_rollout": 16, "minibatches": 2, "eval_rollouts": 3, "eval_prompts": 8, "save_steps": 2,
        "max_response_tokens": 24, "threads": 1, "precision": "fp32",
    },
}  # fmt: skip


def tiny_flags(stage: str, run: Path, **changes: Any) -> list[str]:
    """Flags that run a stage of the demo at tiny size in `run`, from the parents there."""
    values = {**TINY[stage], "output_dir": run / stage, "report_to": "wandb" if stage == "sft" else None, **changes}
    if stage in ("sft", "reward", "ppo"):
        values.setdefault("parent", run / ("pretrain" if stage == "sft" else "sft"))
    if stage == "ppo":
        values.setdefault("reward", run / "reward")
    config = values.pop("config", ROOT / "recipes" / "demo" / f"{stage}.yaml")
    return ["--config", str(config), *flags_of({k: v for k, v in values.items() if v is not None})]


def parents(stage: str, chain: Path) -> dict[str, Any]:
    found: dict[str, Any] = {} if stage == "pretrain" else {"parent": chain / ("pretrain" if stage == "sft" else "sft")}
    return found | ({"reward": chain / "reward"} if stage == "ppo" else {})

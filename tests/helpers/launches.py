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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from helpers import warm
from pipeline.cli import main

import pytest

ROOT = Path(__file__).resolve().parents[2]
CARDS = ROOT / "data_cards"
STAGES = ("pretrain", "sft", "reward", "ppo")


FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}  # as `accelerate launch` exports it
REPLICATED = {**FSDP2, "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2"}  # two groups that each shard the whole model


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **(more or {})}


def launch_command(stage: str, flags: list[str], processes: int = 1) -> list[str]:
    """`accelerate launch pipeline/<stage>.py`; two CPU processes need --multi_gpu (anything else starts one)."""
    name = "ddp" if processes > 1 else "cpu"
    kind = ["--config_file", str(ROOT / "recipes" / "accelerate" / f"{name}.yaml")]
    kind += ["--multi_gpu", "--main_process_port", "0"] if processes > 1 else []
    return [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        *kind,
        "--num_processes",
        str(processes),
        str(script_of(stage)),
        *flags,
    ]


def launch(
    stage: str, flags: list[str], processes: int = 1, check: bool = True, more: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """A stage in one or more processes of its own, to its end; see `launch_for_real` for accelerate's launcher."""
    started = warm.start(script_of(stage), flags, environment(more), ROOT, processes)
    codes = [process.wait(600) for process in started]
    out, err = ("".join(texts) for texts in zip(*(process.read() for process in started), strict=True))
    code = next((code for code in codes if code), 0)
    assert not check or code == 0, f"{stage} {flags}\n{out}\n{err}"
    return subprocess.CompletedProcess([stage, *flags], code, out, err)


def rlhf(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """The command `rlhf` in a process of its own."""
    done = launch(str(ROOT / "pipeline" / "cli.py"), [str(argument) for argument in arguments], check=False)
    assert done.returncode == code, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done


def launch_for_real(stage: str, flags: list[str], processes: int = 1) -> subprocess.CompletedProcess[str]:
    """The same by `accelerate launch`, as users do."""
    done = subprocess.run(
        launch_command(stage, flags, processes),
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{stage} {flags}\n{done.stdout}\n{done.stderr}"
    return done


def kill_when(
    stage: str,
    flags: list[str],
    ready: Callable[[], bool],
    *,
    processes: int = 1,
    number: int = signal.SIGKILL,
    delay: float = 0.0,
    more: Mapping[str, str] | None = None,
    ranks: Sequence[int] | None = None,
) -> int:
    """Start a stage, signal its processes once `ready()`, return the first exit code; fails if it ends before.

    Args:
        ranks: the processes that get the signal first; the others get it half a second later.
    """
    started = warm.start(script_of(stage), flags, environment(more), ROOT, processes)
    deadline = time.monotonic() + 300
    while not ready():
        assert all(process.poll() is None for process in started), f"{stage} ended early: {started[0].read()}"
        assert time.monotonic() < deadline, f"{stage} {flags}: not ready after 300 s"
        time.sleep(0.02)
    time.sleep(delay)
    for rank in range(processes) if ranks is None else ranks:
        started[rank].signal(number)
    if ranks is not None:
        time.sleep(0.5)  # as long as a launcher takes to notice
    for process in started:
        process.signal(number)
    codes = [process.wait(120) for process in started]
    for process in started:
        process.read()
    return codes[0]


def script_of(stage: str) -> Path:
    return Path(stage) if stage.endswith(".py") else ROOT / "pipeline" / f"{stage}.py"


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

"""Tiny models and real launches for the tests; nothing here needs a network or a GPU."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1", WANDB_MODE="offline", TOKENIZERS_PARALLELISM="false", HF_HUB_DISABLE_TELEMETRY="1"
)

from pipeline.data.tokenizer import train_tokenizer

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

ROOT = Path(__file__).resolve().parent.parent
CARDS = ROOT / "data_cards"
STAGES = ("pretrain", "sft", "reward", "ppo")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    lines = (CARDS / "demo_corpus" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:200]
    return train_tokenizer([json.loads(line)["text"] for line in lines], 400)


@pytest.fixture(scope="session", params=["llama", "gpt2"])
def tiny_lm(request: pytest.FixtureRequest, tokenizer: Any) -> Any:
    """A random causal LM of either style, in evaluation mode."""
    return make_lm(request.param, tokenizer)


def make_lm(style: str, tokenizer: Any) -> Any:
    torch.manual_seed(0)
    ids = {
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    if style == "llama":
        config: Any = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            initializer_range=0.2,
            **ids,
        )
    else:
        config = GPT2Config(
            vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2, **ids
        )
    return AutoModelForCausalLM.from_config(config).eval()


# ---------------------------------------------------------------------------------------------- launches


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
    import time

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
    import io

    from pipeline.cli import main

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


@pytest.fixture(scope="session")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's recipes without a tracker and with less data."""
    folder = tmp_path_factory.mktemp("recipes")
    for stage in STAGES:
        text = (
            (ROOT / "recipes" / "demo" / f"{stage}.yaml")
            .read_text(encoding="utf-8")
            .replace("report_to: [wandb]\n", "")
        )
        for card, rows in (("demo_corpus", 300), ("demo_demonstrations", 500), ("demo_comparisons", 400)):
            text = text.replace(
                f"  - path: data_cards/{card}\n", f"  - path: data_cards/{card}\n    max_rows: {rows}\n"
            )
        (folder / f"{stage}.yaml").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory, recipes: Path) -> Path:
    """All four stages, each by `accelerate launch` in one process, run once for all tests that need a finished stage."""
    run = tmp_path_factory.mktemp("chain")
    for stage in STAGES:
        launch(stage, tiny_flags(stage, run, config=recipes / f"{stage}.yaml", report_to=None))
    return run

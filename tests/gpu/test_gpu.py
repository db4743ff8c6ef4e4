"""What only a GPU shows: every stage and arrangement in bf16, exact resume, memory against the plan, tokens per second."""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from helpers.launches import ROOT, STAGES, lineage, rlhf_here
from pipeline.models.loading import load_causal_lm
from pipeline.models.reward_model import load_scalar_model
from pipeline.training import history

import pytest
import torch
import yaml

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here: nothing of a GPU was tested"),
]
MODEL = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
LORA = {"lora": {"r": 16, "alpha": 32}}
STEPS = {
    "max_steps": 30,
    "eval_steps": 30,
    "save_steps": 30,
    "logging_steps": 10,
    "examples_per_step": 32,
    "examples_per_device": 32,
}
SIZES: dict[str, dict[str, Any]] = {
    "pretrain": STEPS,
    "sft": {**STEPS, "best_metric": "none"},
    "reward": {**STEPS, "examples_per_step": 16, "examples_per_device": 16},
    "ppo": {"total_rollouts": 6, "save_steps": 2, "eval_rollouts": 3, "eval_prompts": 32, "micro_batch_tokens": 8192},
}  # fmt: skip
PEAK = (0.6, 1.2)  # times what the plan says; more would mean that it cannot be relied on


def write_recipe(run: Path, stage: str, name: str, **changes: Any) -> Path:
    """The demo's recipe with a larger model in bf16, its parents and output in `run`."""
    values = yaml.safe_load((ROOT / "recipes" / "demo" / f"{stage}.yaml").read_text(encoding="utf-8"))
    del values["report_to"]
    values |= {"precision": "bf16", "quiet": True, "output_dir": str(run / name), **SIZES[stage]}
    if stage == "pretrain":
        values["model_config"] |= MODEL
    else:
        values["parent"] = str(run / ("pretrain" if stage == "sft" else "sft"))
    if stage == "ppo":
        values["reward"] = str(run / "reward")
    folder = run / "recipes" / name
    folder.mkdir(parents=True, exist_ok=True)
    for module in (ROOT / "recipes" / "demo").glob("*.py"):
        shutil.copy(module, folder)
    (folder / f"{stage}.yaml").write_text(yaml.safe_dump({**values, **changes}), encoding="utf-8")
    return folder / f"{stage}.yaml"


def command(stage: str, recipe: Path) -> list[str]:
    return [sys.executable, str(Path(__file__).with_name("measured_stage.py")), stage, "--config", str(recipe)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def run_stage(run: Path, stage: str, name: str, results: dict[str, Any], **changes: Any) -> Path:
    """Run a stage in a process of its own and note what it needed; returns its folder."""
    recipe = write_recipe(run, stage, name, **changes)
    done = subprocess.run(command(stage, recipe), env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    rows = history.read(run / name)
    key = "response_tokens_per_second" if stage == "ppo" else "tokens_per_second"
    results[name] = {
        "peak_gib": round(json.loads(done.stdout.splitlines()[-1])["peak_bytes"] / 2**30, 3),
        "tokens_per_second": round(statistics.median(row[key] for row in rows if key in row)),
    }
    return run / name


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory, results: dict[str, Any]) -> Path:
    """All four stages, PPO with networks of its own for policy, reference and value."""
    run = tmp_path_factory.mktemp("gpu")
    for stage in STAGES:
        run_stage(run, stage, stage, results)
    return run


def check_run(folder: Path) -> None:
    """It is complete, its numbers are finite, and plain fp32 weights were saved."""
    assert lineage(folder)["status"] == "complete"
    numbers = [value for row in history.read(folder) for value in row.values() if isinstance(value, float)]
    assert numbers
    assert torch.isfinite(torch.tensor(numbers, dtype=torch.float64)).all()
    scalar = lineage(folder)["stage"] == "reward"
    model: Any = load_scalar_model(str(folder)) if scalar else load_causal_lm(str(folder))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_runs_in_bf16(chain: Path, stage: str) -> None:
    check_run(chain / stage)


@pytest.mark.parametrize("stage", STAGES)
def test_peak_memory_is_what_the_plan_says(chain: Path, results: dict[str, Any], stage: str) -> None:
    whole = chain / "recipes" / "all"
    whole.mkdir(exist_ok=True)
    for name in STAGES:
        for file in (chain / "recipes" / name).iterdir():
            shutil.copy(file, whole)
    printed, _ = rlhf_here("plan", whole, "--gpu", "h100", "--json")  # any device that computes in bf16
    planned = json.loads(printed)["stages"][stage]["memory_total"] / 2**30
    results[stage]["planned_gib"] = round(planned, 3)
    low, high = PEAK
    assert low * planned <= results[stage]["peak_gib"] <= high * planned


@pytest.fixture(scope="module")
def adapters(chain: Path, results: dict[str, Any]) -> Path:
    """SFT and the reward model by LoRA, beside the chain's own."""
    run_stage(chain, "sft", "sft-lora", results, **LORA)
    run_stage(chain, "reward", "reward-lora", results, **LORA)
    return chain


@pytest.mark.parametrize("name", ["sft-lora", "reward-lora"])
def test_stages_run_in_bf16_with_lora(adapters: Path, name: str) -> None:
    check_run(adapters / name)
    assert (adapters / name / "adapter" / "adapter_model.safetensors").is_file()


ARRANGEMENTS: dict[str, dict[str, Any]] = {
    "ppo-shared_trunk": {"roles": "shared_trunk"},
    "ppo-adapters": {"roles": "adapters", **LORA},
    "ppo-adapters-4bit": {"roles": "adapters", "quantization": "4bit", **LORA},
}


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_every_arrangement_of_ppo_runs_in_bf16(adapters: Path, results: dict[str, Any], name: str) -> None:
    changes = ARRANGEMENTS[name]
    reward = "reward-lora" if changes["roles"] == "adapters" else "reward"
    folder = run_stage(adapters, "ppo", name, results, reward=str(adapters / reward), **changes)
    check_run(folder)
    rows = [row for row in history.read(folder) if "policy_grad_norm" in row]
    assert all(row["policy_grad_norm"] > 0 and row["value_grad_norm"] > 0 for row in rows)
    assert max(row["first_minibatch_log_ratio"] for row in rows) < 0.1, "sampled and trained by one policy"
    log = (folder / "log.txt").read_text(encoding="utf-8")
    assert "takes padded sequences only" not in log
    assert "without a cache" not in log


def test_a_killed_run_resumes_exactly(chain: Path, results: dict[str, Any]) -> None:
    recipe = write_recipe(chain, "ppo", "ppo-resumed")
    process = subprocess.Popen(command("ppo", recipe), env=environment(), cwd=ROOT, start_new_session=True)
    deadline = time.monotonic() + 300
    while not (chain / "ppo-resumed" / "checkpoint-2").is_dir():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline, "no checkpoint after 300 s"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    folder = run_stage(chain, "ppo", "ppo-resumed", results)
    assert lineage(folder)["resumed_from"]
    assert lineage(folder)["weights_sha256"] == lineage(chain / "ppo")["weights_sha256"]

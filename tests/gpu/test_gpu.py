"""What only a GPU shows: every stage and arrangement in bf16, exact resume, memory against the plan, tokens per second.

Each run is made once, by the test that needs it first; with several workers, runs that do not need each other go side by side.
Memory is then still each run's own, but speed is not.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helpers.launches import ROOT, STAGES, lineage, rlhf_here
from pipeline.models.loading import load_causal_lm
from pipeline.models.reward_model import load_scalar_model
from pipeline.training import history

import filelock
import pytest
import torch
import yaml

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here: nothing of a GPU was tested"),
]
PEAK = (0.6, 1.2)  # times what the plan says; more would mean that it cannot be relied on
FSDP2_CONFIG = ROOT / "recipes" / "accelerate" / "fsdp2.yaml"
LORA = {"lora": {"r": 16, "alpha": 32}}
SMALL = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
# The sizes of Llama 3.2 1B, with the demo's vocabulary: 0.98 billion parameters.
LARGE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 1024,
}
STEPS = {"max_steps": 30, "eval_steps": 30, "save_steps": 30, "logging_steps": 10}
FEW_STEPS = {"max_steps": 6, "eval_steps": 6, "save_steps": 1000, "logging_steps": 2}
PROMPTS = {"eval_datasets": [{"path": str(ROOT / "data_cards" / "demo_prompts"), "split": "test", "max_rows": 32}]}
PPO = {"total_rollouts": 4, "save_steps": 2, "eval_rollouts": 2, "micro_batch_tokens": 8192, **PROMPTS}


@dataclass(frozen=True)
class Run:
    """A stage of the demo with other keys. parent, reward: names of the runs before it. large: with a billion parameters."""

    stage: str
    keys: dict[str, Any] = field(default_factory=dict)
    parent: str | None = None
    reward: str | None = None
    sharded: bool = False
    large: bool = False


def ppo(keys: dict[str, Any] | None = None, reward: str = "reward", **options: Any) -> Run:
    return Run("ppo", {**PPO, **(keys or {})}, options.pop("parent", "sft"), reward, **options)


BATCH_32 = {**STEPS, "examples_per_step": 32, "examples_per_device": 32}
BATCH_16 = {**STEPS, "examples_per_step": 16, "examples_per_device": 16}
BLOCKS = {"block_tokens": 1024, "examples_per_step": 16, "examples_per_device": 8}
NO_BEST = {"best_metric": "none"}
RUNS = {
    "pretrain": Run("pretrain", BATCH_32),
    "sft": Run("sft", BATCH_32 | NO_BEST, "pretrain"),
    "reward": Run("reward", BATCH_16, "sft"),
    "ppo": ppo(),
    "ppo-resumed": ppo(),
    "sft-lora": Run("sft", BATCH_32 | NO_BEST | LORA, "pretrain"),
    "reward-lora": Run("reward", BATCH_16 | LORA, "sft"),
    "ppo-shared_trunk": ppo({"roles": "shared_trunk"}),
    "ppo-adapters": ppo({"roles": "adapters", **LORA}, "reward-lora"),
    "ppo-adapters-4bit": ppo({"roles": "adapters", "quantization": "4bit", **LORA}, "reward-lora"),
    "ppo-offload": ppo({"offload": "all"}),
    "ppo-checkpointing": ppo({"gradient_checkpointing": True}),
    "pretrain-fsdp2": Run("pretrain", BATCH_32, sharded=True),
    "sft-fsdp2": Run("sft", BATCH_32 | NO_BEST, "pretrain", sharded=True),
    "sft-lora-fsdp2": Run("sft", BATCH_32 | NO_BEST | LORA, "pretrain", sharded=True),
    "reward-fsdp2": Run("reward", BATCH_16, "sft", sharded=True),
    "ppo-fsdp2": ppo(sharded=True),
    "pretrain-1b": Run("pretrain", FEW_STEPS | BLOCKS, large=True),
    "sft-1b": Run("sft", FEW_STEPS | NO_BEST, "pretrain-1b", large=True),
    "reward-1b": Run("reward", FEW_STEPS, "sft-1b", large=True),
    "ppo-1b": ppo({"save_steps": 1000, "eval_rollouts": None}, "reward-1b", parent="sft-1b", large=True),
}  # fmt: skip


def write_recipe(folder: Path, name: str) -> Path:
    """The demo's recipe with a larger model in bf16, its parents and output in `folder`."""
    run = RUNS[name]
    values = yaml.safe_load((ROOT / "recipes" / "demo" / f"{run.stage}.yaml").read_text(encoding="utf-8"))
    del values["report_to"]
    values |= {"precision": "bf16", "quiet": True, "output_dir": str(folder / name), **run.keys}
    if run.stage == "pretrain":
        values["model_config"] |= LARGE if run.large else SMALL
    values |= {key: str(folder / one) for key, one in (("parent", run.parent), ("reward", run.reward)) if one}
    recipes = folder / "recipes" / name
    recipes.mkdir(parents=True, exist_ok=True)
    for module in (ROOT / "recipes" / "demo").glob("*.py"):
        shutil.copy(module, recipes)
    (recipes / f"{run.stage}.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return recipes / f"{run.stage}.yaml"


def command(folder: Path, name: str) -> list[str]:
    """One process on one GPU; a sharded one under FSDP2, whose only part is then the whole model."""
    launcher: list[str] = []
    if RUNS[name].sharded:
        launcher = ["-m", "accelerate.commands.launch", "--config_file", str(FSDP2_CONFIG), "--num_processes", "1"]
        launcher += ["--main_process_port", "0"]
    measured = str(Path(__file__).with_name("measured_stage.py"))
    return [sys.executable, *launcher, measured, RUNS[name].stage, "--config", str(write_recipe(folder, name))]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def note(folder: Path, name: str, **values: float) -> dict[str, float]:
    """Add to what is known of a run; returns all of it."""
    path = folder / f"{name}.json"
    with filelock.FileLock(folder / f"{name}.note"):
        known: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}
        known |= {key: round(value, 3) for key, value in values.items()}
        path.write_text(json.dumps(known))
    return known


def finished(folder: Path, name: str) -> Path:
    """The folder of a run, which is made first, after the runs that it needs, unless another test did."""
    for before in (RUNS[name].parent, RUNS[name].reward):
        if before:
            finished(folder, before)
    with filelock.FileLock(folder / f"{name}.lock"):
        if not (folder / f"{name}.json").is_file():
            start = time.monotonic()
            done = subprocess.run(command(folder, name), env=environment(), cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, f"{name}\n{done.stdout}\n{done.stderr}"
            key = "response_tokens_per_second" if RUNS[name].stage == "ppo" else "tokens_per_second"
            note(
                folder,
                name,
                peak_gib=json.loads(done.stdout.splitlines()[-1])["peak_bytes"] / 2**30,
                tokens_per_second=max(
                    row[key] for row in history.read(folder / name) if key in row
                ),  # after warming up
                seconds=time.monotonic() - start,
            )
    return folder / name


def check_run(folder: Path) -> None:
    """It is complete, its numbers are finite, and plain fp32 weights were saved."""
    assert lineage(folder)["status"] == "complete"
    numbers = [value for row in history.read(folder) for value in row.values() if isinstance(value, float)]
    assert numbers
    assert torch.isfinite(torch.tensor(numbers, dtype=torch.float64)).all()
    scalar = lineage(folder)["stage"] == "reward"
    model: Any = load_scalar_model(str(folder)) if scalar else load_causal_lm(str(folder))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def check_peaks(folder: Path, suffix: str, *flags: str) -> None:
    """The peak memory of the four stages whose names end in `suffix`, against `rlhf plan` for their recipes."""
    whole = folder / "recipes" / f"all{suffix}"
    whole.mkdir(parents=True, exist_ok=True)
    for stage in STAGES:
        finished(folder, f"{stage}{suffix}")
        for file in (folder / "recipes" / f"{stage}{suffix}").iterdir():
            shutil.copy(file, whole)
    printed, _ = rlhf_here("plan", whole, "--gpu", "h100", "--json", *flags)  # any device that computes in bf16
    ratios = {}
    for stage in STAGES:
        planned = json.loads(printed)["stages"][stage]["memory_total"] / 2**30
        ratios[stage] = note(folder, f"{stage}{suffix}", planned_gib=planned)["peak_gib"] / planned
    assert all(PEAK[0] <= ratio <= PEAK[1] for ratio in ratios.values()), ratios


def test_peak_memory_of_a_billion_parameters_is_what_the_plan_says(folder: Path) -> None:
    """PPO holds four such models, and two optimizers."""
    check_peaks(folder, "-1b")


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_runs_in_bf16(folder: Path, stage: str) -> None:
    check_run(finished(folder, stage))


def test_a_killed_run_resumes_exactly(folder: Path) -> None:
    whole = finished(folder, "ppo")
    process = subprocess.Popen(command(folder, "ppo-resumed"), env=environment(), cwd=ROOT, start_new_session=True)
    deadline = time.monotonic() + 300
    while not (folder / "ppo-resumed" / "checkpoint-2").is_dir():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline, "no checkpoint after 300 s"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    resumed = finished(folder, "ppo-resumed")
    assert lineage(resumed)["resumed_from"]
    assert lineage(resumed)["weights_sha256"] == lineage(whole)["weights_sha256"]


@pytest.mark.parametrize("name", ["sft-lora", "reward-lora"])
def test_stages_run_in_bf16_with_lora(folder: Path, name: str) -> None:
    check_run(finished(folder, name))
    assert (folder / name / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("name", ["ppo-shared_trunk", "ppo-adapters", "ppo-adapters-4bit"])
def test_every_arrangement_of_ppo_runs_in_bf16(folder: Path, name: str) -> None:
    check_run(finished(folder, name))
    rows = [row for row in history.read(folder / name) if "policy_grad_norm" in row]
    assert all(row["policy_grad_norm"] > 0 and row["value_grad_norm"] > 0 for row in rows)
    assert max(row["first_minibatch_log_ratio"] for row in rows) < 0.1, "sampled and trained by one policy"
    log = (folder / name / "log.txt").read_text(encoding="utf-8")
    assert "takes padded sequences only" not in log
    assert "without a cache" not in log


@pytest.mark.parametrize("name", ["ppo-offload", "ppo-checkpointing"])
def test_memory_savers_change_no_weight_of_ppo(folder: Path, name: str) -> None:
    """They run the same kernels on the same numbers, so the weights are equal to the bit, and the peak is lower."""
    plain, saving = finished(folder, "ppo"), finished(folder, name)
    assert lineage(saving)["weights_sha256"] == lineage(plain)["weights_sha256"]
    assert note(folder, name)["peak_gib"] < note(folder, "ppo")["peak_gib"]


@pytest.mark.parametrize("name", ["pretrain", "sft", "sft-lora", "reward", "ppo"])
def test_stages_under_fsdp2_learn_as_without_it(folder: Path, name: str) -> None:
    """FSDP2 computes in bf16 where autocast keeps some operations in fp32, so losses agree to about three digits."""
    plain, sharded = finished(folder, name), finished(folder, f"{name}-fsdp2")
    check_run(sharded)
    assert (lineage(sharded)["processes"], lineage(sharded)["sharding"]) == (1, "fsdp2")
    key = "value_loss" if name == "ppo" else "loss"
    first, same = (next(row[key] for row in history.read(run) if key in row) for run in (plain, sharded))
    assert same == pytest.approx(first, rel=0.2 if name == "ppo" else 0.02)  # PPO's responses are other ones


@pytest.mark.parametrize("suffix", ["", "-fsdp2"])
def test_peak_memory_is_what_the_plan_says(folder: Path, suffix: str) -> None:
    check_peaks(folder, suffix, *(("--accelerate", str(FSDP2_CONFIG), "--gpus", "1") if suffix else ()))

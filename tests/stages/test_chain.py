"""The four stages as their users start them: `accelerate launch`, one process and two."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

from helpers.launches import CARDS, STAGES, launch, launch_for_real, lineage, parents, tiny_flags
from pipeline.config.stages import STAGES as ARGUMENTS
from pipeline.training.stage import launch as launch_here

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

KEYS = {
    "stage", "status", "recipe", "config", "parents", "datasets", "tokenizer_sha256", "chat_template_sha256", "code", "packages", "hardware",
    "seconds", "flops", "metrics", "started", "finished", "processes", "sharding", "resumed_from", "weights_sha256", "fingerprint",
    "config_sha256", "adapter_sha256", "stop_tokens", "inputs",
}  # fmt: skip


def in_two_processes(stage: str, run: Path, chain: Path, recipes: Path) -> Path:
    """A stage again in two processes, from the one-process parents."""
    changes: dict[str, Any] = {"examples_per_device": 4} if stage in ("pretrain", "sft") else {}
    start = launch_for_real if stage == "ppo" else launch
    start(
        stage,
        # A tracker ends the process group when it ends: PPO must be through with it by then.
        tiny_flags(
            stage,
            run,
            config=recipes / f"{stage}.yaml",
            report_to="wandb" if stage == "ppo" else None,
            **parents(stage, chain),
            **changes,
        ),
        processes=2,
    )
    return run / stage


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_leaves_what_the_design_says(chain: Path, stage: str) -> None:
    folder = chain / stage
    record = lineage(folder)
    assert set(record) == KEYS
    assert (record["stage"], record["status"], record["processes"], record["resumed_from"]) == (
        stage,
        "complete",
        1,
        [],
    )
    assert record["seconds"] > 0
    assert record["flops"] > 0
    assert json.loads((folder / "metrics.json").read_text()) == record["metrics"]
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "history.jsonl", "log.txt"} <= names
    assert not [name for name in names if name.startswith("checkpoint-") or name.endswith((".bin", ".tmp"))]
    for dataset in record["datasets"]:
        assert dataset["rows"] > 0
        assert len(dataset["sha256"]) == 64
    if stage != "pretrain":
        assert (
            record["parents"][0]["weights_sha256"]
            == lineage(chain / ("pretrain" if stage == "sft" else "sft"))["weights_sha256"]
        )


def test_plain_transformers_loads_every_folder(chain: Path) -> None:
    for folder, auto in (
        ("pretrain", AutoModelForCausalLM),
        ("sft", AutoModelForCausalLM),
        ("ppo", AutoModelForCausalLM),
        ("reward", AutoModelForSequenceClassification),
        ("ppo/value", AutoModelForSequenceClassification),
    ):
        model, loading = auto.from_pretrained(chain / folder, output_loading_info=True)
        assert not loading["missing_keys"], folder
        assert not loading["unexpected_keys"], folder
        tokenizer = AutoTokenizer.from_pretrained(chain / folder)
        assert tokenizer.chat_template
        assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id


def test_training_moved_every_stage(chain: Path) -> None:
    for stage in ("pretrain", "sft", "reward"):
        losses = [row["eval_loss"] for row in _history(chain / stage) if "eval_loss" in row]
        assert losses[-1] < losses[0], (stage, losses)
    pretrained, tuned = (AutoModelForCausalLM.from_pretrained(chain / s).state_dict() for s in ("pretrain", "sft"))
    assert any(not torch.equal(pretrained[name], tuned[name]) for name in pretrained)


def test_pretraining_reports_epochs_and_throughput(chain: Path) -> None:
    record = lineage(chain / "pretrain")
    assert record["datasets"][0]["epochs_seen"] > 0
    steps = [row for row in _history(chain / "pretrain") if "loss" in row]
    assert all(row["tokens_per_second"] > 0 and row["model_flops_per_second"] > 0 for row in steps)
    assert record["metrics"]["bits_per_byte"] < 8


def test_demonstrations_score_zero_on_average(chain: Path) -> None:
    """The offset in the config centres the scores that users get (design: demonstrations average 0)."""
    from pipeline.data.splits import split_records
    from pipeline.rollout.rewards import score

    rows = [json.loads(line) for line in (CARDS / "demo_demonstrations" / "train.jsonl").read_text().splitlines()[:500]]
    kept, _ = split_records(
        [{"prompt": [{"role": "user", "content": r["prompt"]}], **{"response": r["response"]}} for r in rows], 0.0
    )
    found = score([r["prompt"] for r in kept], [r["response"] for r in kept], str(chain / "reward"))
    assert sum(found) / len(found) == pytest.approx(0, abs=1e-3)
    assert lineage(chain / "reward")["metrics"]["score_offset"] != 0


def test_reward_reports_what_the_report_needs(chain: Path) -> None:
    metrics = lineage(chain / "reward")["metrics"]
    low, high = metrics["accuracy_ci95"]
    assert 0 <= low <= metrics["accuracy"] <= high <= 1
    assert set(metrics["accuracy_by_labeler"]) == {"ana", "ben", "chloe", "dev", "erik"}
    assert 0 < metrics["held_out_labeler_accuracy"] <= 1
    assert metrics["accuracy"] < metrics["noise_ceiling"] < 1


def test_ppo_takes_exactly_the_steps_it_promises(chain: Path) -> None:
    metrics = lineage(chain / "ppo")["metrics"]
    assert metrics["policy_steps"] == metrics["value_steps"] == 6 * 2 * 2  # rollouts × epochs × minibatches
    assert metrics["episodes"] == 6 * 16


def test_ppo_starts_on_policy(chain: Path) -> None:
    """In the first minibatch the policy is the one that sampled: log ratio 0, nothing clipped."""
    for row in _history(chain / "ppo"):
        if "first_minibatch_log_ratio" in row:
            assert row["first_minibatch_log_ratio"] < 1e-5
    first = next(row for row in _history(chain / "ppo") if row["step"] == 0)
    assert first["eval_kl"] == pytest.approx(0, abs=1e-5)
    assert first["eval_score"] == pytest.approx(first["eval_reference_score"])


@pytest.mark.parametrize(
    "stage", [pytest.param(stage, marks=() if stage in ("sft", "ppo") else pytest.mark.full) for stage in STAGES]
)
def test_two_processes(chain: Path, recipes: Path, tmp_path: Path, stage: str) -> None:
    one, two = lineage(chain / stage), lineage(in_two_processes(stage, tmp_path, chain, recipes))
    assert two["processes"] == 2
    assert two["parents"] == ([] if stage == "pretrain" else two["parents"])
    name = {"pretrain": "loss", "sft": "loss", "reward": "accuracy", "ppo": "reference_score"}[stage]
    assert two["metrics"][name] == pytest.approx(one["metrics"][name], rel=0.02), (
        "same global batch, same data, same result"
    )


@pytest.mark.parametrize("stage", STAGES)
def test_a_finished_stage_is_not_run_again(
    chain: Path, recipes: Path, stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module(f"pipeline.{stage}")
    before = (chain / stage / "model.safetensors").stat().st_mtime_ns
    flags = tiny_flags(stage, chain, config=recipes / f"{stage}.yaml", report_to=None)
    launch_here(stage, ARGUMENTS[stage], module.main, flags)
    assert "already complete" in capsys.readouterr().out
    assert (chain / stage / "model.safetensors").stat().st_mtime_ns == before


def _history(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


@pytest.mark.full
def test_sft_without_packing_learns_what_packed_rows_teach(chain: Path, recipes: Path, tmp_path: Path) -> None:
    """One example per row: the same demonstrations in more rows, and no warning of a model that cannot pack."""
    launch(
        "sft",
        tiny_flags(
            "sft", tmp_path, config=recipes / "sft.yaml", report_to=None, parent=chain / "pretrain", packing=False
        ),
    )
    alone, packed = (json.loads((run / "sft" / "lineage.json").read_text()) for run in (tmp_path, chain))
    assert alone["metrics"]["demonstrations"] == packed["metrics"]["demonstrations"]
    log, packed_log = ((run / "sft" / "log.txt").read_text() for run in (tmp_path, chain))
    rows, packed_rows = (int(re.search(r"in (\d+) rows", text)[1]) for text in (log, packed_log))
    assert rows == alone["metrics"]["demonstrations"] > packed_rows
    assert alone["metrics"]["perplexity"] < 1000

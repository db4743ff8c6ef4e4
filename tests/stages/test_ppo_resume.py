"""Ten rollouts against five, SIGKILL, five: bit-equal in every tensor, counter and sample."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helpers.launches import kill_when, launch, lineage
from helpers.worlds import make_policy, write_recipe
from pipeline.training import history
from pipeline.training.identity import weights_sha256

import pytest

# Everything that a run carries from rollout to rollout.
SETTINGS: dict[str, Any] = {
    "total_rollouts": 10, "save_steps": 5, "prompts_per_rollout": 512, "ppo_epochs": 4, "minibatches": 4, "max_response_tokens": 4,
    "kl_control": "adaptive", "kl_coef": 0.1, "kl_target": 0.3, "kl_horizon": 3000.0, "scale_scores": "running", "score_clip": 3.0,
    "ema_decay": 0.9, "eval_rollouts": 2, "best_metric": "score", "value_warmup_rollouts": 1, "micro_batch_tokens": 2000,
    "lr_schedule": "cosine", "warmup_rollouts": 2,
}  # fmt: skip
NOT_COMPARED = ("seconds", "episodes_per_second", "response_tokens_per_second")
LONG = pytest.mark.full


def compared_metrics(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith(NOT_COMPARED)} for row in history.read(folder)]


@pytest.mark.parametrize(
    ("roles", "processes"),
    [
        ("separate", 1),
        pytest.param("separate", 2, marks=LONG),
        pytest.param("shared_trunk", 1, marks=LONG),
        pytest.param("shared_trunk", 2, marks=LONG),
        pytest.param("adapters", 1, marks=LONG),
        pytest.param("adapters", 2, marks=LONG),
    ],
)
def test_killed_and_resumed_equals_not_killed(tmp_path: Path, roles: str, processes: int) -> None:
    policy = make_policy(tmp_path / "sft", "abcdefgh")
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": "abcdefgh" * (1 + i % 5)}) + "\n" for i in range(40)))
    changes = {**SETTINGS, "roles": roles, "ptx_coef": 0.5, "ptx_datasets": [{"path": str(corpus)}], "ptx_ratio": 0.25}
    changes |= {"ptx_block_tokens": 16} | ({"lora": {"r": 4, "alpha": 8}} if roles == "adapters" else {})
    runs = [tmp_path / "whole", tmp_path / "killed"]
    for run in runs:
        write_recipe(run, policy, "return float(response.count('b'))", **changes)
    commands = [["--config", str(run / "ppo.yaml")] for run in runs]
    launch("ppo", commands[0], processes)
    ready = runs[1] / "out" / "checkpoint-5" / "manifest.json"
    kill_when("ppo", commands[1], ready.is_file, processes=processes)
    assert not (runs[1] / "out" / "lineage.json").exists()
    launch("ppo", commands[1], processes)
    one, two = (lineage(run / "out") for run in runs)
    assert (two["resumed_from"], two["processes"]) == ([5], processes)
    assert two["weights_sha256"] == one["weights_sha256"]
    assert two["metrics"] == one["metrics"]
    assert two["flops"] == one["flops"]
    for part in ("value", "ema"):
        assert weights_sha256(runs[0] / "out" / part) == weights_sha256(runs[1] / "out" / part), part
    expected = compared_metrics(runs[0] / "out")
    assert compared_metrics(runs[1] / "out") == expected
    assert len({row["kl_coef"] for row in expected if "kl_coef" in row}) > 5, "the coefficient moved"
    samples = [sorted((run / "out" / "samples").iterdir()) for run in runs]
    assert [p.name for p in samples[0]] == [f"rollout-{i:06d}.json" for i in (0, 2, 4, 6, 8, 10)]
    assert [p.read_bytes() for p in samples[0]] == [p.read_bytes() for p in samples[1]]


@pytest.mark.full
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """Whitening, KL, its coefficient, scales and steps are global: metrics agree to rounding, samples exactly at first."""
    policy = make_policy(tmp_path / "sft", "abcdefgh")
    runs = {}
    for processes in (1, 2):
        run = tmp_path / str(processes)
        write_recipe(
            run,
            policy,
            "return float(response.count('b'))",
            **{**SETTINGS, "total_rollouts": 3, "micro_batch_tokens": 700},
        )
        launch("ppo", ["--config", str(run / "ppo.yaml")], processes)
        runs[processes] = compared_metrics(run / "out")
        assert lineage(run / "out")["processes"] == processes
    for one, two in zip(runs[1], runs[2], strict=True):
        for name, value in one.items():
            if name != "first_minibatch_log_ratio" and not name.endswith(("_loss", "clip_fraction")):
                assert two[name] == pytest.approx(value, rel=5e-3, abs=2e-4), name
    first = [next(row for row in runs[n] if "kl_coef" in row) for n in (1, 2)]
    for name in ("score", "response_tokens", "stopped", "advantage_std", "value_loss", "value_grad_norm"):
        assert first[1][name] == pytest.approx(first[0][name], rel=1e-4, abs=1e-6), name

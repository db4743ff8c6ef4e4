"""PPO whose networks are sharded over processes (FSDP2 over gloo): what one process computes, in parts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from helpers.launches import FSDP2, REPLICATED, ROOT, kill_when, launch, lineage
from helpers.worlds import make_policy, make_reward, train_reward, write_recipe
from pipeline.config.ppo import PPOArguments
from pipeline.config.reader import load
from pipeline.models.precision import PRETEND
from pipeline.planning.devices import Device
from pipeline.planning.memory import Setting, ppo_memory
from pipeline.planning.parameters import parameters
from pipeline.planning.workload import Data, Model, PPOModels

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

SCRIPT = str(ROOT / "tests" / "helpers" / "ppo_first_update.py")
LONG = pytest.mark.full
COUNT_B = "return float(response.count('b'))"
# Five responses per step in micro-batches of one, so that the first process has more of them than the others.
SETTINGS: dict[str, Any] = {
    "total_rollouts": 3, "prompts_per_rollout": 20, "minibatches": 4, "ppo_epochs": 1, "max_response_tokens": 6,
    "micro_batch_tokens": 5, "generation_rows": 4, "learning_rate": 1e-3, "value_learning_rate": 2e-3, "max_grad_norm": 0.5,
}  # fmt: skip
ARRANGEMENTS: dict[str, dict[str, Any]] = {
    "separate": {},
    "shared_trunk": {},
    "adapters": {"lora": {"r": 4, "alpha": 8}},
}
LAUNCHES: dict[str, tuple[int, dict[str, str]]] = {
    "one": (1, {}),
    "ddp": (2, {}),
    "fsdp2": (2, FSDP2),
    "replicated": (4, REPLICATED),
}


def world(folder: Path) -> Path:
    return make_policy(folder / "sft", "abcdefgh", layers=3)


def run(
    folder: Path, policy: Path, kind: str, more: Mapping[str, str] | None = None, **changes: Any
) -> list[dict[str, Any]]:
    """What each process of a launch stored of the first update; the run goes on to its end."""
    processes, variables = LAUNCHES[kind]
    recipe = write_recipe(folder / kind, policy, COUNT_B, **{**SETTINGS, **changes})
    launch(
        SCRIPT,
        [str(folder / f"{kind}-stored"), "--", "--config", str(recipe)],
        processes,
        more={**variables, **(more or {})},
    )
    stored = [torch.load(folder / f"{kind}-stored-{rank}.pt", weights_only=True) for rank in range(processes)]
    assert all(part["processes"] == processes for part in stored)
    assert all(part["sharded"] == (kind in ("fsdp2", "replicated")) for part in stored)
    return stored


def flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def assert_same_update(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Samples to the token, metrics and each network's gradient to 1e-5."""
    assert other["samples"] == one["samples"]
    for part in ("metrics", "step"):
        assert other[part] == pytest.approx(one[part], rel=1e-5, abs=1e-5), part
    for name, gradients in one["gradients"].items():
        expected, found = flat(gradients), flat(other["gradients"][name])
        assert expected.norm() > 0
        relative = (found - expected).norm() / expected.norm()
        assert relative < 1e-5, f"{name}: relative difference {relative:.2e}"


def assert_planned(folder: Path, measured: dict[str, int]) -> None:
    """`rlhf plan` counts what a process of two held: parts of everything, and the whole policy while it sampled."""
    config = AutoConfig.from_pretrained(folder / "sft")
    policy, value = Model(config, parameters(config)), Model(config, parameters(config, scalar=True))
    recipe = load(PPOArguments, ["--config", str(folder / "fsdp2" / "ppo.yaml"), "--generation_rows", "512"])
    device = Device("cpu", 8, 0.1, 50, 0.1, bf16=False)
    two = Setting(device, 2, "fsdp2", 0.4, 0.05)
    planned = ppo_memory(recipe, PPOModels(policy, value, value), Data(16, 3.0), two).parts
    assert planned["policy"] + planned["reference"] + planned["value"] == pytest.approx(measured["weights"], rel=0.02)
    assert planned["gradients"] == pytest.approx(measured["gradients"], rel=0.02)
    assert planned["optimizer"] == pytest.approx(measured["optimizer"], rel=0.02)
    assert two.gathered_bytes * policy.size.total == measured["whole_policy"]


def largest_difference(one: Path, other: Path, part: str = "") -> float:
    """Of the weights that two runs saved."""
    expected, found = (load_file(folder / "out" / part / "model.safetensors") for folder in (one, other))
    assert expected.keys() == found.keys()
    return max((expected[name] - found[name]).abs().max().item() for name in expected)


@pytest.mark.parametrize(
    "roles", ["separate", pytest.param("shared_trunk", marks=LONG), pytest.param("adapters", marks=LONG)]
)
def test_two_shards_update_as_one_process(tmp_path: Path, roles: str) -> None:
    """Samples, metrics, gradients, final weights; half of everything in each process; unequally many micro-batches."""
    policy = world(tmp_path)
    changes = {**ARRANGEMENTS[roles], "roles": roles, "reward": str(make_reward(tmp_path / "reward", policy))}
    (one,), parts = (run(tmp_path, policy, kind, **changes) for kind in ("one", "fsdp2"))
    assert parts[0]["micro_batches"] != parts[1]["micro_batches"], "one process fills up with passes that count nothing"
    for part in parts:
        assert_same_update(one, part)
        for name, size in one["bytes"].items():
            if name == "whole_policy":
                assert part["bytes"][name] == size
                continue
            assert part["bytes"][name] == pytest.approx(size / 2, rel=0.02), f"{name} of a process"
    if roles == "separate":
        assert_planned(tmp_path, parts[0]["bytes"])
    for folder in ("", "value"):
        assert largest_difference(tmp_path / "one", tmp_path / "fsdp2", folder) < 1e-5
    record = lineage(tmp_path / "fsdp2" / "out")
    assert (record["processes"], record["sharding"]) == (2, "fsdp2")
    for name in ("policy_steps", "value_steps", "kl", "score"):
        expected = lineage(tmp_path / "one" / "out")["metrics"][name]
        assert record["metrics"][name] == pytest.approx(expected, rel=1e-4, abs=1e-5), name


@pytest.mark.full
@pytest.mark.parametrize("roles", ARRANGEMENTS)
@pytest.mark.parametrize("kind", ["ddp", "replicated"])
def test_copies_and_replicated_shards_update_as_one_process(tmp_path: Path, roles: str, kind: str) -> None:
    policy = world(tmp_path)
    changes = {**ARRANGEMENTS[roles], "roles": roles, "reward": str(make_reward(tmp_path / "reward", policy))}
    (one,), parts = (run(tmp_path, policy, name, **changes) for name in ("one", kind))
    for part in parts:
        assert_same_update(one, part)
        shards = 2 if kind == "replicated" else 1
        assert part["bytes"]["weights"] == pytest.approx(one["bytes"]["weights"] / shards, rel=0.02)
    assert largest_difference(tmp_path / "one", tmp_path / kind) < 1e-5


@pytest.mark.full
def test_text_average_and_best_networks_of_two_shards_that_save_memory_are_those_of_one_process(tmp_path: Path) -> None:
    policy = world(tmp_path)
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": "abcdefgh" * (1 + i % 5)}) + "\n" for i in range(40)))
    changes: dict[str, Any] = {
        "ptx_coef": 0.5, "ptx_datasets": [{"path": str(corpus)}], "ptx_ratio": 0.25, "ptx_block_tokens": 16, "ema_decay": 0.5,
        "eval_rollouts": 1, "best_metric": "score", "learning_rate": 3e-3, "roles": "shared_trunk", "save_steps": 1,
    }  # fmt: skip
    (one,) = run(tmp_path, policy, "one", **changes)
    parts = run(tmp_path, policy, "fsdp2", **changes, offload="all", gradient_checkpointing=True)
    for part in parts:
        assert_same_update(one, part)
    for folder in ("", "value", "ema"):
        assert largest_difference(tmp_path / "one", tmp_path / "fsdp2", folder) < 1e-5
    records = [lineage(tmp_path / kind / "out")["metrics"] for kind in ("one", "fsdp2")]
    assert records[0]["best_rollout"] == records[1]["best_rollout"]
    assert largest_difference(tmp_path / "one", tmp_path / "fsdp2", "ema") < largest_difference_of_average(tmp_path)


def largest_difference_of_average(folder: Path) -> float:
    """Between the policy and its average, which shows that they are not one."""
    policy, average = (load_file(folder / "one" / "out" / part / "model.safetensors") for part in ("", "ema"))
    return max((policy[name] - average[name]).abs().max().item() for name in policy)


@pytest.mark.full
def test_a_reward_adapter_of_the_sharded_base_scores_as_in_one_process(tmp_path: Path) -> None:
    """Policy, value and reward are adapters of one base in parts: no one has a model of its own to gather."""
    policy = world(tmp_path)
    scorer = train_reward(tmp_path / "reward", policy, lora=True)
    changes = {**ARRANGEMENTS["adapters"], "roles": "adapters", "reward": str(scorer), "total_rollouts": 1}
    (one,), parts = (run(tmp_path, policy, kind, **changes) for kind in ("one", "fsdp2"))
    for part in parts:
        assert_same_update(one, part)


@pytest.mark.full
def test_a_gpus_decisions_in_two_shards(tmp_path: Path) -> None:
    """bf16 parts are gathered, fp32 parts are trained; gradients are as close to fp32's as those of autocast are."""
    policy = world(tmp_path)
    changes: dict[str, Any] = {
        "total_rollouts": 1, "reward": str(make_reward(tmp_path / "reward", policy)), "prompts_per_rollout": 8,
        "minibatches": 2, "max_response_tokens": 3,
    }  # fmt: skip
    (exact,) = run(tmp_path, policy, "one", **changes)
    pretended = tmp_path / "pretended"
    (autocast,), parts = (
        run(pretended, policy, kind, more={PRETEND: "cuda"}, precision="auto", **changes) for kind in ("one", "fsdp2")
    )
    for part in parts:
        assert part["samples"] == exact["samples"]
        for name, gradients in exact["gradients"].items():
            expected, rounded, found = (
                flat(x) for x in (gradients, autocast["gradients"][name], part["gradients"][name])
            )
            assert found.dtype == torch.float32
            assert (found - expected).norm() < 2 * (rounded - expected).norm() < 0.2 * expected.norm(), name
        assert part["bytes"]["trained"] == pytest.approx(autocast["bytes"]["trained"] / 2, rel=0.02)
        assert part["bytes"]["whole_policy"] == autocast["bytes"]["whole_policy"] / 2, "gathered in bf16"
    saved = load_file(pretended / "fsdp2" / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


# ---------------------------------------------------------------------------------------------- kills


def half_saved(folder: Path) -> bool:
    """Whether a checkpoint from the third on is being written in parts."""
    steps = [
        int(path.parent.name.removeprefix("checkpoint-").removesuffix(".tmp"))
        for path in folder.glob("checkpoint-*.tmp/tensors")
    ]
    return any(step >= 3 for step in steps)


@pytest.mark.full
@pytest.mark.parametrize("ranks", [[1], [0, 1]], ids=["one process", "all processes"])
def test_killed_in_a_sharded_save_and_resumed(tmp_path: Path, ranks: list[int]) -> None:
    """On two processes to the bit; on one and on four to rounding, with a word."""
    policy = world(tmp_path)
    changes: dict[str, Any] = {
        **SETTINGS, "total_rollouts": 14, "save_steps": 1, "ema_decay": 0.9, "eval_rollouts": 7, "best_metric": "score"
    }  # fmt: skip
    commands = {}
    for name in ("whole", "killed", "one", "four"):
        commands[name] = ["--config", str(write_recipe(tmp_path / name, policy, COUNT_B, **changes))]
    launch("ppo", commands["whole"], 2, more=FSDP2)
    killed = tmp_path / "killed" / "out"
    kill_when("ppo", commands["killed"], lambda: half_saved(killed), processes=2, more=FSDP2, ranks=ranks)
    assert not (killed / "lineage.json").exists()
    for name in ("one", "four"):
        shutil.copytree(killed, tmp_path / name / "out", symlinks=True)
    launch("ppo", commands["killed"], 2, more=FSDP2)
    assert lineage(killed)["resumed_from"]
    assert lineage(killed)["weights_sha256"] == lineage(tmp_path / "whole" / "out")["weights_sha256"]
    assert lineage(killed)["metrics"] == lineage(tmp_path / "whole" / "out")["metrics"]
    for name, processes, more in (("one", 1, {}), ("four", 4, FSDP2)):
        launch("ppo", commands[name], processes, more=more)
        assert "was saved by 2 process(es), now there are" in (tmp_path / name / "out" / "log.txt").read_text()
        for part in ("", "value", "ema"):
            assert largest_difference(tmp_path / "whole", tmp_path / name, part) < 1e-4, (name, part)

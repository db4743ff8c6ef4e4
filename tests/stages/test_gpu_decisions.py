"""What a stage decides on a GPU, decided on a CPU: bf16, frozen weights in bf16, sampling in bf16. All must start and end."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from helpers.ppo_training import one_rollout, train_all, with_training
from helpers.worlds import make_policy, make_reward, write_recipe
from pipeline import ppo, pretrain, reward, sft
from pipeline.config.stages import STAGES
from pipeline.models.loading import load_causal_lm
from pipeline.models.packed import is_packed
from pipeline.models.precision import PRETEND
from pipeline.models.reward_model import scalar_head
from pipeline.rollout.engine import CachedDecoder, decoder_of
from pipeline.training.stage import Run, launch

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState

OFFSET = 1000.0  # bf16 has steps of 4 there
SHORT: dict[str, Any] = {
    "precision": "auto",
    "total_rollouts": 2,
    "prompts_per_rollout": 8,
    "minibatches": 2,
    "ppo_epochs": 1,
    "max_response_tokens": 3,
}
ARRANGEMENTS: dict[str, dict[str, Any]] = {
    "separate": {},
    "shared_trunk": {},
    "adapters": {"lora": {"r": 4, "alpha": 8}},
}


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(PRETEND, "cuda")
    yield
    forget_launch()


def forget_launch() -> None:
    """accelerate holds one precision per process; each stage is a process of its own, except here."""
    AcceleratorState._reset_state(reset_partial_state=True)


def reward_model_of(training: ppo.Training) -> Any:
    """The reward model that the scorer holds."""
    (part,) = training.collector.scorer.parts
    return inspect.getclosurevars(part.compute).nonlocals["model"]


def linear_dtypes(model: Any) -> set[torch.dtype]:
    return {p.dtype for name, p in model.named_parameters() if "_proj" in name}


def in_bf16_steps(values: torch.Tensor) -> bool:
    return bool((values.bfloat16().float() == values).all())


@pytest.mark.parametrize("roles", ARRANGEMENTS)
def test_ppo_takes_a_gpus_decisions(tmp_path: Path, roles: str) -> None:
    policy = make_policy(tmp_path / "sft", "abcd")
    folder = make_reward(tmp_path / "reward", policy, OFFSET)

    def use(training: ppo.Training, run: Run[Any]) -> None:
        collector, networks = training.collector, training.collector.networks
        assert collector.plan.decided_for == "cuda"
        assert collector.plan.bf16
        assert networks.packed
        assert all(is_packed(model) for model in networks.models())
        if roles != "adapters":  # there the reference is the policy's own base
            assert linear_dtypes(networks.reference) == {torch.bfloat16}
        scorer = reward_model_of(training)
        assert linear_dtypes(scorer) == {torch.bfloat16}
        assert scalar_head(scorer).weight.dtype == torch.float32
        assert {p.dtype for trained in networks.trained.values() for p in trained} == {torch.float32}
        rollout, metrics = one_rollout(training, run)
        assert decoder_of(networks.policy.model) is CachedDecoder
        assert not in_bf16_steps(metrics["score_before_eos_rule"] + torch.tensor(OFFSET))
        finished = rollout.scores[rollout.finished]
        assert not in_bf16_steps(finished + OFFSET), "scores are not rounded"
        assert rollout.values.dtype == rollout.logprobs.dtype == torch.float32
        if roles == "separate":
            assert not in_bf16_steps(rollout.values + OFFSET), "nor are values"
        train_all(training, run)

    changes = {**SHORT, **ARRANGEMENTS[roles], "roles": roles, "reward": str(folder)}
    with_training(tmp_path / "run", policy, "return 0.0", use, **changes)
    out = tmp_path / "run" / "out"
    assert json.loads((out / "lineage.json").read_text())["status"] == "complete"
    assert {p.dtype for p in load_causal_lm(str(out)).parameters()} == {torch.float32}
    assert "slowly" not in (out / "log.txt").read_text()


# ---------------------------------------------------------------------------------------------- all four stages

TRAINED: dict[str, Any] = {
    "precision": "auto", "threads": 1, "quiet": True, "max_steps": 2, "logging_steps": 1, "save_steps": 100,
    "examples_per_step": 4, "examples_per_device": 2, "held_out_fraction": 0.3,
}  # fmt: skip
MODEL = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def write_lines(file: Path, rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [{"path": str(file)}]


def run(stage: Any, name: str, folder: Path, **values: Any) -> Path:
    recipe = folder / f"{name}.yaml"
    recipe.write_text(yaml.safe_dump({**TRAINED, "output_dir": str(folder / name), **values}))
    launch(name, STAGES[name], stage.main, ["--config", str(recipe)])
    forget_launch()
    assert json.loads((folder / name / "lineage.json").read_text())["status"] == "complete"
    return folder / name


def test_all_four_stages_take_a_gpus_decisions(tmp_path: Path) -> None:
    """Each from the one before it, by `precision: auto`."""
    documents = write_lines(tmp_path / "text.jsonl", [{"text": f"a tale of {i} kettles"} for i in range(40)])
    answers = [{"prompt": f"how many kettles? {i}", "response": f"{i} of them"} for i in range(40)]
    pairs = [{"prompt": row["prompt"], "chosen": row["response"], "rejected": "no"} for row in answers]
    base = run(
        pretrain, "pretrain", tmp_path, datasets=documents, train_tokenizer={"vocab_size": 280}, model_config=MODEL,
        block_tokens=32,
    )  # fmt: skip
    tuned = run(
        sft, "sft", tmp_path, parent=str(base), datasets=write_lines(tmp_path / "answers.jsonl", answers), max_tokens=64
    )
    scorer = run(
        reward,
        "reward",
        tmp_path,
        parent=str(tuned),
        datasets=write_lines(tmp_path / "pairs.jsonl", pairs),
        max_tokens=64,
    )
    recipe = write_recipe(
        tmp_path / "ppo", tuned, "return 0.0", **SHORT, reward=str(scorer), max_prompt_tokens=32,
        datasets=[{"path": str(tmp_path / "answers.jsonl")}], eval_datasets=[{"path": str(tmp_path / "answers.jsonl")}],
    )  # fmt: skip
    launch("ppo", STAGES["ppo"], ppo.main, ["--config", str(recipe)])
    record = json.loads((tmp_path / "ppo" / "out" / "lineage.json").read_text())
    assert record["status"] == "complete"
    for folder in (base, tuned, tmp_path / "ppo" / "out"):
        assert {p.dtype for p in load_causal_lm(str(folder)).parameters()} == {torch.float32}

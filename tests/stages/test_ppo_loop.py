"""PPO's loop beyond its arithmetic: on-policy starts, step counts, rewards of every kind, prompts in order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helpers.launches import lineage, tiny_flags
from pipeline import ppo
from pipeline.config.stages import STAGES
from pipeline.data.batching import microbatches
from pipeline.rollout.prompts import Prompt, PromptSet
from pipeline.training.stage import launch

import pytest
import torch


def run(chain: Path, recipes: Path, tmp_path: Path, **changes: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A short run in this process: (history, metrics)."""
    values: dict[str, Any] = {
        "config": recipes / "ppo.yaml", "report_to": None, "parent": chain / "sft", "reward": chain / "reward",
        "output_dir": tmp_path / "out", "total_rollouts": 2, "eval_rollouts": None, "eval_prompts": 8,
    }  # fmt: skip
    launch("ppo", STAGES["ppo"], ppo.main, tiny_flags("ppo", tmp_path, **{**values, **changes}))
    rows = [json.loads(line) for line in (tmp_path / "out" / "history.jsonl").read_text().splitlines()]
    return [row for row in rows if "first_minibatch_log_ratio" in row], lineage(tmp_path / "out")["metrics"]


def test_the_first_ratio_is_exactly_one_where_shapes_are_the_same(chain: Path, recipes: Path, tmp_path: Path) -> None:
    rows, _ = run(chain, recipes, tmp_path, minibatches=1, micro_batch_tokens=100_000)
    assert [row["first_minibatch_log_ratio"] for row in rows] == [0.0, 0.0]


@pytest.mark.full
def test_the_first_ratio_in_bf16(chain: Path, recipes: Path, tmp_path: Path) -> None:
    rows, _ = run(chain, recipes, tmp_path, precision="bf16", micro_batch_tokens=200)
    assert all(row["first_minibatch_log_ratio"] < 2e-2 for row in rows)


@pytest.mark.parametrize(
    ("epochs", "minibatches"),
    [pytest.param(1, 1, marks=pytest.mark.full), (3, 4), pytest.param(2, 16, marks=pytest.mark.full)],
)
def test_step_counts(chain: Path, recipes: Path, tmp_path: Path, epochs: int, minibatches: int) -> None:
    _, metrics = run(chain, recipes, tmp_path, ppo_epochs=epochs, minibatches=minibatches)
    assert metrics["policy_steps"] == metrics["value_steps"] == 2 * epochs * minibatches


@pytest.mark.full  # `tests/models/test_networks.py` shows the same of the gradients
def test_micro_batches_do_not_change_the_update(chain: Path, recipes: Path, tmp_path: Path) -> None:
    """Gradients are sums over the minibatch's tokens, however it is cut."""
    metrics = []
    for tokens in (100, 100_000):
        rows, _ = run(chain, recipes, tmp_path / str(tokens), micro_batch_tokens=tokens, total_rollouts=1)
        metrics.append(rows[0])
    for name in ("policy_loss", "value_loss", "policy_grad_norm", "value_grad_norm", "entropy"):
        assert metrics[0][name] == pytest.approx(metrics[1][name], rel=1e-3, abs=1e-5), name


def test_rewards_may_be_functions_models_and_sums(chain: Path, recipes: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "ppo.yaml"
    text = (
        (recipes / "ppo.yaml")
        .read_text()
        .replace(
            "reward: runs/demo/reward\n", f"reward:\n  - model: {chain / 'reward'}\n    weight: 0.5\n  - rubric:score\n"
        )
    )
    recipe.write_text(text)
    _, metrics = run(chain, recipes, tmp_path, config=recipe, reward=None)
    parts = [metrics["score_reward_model"], metrics["score_rubric:score"]]
    if metrics["stopped"] == 1.0:
        assert metrics["score"] == pytest.approx(0.5 * parts[0] + parts[1], abs=1e-4)
    assert 0 <= parts[1] <= 1
    _, alone = run(chain, recipes, tmp_path / "alone", reward="rubric:score", value_init="policy")
    assert alone["score_rubric:score"] == pytest.approx(alone["rubric"])


def test_a_value_network_from_the_policy_starts_at_zero(chain: Path, recipes: Path, tmp_path: Path) -> None:
    from pipeline.models.reward_model import load_scalar_model, scalar_head

    run(chain, recipes, tmp_path, value_init="policy", total_rollouts=1, value_learning_rate=0.0)
    assert scalar_head(load_scalar_model(str(tmp_path / "out" / "value"))).weight.abs().max() == 0


def test_without_a_learning_rate_nothing_moves(chain: Path, recipes: Path, tmp_path: Path) -> None:
    _, metrics = run(chain, recipes, tmp_path, learning_rate=0.0, value_learning_rate=0.0)
    assert lineage(tmp_path / "out")["weights_sha256"] != ""
    from pipeline.models.loading import load_causal_lm

    before, after = (load_causal_lm(str(path)).state_dict() for path in (chain / "sft", tmp_path / "out"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert metrics["kl"] == pytest.approx(0, abs=1e-4)


def test_prompts_come_in_seeded_permutations() -> None:
    prompts: Any = PromptSet([Prompt([], [i], {}) for i in range(20)], [], list(range(20)))
    drawn = [prompt.ids[0] for rollout in range(5) for prompt in prompts.of_rollout(rollout, 8, seed=0)]
    assert sorted(drawn[:20]) == sorted(drawn[20:40]) == list(range(20)), "each epoch sees every prompt once"
    assert drawn[:20] != drawn[20:40]
    again = [prompt.ids[0] for prompt in prompts.of_rollout(3, 8, seed=0)]
    assert again == drawn[24:32], "a function of the rollout's number alone"


def test_microbatches_hold_every_row_once() -> None:
    lengths = [5, 90, 7, 30, 200, 6, 12, 31]
    rows = [0, 1, 2, 3, 4, 5, 7]
    groups = microbatches(lengths, rows, 100)
    assert sorted(row for group in groups for row in group) == rows
    for group in groups:
        assert len(group) == 1 or sum(lengths[row] for row in group) <= 100
    assert groups == [[0, 5, 2, 3, 7], [1], [4]], "as many as go in, the short ones first"
    assert microbatches(lengths, [], 1000) == []


def test_attention_sees_no_more_than_twice_the_tokens() -> None:
    """One long row beside many short ones would be padded to many times its tokens there."""
    groups = microbatches([10] * 50 + [300], list(range(51)), 1000)
    assert groups == [list(range(50)), [50]]

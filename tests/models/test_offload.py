"""Tensors that leave their device between the phases that use them: nothing is held there, and all come back as they were."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from helpers.ppo_training import one_rollout, train_all, with_training
from helpers.tiny_models import make_lm
from helpers.worlds import make_policy, make_reward, write_recipe
from pipeline import ppo
from pipeline.models.loading import load_causal_lm
from pipeline.models.offload import offloaded_moments, offloaded_networks

import torch
from safetensors.torch import load_file
from torch import Tensor

COUNT_B = "return float(response.count('b'))"


def held(tensors: Iterable[Tensor]) -> int:
    """Bytes on the device."""
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def test_a_network_comes_back_as_it_was(tmp_path: Path, tokenizer: Any) -> None:
    model = make_lm("llama", tokenizer)
    model.tie_weights()
    model.save_pretrained(tmp_path)
    loaded = load_causal_lm(str(tmp_path)).requires_grad_(False)  # its weights are mapped from the file
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    size = held({p.data_ptr(): p for p in loaded.parameters()}.values())
    resident = offloaded_networks([loaded])
    for _ in range(2):
        assert held(loaded.parameters()) == 0
        with resident:
            assert held({p.data_ptr(): p for p in loaded.parameters()}.values()) <= size
            for name, tensor in loaded.state_dict().items():
                torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_moments_go_on_from_where_they_were() -> None:
    def steps(offload: bool) -> Tensor:
        parameter = torch.nn.Parameter(torch.ones(5))
        optimizer = torch.optim.AdamW([parameter], lr=0.1)
        parameter.grad = torch.arange(5.0)
        optimizer.step()
        if offload:
            resident = offloaded_moments([optimizer])
            for _ in range(3):
                assert held(state["exp_avg"] for state in optimizer.state.values()) == 0
                with resident:
                    optimizer.step()
            with resident:  # a checkpoint was read: other tensors
                optimizer.load_state_dict(optimizer.state_dict())
            assert held(state["exp_avg_sq"] for state in optimizer.state.values()) == 0
        else:
            for _ in range(3):
                optimizer.step()
        return parameter.detach()

    assert torch.equal(steps(True), steps(False))


def test_ppo_with_all_offloaded_is_ppo(tmp_path: Path) -> None:
    """Each network is away in the phases that do not need it, and the run is the same to the bit."""
    policy = make_policy(tmp_path / "sft", "abcdefgh")
    rewards = [
        {"model": str(make_reward(tmp_path / "reward", policy))},
        {"function": f"{_function(tmp_path, policy)}:score"},
    ]
    changes: dict[str, Any] = {
        "reward": rewards, "total_rollouts": 2, "prompts_per_rollout": 8, "max_response_tokens": 4, "eval_rollouts": 1,
        "best_metric": "score", "save_steps": 1,
    }  # fmt: skip
    seen: list[tuple[str, int, int, int]] = []

    def watched(training: ppo.Training, run: Any) -> None:
        collector, learner = training.collector, training.learner
        scorer = collector.scorer.parts[0].network
        assert scorer is not None
        reference = collector.networks.frozen()[0]
        moments = [state["exp_avg"] for optimizer in learner.optimizers.values() for state in optimizer.state.values()]

        def note(phase: str) -> Any:
            return lambda *_: seen.append((phase, *map(held, (reference.parameters(), scorer.parameters(), moments))))

        hooks = [
            collector.networks.policy.register_forward_pre_hook(note("policy")),
            reference.register_forward_pre_hook(note("reference")),
            scorer.get_input_embeddings().register_forward_pre_hook(note("reward")),
        ]
        rollout, metrics = one_rollout(training, run)
        learner.update(rollout, metrics)
        for hook in hooks:
            hook.remove()

    with_training(tmp_path / "watched", policy, COUNT_B, watched, offload="all", **changes)
    away = {phase: [bool(size) for size in sizes] for phase, *sizes in seen if phase != "policy"}
    assert away == {"reference": [True, False, False], "reward": [False, True, False]}
    assert [bool(size) for size in seen[-1][1:]] == [False, False, True], "the update"
    for kind in ("none", "all"):
        with_training(tmp_path / kind, policy, COUNT_B, train_all, offload=kind, **changes)
    for part in ("", "value"):
        one, other = (load_file(tmp_path / kind / "out" / part / "model.safetensors") for kind in ("none", "all"))
        assert all(torch.equal(one[name], other[name]) for name in one)


def _function(folder: Path, policy: Path) -> str:
    write_recipe(folder / "watched", policy, COUNT_B)
    return next((folder / "watched").glob("world_*.py")).stem


def test_adapters_have_nothing_to_offload_but_their_reward(tmp_path: Path) -> None:
    policy = make_policy(tmp_path / "sft", "abcdefgh")
    changes: dict[str, Any] = {"roles": "adapters", "lora": {"r": 4, "alpha": 8}, "offload": "frozen"}
    names = with_training(tmp_path, policy, COUNT_B, lambda training, _: list(training.collector.offloaded), **changes)
    assert names == []
    changes["reward"] = str(make_reward(tmp_path / "reward", policy))
    names = with_training(
        tmp_path / "model", policy, COUNT_B, lambda training, _: list(training.collector.offloaded), **changes
    )
    assert names == ["reward"]

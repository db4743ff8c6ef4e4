"""Passes and operations of PPO and of the trainer stages, by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from pipeline.planning.activations import Step, step_memory
from pipeline.planning.attention import attention_flops
from pipeline.planning.devices import Device
from pipeline.planning.memory import Setting, ppo_memory
from pipeline.planning.parameters import parameters
from pipeline.planning.workload import Data, Model, PPOModels, ppo_passes, ppo_work, trainer_work

import pytest
from transformers import LlamaConfig, MixtralConfig

SHAPE = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA = LlamaConfig(**SHAPE, num_hidden_layers=3)
GPU = Device("gpu", 80, 100, 300, 1)


def model(config: Any, scalar: bool = False) -> Model:
    return Model(config, parameters(config, scalar))


def networks(config: Any = LLAMA) -> PPOModels:
    return PPOModels(model(config), model(config, True), model(config, True))


def recipe(**changes: Any) -> Any:
    values = {
        "roles": "separate", "offload": "none", "engine": "local", "gradient_checkpointing": False,
        "ppo_epochs": 4, "total_rollouts": 10, "prompts_per_rollout": 8, "minibatches": 2, "ptx_coef": 0.0,
        "max_prompt_tokens": 10, "max_response_tokens": 10, "micro_batch_tokens": 80, "generation_rows": 8, "ema_decay": None,
        "lora": None, "quantization": None,
    }  # fmt: skip
    return SimpleNamespace(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "passes"),
    [
        ({}, 29),  # generate, policy, reference, value, reward; 4 × (forward and backward) of policy and value
        ({"ppo_epochs": 1}, 5 + 6),
        ({"roles": "shared_trunk"}, 4 + 12),  # the value comes with the policy's passes
        ({"roles": "adapters"}, 29),
    ],
)
def test_attention_passes_of_ppo(changes: dict[str, Any], passes: int) -> None:
    models = networks()
    assert sum(number for _, number in ppo_passes(recipe(**changes), models)) == passes
    work = ppo_work(recipe(**changes), models, Data(100, 10.0))
    assert work.attention_flops == pytest.approx(attention_flops(LLAMA, 10 * 8 * 20, 20, passes))


def test_a_larger_reward_model_attends_by_its_own_size() -> None:
    large = LlamaConfig(**{**SHAPE, "hidden_size": 64}, num_hidden_layers=6)
    models = PPOModels(model(LLAMA), model(LLAMA, True), model(large, True))
    work = ppo_work(recipe(), models, Data(100, 10.0))
    expected = attention_flops(LLAMA, 1600, 20, 28) + attention_flops(large, 1600, 20, 1)
    assert work.attention_flops == pytest.approx(expected)


def test_a_mixture_of_experts_computes_with_part_of_it_and_holds_it_all() -> None:
    config = MixtralConfig(**SHAPE, num_hidden_layers=2, num_local_experts=8, num_experts_per_tok=2)
    moe = model(config)
    assert moe.size.active < 0.5 * moe.size.total
    work = ppo_work(recipe(), networks(config), Data(100, 10.0))
    assert work.flops["generate"] == 2 * moe.size.active * 1600
    assert any("of its parameters, holds them all" in note for note in work.notes)
    setting = Setting(GPU, 1, "none", 0.4, 0.05)
    assert ppo_memory(recipe(), networks(config), Data(100, 10.0), setting).parts["policy"] == 4 * moe.size.total


def test_attention_of_a_trained_step_is_a_forward_and_a_backward_pass_with_lora_too() -> None:
    shared = {"examples_per_step": 4, "epochs": 1, "max_steps": 10, "max_tokens": 20, "packing": False}
    for lora in (None, object()):
        for checkpointing, passes in ((False, 3), (True, 4)):
            given = SimpleNamespace(**shared, lora=lora, gradient_checkpointing=checkpointing)
            work = trainer_work("sft", given, model(LLAMA), Data(100, 20.0))
            assert work.attention_flops == attention_flops(LLAMA, 10 * 4 * 20, 20, passes)
            assert work.flops["train"] == (6 if lora is None else 4) * model(LLAMA).size.total * 800


def test_data_parallel_ppo_exchanges_its_gradients() -> None:
    alone = ppo_memory(recipe(), networks(), Data(100, 10.0), Setting(GPU, 1, "none", 0.4, 0.05))
    two = ppo_memory(recipe(), networks(), Data(100, 10.0), Setting(GPU, 2, "ddp", 0.4, 0.05))
    assert "exchange buffers" not in alone.parts
    assert (
        two.parts["exchange buffers"]
        == two.parts["gradients"]
        == 4 * (model(LLAMA).size.total + model(LLAMA, True).size.total)
    )


@pytest.mark.full
@pytest.mark.parametrize("precision", ["fp32", "autocast", "bf16"])
def test_a_step_of_a_mixture_of_experts_has_a_size(precision: str) -> None:
    config = MixtralConfig(**SHAPE, num_hidden_layers=2, num_local_experts=8, num_experts_per_tok=2)
    small, large = (step_memory(config, Step(rows, 16, precision=precision)) for rows in (2, 8))
    assert 0 < small < large

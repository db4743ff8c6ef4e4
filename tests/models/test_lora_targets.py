"""LoRA's default targets in mixtures of experts."""

from __future__ import annotations

from pipeline.models.lora import linear_module_names

import pytest
from transformers import AutoModelForCausalLM, JambaConfig, Qwen3MoeConfig

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4}


@pytest.mark.parametrize("experts", [8, 16])
def test_projections_as_wide_as_there_are_experts_are_no_routers(experts: int) -> None:
    sizes = {**SIZES, "num_hidden_layers": 1, "num_key_value_heads": 2, "head_dim": 8, "num_experts": experts}
    model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**sizes, moe_intermediate_size=16))
    assert {"k_proj", "o_proj", "q_proj", "v_proj"} <= set(linear_module_names(model))


def test_routers_are_left_out() -> None:
    sizes = {**SIZES, "num_hidden_layers": 2, "num_key_value_heads": 2, "num_experts": 4, "use_mamba_kernels": False}
    layers = {"expert_layer_period": 1, "expert_layer_offset": 0, "attn_layer_period": 2, "attn_layer_offset": 0}
    model = AutoModelForCausalLM.from_config(JambaConfig(**sizes, **layers))
    routers = [name for name, _ in model.named_modules() if name.split(".")[-1] == "router"]
    assert routers
    assert not any("router" in name for name in linear_module_names(model))

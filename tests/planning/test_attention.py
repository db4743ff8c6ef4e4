"""Attention's compute and cache by hand, and against what transformers caches."""

from __future__ import annotations

from typing import Any

from pipeline.planning.attention import attention_flops, cache_bytes
from pipeline.planning.parameters import parameters

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3MoeConfig,
)

SHAPE = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA = LlamaConfig(**SHAPE, num_hidden_layers=3)
WIDE_HEADS = LlamaConfig(**SHAPE, num_hidden_layers=3, head_dim=16)
LATENT = DeepseekV3Config(
    **{**SHAPE, "num_key_value_heads": 4}, num_hidden_layers=3, kv_lora_rank=8, q_lora_rank=12, qk_nope_head_dim=8,
    qk_rope_head_dim=4, v_head_dim=6, n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1,
    first_k_dense_replace=1, n_shared_experts=1, moe_intermediate_size=16,
)  # fmt: skip
WINDOWED = GptOssConfig(
    **SHAPE, num_hidden_layers=4, head_dim=16, num_local_experts=8, num_experts_per_tok=2, sliding_window=4
)
ALL_WINDOWED = MistralConfig(**SHAPE, num_hidden_layers=3, sliding_window=5)


def test_attention_by_hand() -> None:
    """QKᵀ and AV: 2 · 2 · heads · head size per pair of tokens, half of the pairs under a causal mask."""
    assert attention_flops(LLAMA, tokens=1000, length=100, passes=1) == 3 * (2 + 2) * 32 * 50 * 1000
    assert attention_flops(WIDE_HEADS, 1000, 100, 1) == 3 * (2 + 2) * 4 * 16 * 50 * 1000, "heads wider than the model"
    assert attention_flops(LATENT, 1000, 100, 3) == 3 * 3 * 2 * 4 * (12 + 6) * 50 * 1000
    windowed = sum(min(i, 4) - 0.5 if i <= 4 else 4.0 for i in range(1, 101)) / 100  # a token sees half of itself
    assert attention_flops(WINDOWED, 1000, 100, 1) == pytest.approx(
        (2 + 2) * 64 * (2 * 50 + 2 * windowed) * 1000, rel=0.01
    )
    assert attention_flops(WINDOWED, 1000, 3, 1) == (2 + 2) * 64 * 4 * 1.5 * 1000, "a window longer than the text"


@pytest.mark.parametrize(
    ("config", "numbers"),
    [
        (LLAMA, 3 * 2 * 2 * 8 * 10),
        (WIDE_HEADS, 3 * 2 * 2 * 16 * 10),
        (LATENT, 3 * (8 + 4) * 10),
        (WINDOWED, 2 * 2 * 2 * 16 * (10 + 4)),
        (ALL_WINDOWED, 3 * 2 * 2 * 8 * 5),
    ],
    ids=["grouped queries", "wide heads", "latent", "windows", "a window everywhere"],
)
def test_the_cache_is_what_transformers_keeps(config: Any, numbers: int) -> None:
    assert cache_bytes(config, rows=2, length=10, bytes_each=2) == 2 * numbers * 2
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        cache = model(torch.arange(10)[None], use_cache=True).past_key_values
    held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    # A window's layer keeps one token less than the window: the next one is on its way.
    windows = sum(1 for layer in cache.layers if "Sliding" in type(layer).__name__)
    assert held == numbers - windows * 2 * 2 * (config.head_dim or 8)


@pytest.mark.parametrize(
    ("config", "routed"),
    [
        (Qwen3MoeConfig(**SHAPE, num_hidden_layers=3, head_dim=16, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16), 3 * 8 * 3 * 16 * 32),
        (LATENT, 2 * 8 * 3 * 16 * 32),
    ],
    ids=["qwen3", "deepseek: one dense layer, shared experts"],
)  # fmt: skip
def test_a_mixture_of_experts_computes_with_the_experts_that_a_token_takes(config: Any, routed: int) -> None:
    found = parameters(config)
    assert found.total == sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    assert found.active == found.total - routed * 6 // 8
    assert parameters(LLAMA).active == parameters(LLAMA).total

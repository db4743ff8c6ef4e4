"""Random models of a few thousand parameters."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

# Keys of configurations.
SMALL = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
DEEPSEEK4 = {
    **SMALL,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "o_groups": 2,
    "o_lora_rank": 8,
    "moe_intermediate_size": 8,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "index_n_heads": 2,
    "index_head_dim": 8,
    "pad_token_id": 0,
}


def make_lm(style: str, tokenizer: Any) -> Any:
    torch.manual_seed(0)
    ids = {
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    if style == "llama":
        config: Any = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            initializer_range=0.2,
            **ids,
        )
    else:
        config = GPT2Config(
            vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2, **ids
        )
    return AutoModelForCausalLM.from_config(config).eval()

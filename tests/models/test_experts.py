"""Mixtures of experts: the load-balancing loss counts once per optimizer step, and its absence is said."""

from __future__ import annotations

from pipeline.errors import UserError
from pipeline.models.experts import expert_counts, set_router_loss

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

SIZES = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
DENSE = LlamaConfig(**SIZES)
MIXTURE = Qwen3MoeConfig(
    **SIZES, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8
)


def test_the_loss_is_added_with_its_weight_over_the_passes_of_a_step() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MIXTURE)
    ids = torch.arange(20)[None]
    plain = model(input_ids=ids, labels=ids)
    assert set_router_loss(model, 0.5, 4) is None
    balanced = model(input_ids=ids, labels=ids, output_router_logits=True)
    torch.testing.assert_close(balanced.loss, plain.loss + 0.125 * balanced.aux_loss)
    assert balanced.aux_loss > 0
    assert not model.config.output_router_logits


def test_a_mixture_without_the_loss_is_said_and_a_dense_model_has_none() -> None:
    mixture, dense = AutoModelForCausalLM.from_config(MIXTURE), AutoModelForCausalLM.from_config(DENSE)
    assert expert_counts(MIXTURE) == {4}
    assert expert_counts(DENSE) == set()
    assert "without a load-balancing loss" in str(set_router_loss(mixture, 0.0, 1))
    assert set_router_loss(dense, None, 1) is None
    with pytest.raises(UserError, match="LlamaForCausalLM has no load-balancing loss; leave the key out"):
        set_router_loss(dense, 0.1, 1)

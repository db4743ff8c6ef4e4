"""Packed sequences answer, and learn, as sequences alone do; what does not is noticed."""

from __future__ import annotations

import copy
from typing import Any

from pipeline.errors import UserError
from pipeline.models.packed import PACKED, body, hidden_states, length_buckets, pack
from pipeline.models.trials import enable_packed_attention, isolates_packed_documents, require_causal

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

ROWS = [[5, 9, 4, 7, 11, 3, 8, 2, 6, 10, 4, 9], [3], [8, 2, 6, 5], [7, 7, 9, 12, 1, 5, 6]]
SIZES: dict[str, dict[str, Any]] = {
    "LlamaConfig": {"num_key_value_heads": 1},
    "MistralConfig": {"num_key_value_heads": 2, "sliding_window": 3},
    "Qwen3Config": {"num_key_value_heads": 2, "head_dim": 8},
    "Gemma3TextConfig": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 3},
    "GPT2Config": {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "GPTNeoXConfig": {},
    "OPTConfig": {"ffn_dim": 32, "word_embed_proj_dim": 32, "dropout": 0.0},
}


def network(name: str, **sizes: Any) -> Any:
    torch.manual_seed(0)
    shape = {
        "vocab_size": 16,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    config = getattr(transformers, name)(
        **{**shape, "max_position_embeddings": 64, "initializer_range": 0.3, "pad_token_id": 0, **sizes}
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def answer(model: Any, packed: bool, min_saving: int = 2**14) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """States of every token, and the gradients of a fixed weighted sum of them."""
    total = sum(map(len, ROWS))
    weights = torch.randn(total, 32, generator=torch.Generator().manual_seed(0))
    model.zero_grad()
    if packed:
        batch = pack(ROWS, 0, min_saving)
        assert batch.input_ids.shape == (1, 64)
        states = hidden_states(model.base_model, batch)[:total].float()
    else:
        states = torch.cat([model.base_model(torch.tensor([row]), use_cache=False)[0][0] for row in ROWS]).float()
    (states * weights).sum().backward()
    return states.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def norm(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack([gradient.norm() for gradient in gradients.values()]).norm()


@pytest.mark.parametrize("name", SIZES)
def test_packed_sequences_answer_and_learn_as_sequences_alone(name: str) -> None:
    plain = network(name, **SIZES[name])
    model = copy.deepcopy(plain)
    assert enable_packed_attention(model), f"{name} can be packed"
    assert model.config._attn_implementation == PACKED
    exact, expected = answer(plain, packed=False)
    scale = norm(expected)
    for min_saving in (2**14, 0):  # attention over all sequences together; over each one
        states, gradients = answer(model, packed=True, min_saving=min_saving)
        torch.testing.assert_close(states, exact, atol=1e-4, rtol=1e-4)
        assert gradients.keys() == expected.keys()
        for label, gradient in expected.items():
            assert (gradients[label] - gradient).norm() <= 1e-5 * scale, label
    with torch.autocast("cpu", torch.bfloat16):
        rounded, rounded_gradients = answer(plain, packed=False)
        states, gradients = answer(model, packed=True)
    assert (states - exact).norm() <= 1.5 * (rounded - exact).norm(), "bf16 is as exact as the library's"
    errors = [norm({k: g[k] - expected[k] for k in expected}) for g in (gradients, rounded_gradients)]
    assert errors[0] <= 2.5 * errors[1]
    assert errors[0] <= 0.1 * scale


def test_recomputation_in_the_backward_pass_sees_the_layout() -> None:
    """With gradient checkpointing the same gradients: the layout is an argument, not a global."""
    model = network("LlamaConfig", **SIZES["LlamaConfig"])
    assert enable_packed_attention(model)
    _, expected = answer(model, packed=True)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    _, gradients = answer(model, packed=True)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient)


def test_sequences_of_similar_length_attend_together() -> None:
    lengths = [100, 20, 18, 90, 25, 97, 17, 30]
    assert length_buckets(lengths, min_saving=2**14) == [[6, 2, 1, 4], [7, 3, 5, 0]]
    assert length_buckets(lengths, min_saving=2**40) == [[6, 2, 1, 4, 7, 3, 5, 0]]
    assert len(length_buckets(lengths, min_saving=0)) == len(lengths)
    batch = pack([[1] * n for n in lengths], 0)
    assert batch.layout is not None
    assert [tuple(index.shape) for index in batch.layout.pad_index] == [(4, 32), (4, 112)]
    assert batch.position_ids[0, : 100 + 20].tolist() == [*range(100), *range(20)]


def test_a_model_with_packed_attention_generates_as_before() -> None:
    """Padding on the left, a cache, one token at a time: attention there is the library's own."""
    plain = network("LlamaConfig")
    model = copy.deepcopy(plain)
    assert enable_packed_attention(model)
    ids = torch.tensor([[0, 0, 5, 9], [3, 4, 8, 2]])
    mask = (ids > 0).long()
    answers = [m.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False) for m in (plain, model)]
    assert answers[0].tolist() == answers[1].tolist()


def test_what_carries_a_state_along_the_sequence_stays_padded() -> None:
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=16, hidden_size=16, num_hidden_layers=1, state_size=4)
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert not enable_packed_attention(model)
    assert not isolates_packed_documents(model)


def test_soft_capped_attention_stays_padded() -> None:
    """Gemma 2 caps its attention scores, which our attention does not compute."""
    model = network("Gemma2Config", num_key_value_heads=2, head_dim=8, attn_logit_softcapping=2.0)
    before = model.config._attn_implementation
    assert not enable_packed_attention(model)
    assert model.config._attn_implementation == before


def test_a_model_that_ignores_the_layout_is_noticed() -> None:
    """Attention that calls the library's function by itself never asks for our layout."""
    model = network("LlamaConfig")
    before = model.config._attn_implementation
    for layer in model.model.layers:
        layer.self_attn.config = copy.deepcopy(model.config)  # keeps `sdpa` whatever the model is told
    assert not enable_packed_attention(model)
    assert model.config._attn_implementation == before


ISOLATES = {"LlamaConfig": True, "GPT2Config": True, "MistralConfig": True, "OPTConfig": False}


@pytest.mark.parametrize("name", ISOLATES)
def test_documents_that_see_each_other_in_a_packed_row_are_noticed(name: str) -> None:
    """OPT counts positions from its mask and ignores position ids that restart, so its documents leak into each other."""
    assert isolates_packed_documents(network(name, **SIZES[name])) is ISOLATES[name]


def test_a_model_with_attention_sinks_stays_padded_with_one_document_per_row() -> None:
    """gpt-oss computes sinks in an attention of its own, which restarting positions do not part."""
    config = transformers.GptOssConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=2,
        num_experts_per_tok=1,
        sliding_window=64,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    assert not isolates_packed_documents(model)
    assert not enable_packed_attention(model)


def test_attention_in_chunks_longer_than_the_trial_stays_padded() -> None:
    """Llama 4's chunks have 8,192 tokens: packed attention, which has none, was taken for the same."""
    sizes = {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size_mlp": 64, "num_local_experts": 2}
    assert not enable_packed_attention(network("Llama4TextConfig", **sizes, attention_chunk_size=32))


def test_trials_leave_the_random_state_alone(tiny_lm: Any) -> None:
    model = copy.deepcopy(tiny_lm).train()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    enable_packed_attention(model)
    isolates_packed_documents(model)
    assert torch.equal(before, torch.get_rng_state())
    assert model.training


@pytest.mark.parametrize(("config", "causal"), [("BertConfig", False), ("BertConfig", True), ("XLNetConfig", False)])
def test_a_model_that_sees_later_tokens_is_no_language_model(config: str, causal: bool) -> None:
    """An encoder loads as a language model; it would be trained to copy its answers."""
    bert = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "is_decoder": causal,
    }
    sizes = bert if config == "BertConfig" else {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 16}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, config)(vocab_size=64, **sizes))
    if causal:
        require_causal(model, "here")
    else:
        with pytest.raises(UserError, match="here' predicts tokens from those that follow them"):
            require_causal(model, "here")


def test_a_text_model_under_another_name_than_its_class_says_is_found() -> None:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "intermediate_size_mlp": 32,
        "num_hidden_layers": 2,
        "head_dim": 8,
    }
    experts = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2, "attention_chunk_size": 4}
    model = AutoModelForCausalLM.from_config(
        transformers.Llama4TextConfig(vocab_size=64, pad_token_id=0, **sizes, **experts)
    )
    assert model.base_model is model, "its prefix names no part of it"
    assert body(model)(input_ids=torch.tensor([[5, 6]])).last_hidden_state.shape == (1, 2, 32)
    assert isolates_packed_documents(model) in (True, False)
    assert enable_packed_attention(model) in (True, False)

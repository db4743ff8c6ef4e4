"""Rows end to end answer, and learn, as rows alone do."""

from __future__ import annotations

import copy
from typing import Any

from pipeline.models.packed import NAME, alike, hidden_states, lay_out, prepare

import pytest
import torch
import transformers

ROWS = [[5, 9, 4, 7, 11, 3, 8, 2, 6, 10, 4, 9], [3], [8, 2, 6, 5], [7, 7, 9, 12, 1, 5, 6]]
SIZES: dict[str, dict[str, Any]] = {
    "LlamaConfig": {"num_key_value_heads": 1},
    "MistralConfig": {"num_key_value_heads": 2, "sliding_window": 3},
    "Qwen3Config": {"num_key_value_heads": 2, "head_dim": 8},
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


def answer(model: Any, packed: bool, worth: int = 2**14) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """States of every token, and the gradients of a fixed weighted sum of them; rows end to end, or each in its own pass."""
    total = sum(map(len, ROWS))
    weights = torch.randn(total, 32, generator=torch.Generator().manual_seed(0))
    model.zero_grad()
    if packed:
        batch = lay_out(ROWS, 0, packed=True, worth=worth)
        assert batch["input_ids"].shape == (1, 64)
        states = hidden_states(model.base_model, batch)[:total].float()
    else:
        states = torch.cat([model.base_model(torch.tensor([row]), use_cache=False)[0][0] for row in ROWS]).float()
    (states * weights).sum().backward()
    return states.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", SIZES)
def test_packed_rows_answer_and_learn_as_rows_alone(name: str) -> None:
    plain = network(name, **SIZES[name])
    model = copy.deepcopy(plain)
    assert prepare(model), f"{name} can be packed"
    assert model.config._attn_implementation == NAME
    exact, expected = answer(plain, packed=False)
    scale = norm(expected)
    for worth in (2**14, 0):  # attention over all rows together; over each row
        states, gradients = answer(model, packed=True, worth=worth)
        torch.testing.assert_close(states, exact, atol=1e-4, rtol=1e-4)
        assert gradients.keys() == expected.keys()
        for label, gradient in expected.items():
            assert (gradients[label] - gradient).norm() <= 1e-5 * scale, label
    with torch.autocast("cpu", torch.bfloat16):
        rounded, rounded_gradients = answer(plain, packed=False)
        states, gradients = answer(model, packed=True)
    assert (states - exact).norm() <= 1.5 * (rounded - exact).norm(), "bf16 is as exact as the library's"
    errors = [norm({k: found[k] - expected[k] for k in expected}) for found in (gradients, rounded_gradients)]
    assert errors[0] <= 2.5 * errors[1]
    assert errors[0] <= 0.1 * scale


def test_rows_of_similar_length_attend_together() -> None:
    lengths = [100, 20, 18, 90, 25, 97, 17, 30]
    assert alike(lengths, worth=2**14) == [[6, 2, 1, 4], [7, 3, 5, 0]]
    assert alike(lengths, worth=2**40) == [[6, 2, 1, 4, 7, 3, 5, 0]]
    assert len(alike(lengths, worth=0)) == len(lengths)
    batch = lay_out([[1] * n for n in lengths], 0, packed=True)
    assert [tuple(slots.shape) for slots in batch["slots"]] == [(4, 32), (4, 112)]
    assert batch["position_ids"][0, : 100 + 20].tolist() == [*range(100), *range(20)]


def norm(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack([gradient.norm() for gradient in gradients.values()]).norm()


def test_a_prepared_model_generates_as_before() -> None:
    """Padding on the left, a cache, one token at a time: attention there is the library's own."""
    plain = network("LlamaConfig")
    model = copy.deepcopy(plain)
    assert prepare(model)
    ids = torch.tensor([[0, 0, 5, 9], [3, 4, 8, 2]])
    mask = (ids > 0).long()
    answers = [m.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False) for m in (plain, model)]
    assert answers[0].tolist() == answers[1].tolist()


def test_what_carries_a_state_along_the_sequence_stays_padded() -> None:
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=16, hidden_size=16, num_hidden_layers=1, state_size=4)
    assert not prepare(transformers.AutoModelForCausalLM.from_config(config))


def test_a_model_that_leaks_between_rows_is_found_out() -> None:
    """Attention that calls the library's function by itself never asks for our layout."""
    model = network("LlamaConfig")
    before = model.config._attn_implementation
    for layer in model.model.layers:
        layer.self_attn.config = copy.deepcopy(model.config)  # keeps `sdpa` whatever the model is told
    assert not prepare(model)
    assert model.config._attn_implementation == before

"""Models: heads, roles, loading, pad tokens, sampling; LoRA and quantised bases are tested with their stages."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

from helpers.tiny_models import DEEPSEEK4
from pipeline.errors import UserError
from pipeline.models.loading import check_context_length, disable_noise, load_causal_lm, new_causal_lm
from pipeline.models.lora import linear_module_names
from pipeline.models.packed import pad
from pipeline.models.precision import cast_frozen_linears_to_bf16
from pipeline.models.reward_model import (
    OFFSET,
    ScoreReader,
    ValueModel,
    check_one_score_head,
    init_head,
    load_scalar_model,
    scalar_head,
    score_ids,
)
from pipeline.models.tokenizers import add_missing_rows, assign_pad
from pipeline.models.trials import enable_packed_attention

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]


@pytest.fixture
def scalar(tiny_lm: Any, tokenizer: Any, tmp_path: Path) -> Any:
    tiny_lm.save_pretrained(tmp_path)
    model = load_scalar_model(str(tmp_path)).eval()
    model.config.pad_token_id = tokenizer.pad_token_id
    return model


def test_the_head_starts_small(scalar: Any) -> None:
    wide = torch.nn.Linear(4096, 1)
    scalar_like = torch.nn.Sequential(wide)
    assert init_head(scalar_like, None, 0) == pytest.approx(1 / math.sqrt(4097))
    assert wide.weight.std().item() == pytest.approx(1 / math.sqrt(4097), rel=0.05)
    init_head(scalar, None, 3)
    first = scalar_head(scalar).weight.clone()
    init_head(scalar, None, 3)
    assert torch.equal(first, scalar_head(scalar).weight), "the seed decides"
    init_head(scalar, 0.0, 3)
    assert scalar_head(scalar).weight.abs().max() == 0


@pytest.mark.parametrize("shares", [2, 3, 7])
def test_shares_of_a_scoring_add_up_to_all_scores(shares: int, scalar: Any, tokenizer: Any) -> None:
    """To the bit, since the passes are the same; each share makes equally many, as a sharded model needs."""
    calls: list[int] = []
    scalar.register_forward_pre_hook(lambda *_: calls.append(0))
    reader = ScoreReader(scalar)
    reader.register_forward_pre_hook(lambda *_: calls.append(1))
    options: dict[str, Any] = {"pad_id": tokenizer.pad_token_id, "tokens_per_batch": 1}
    whole = score_ids(reader, PROMPTS, **options)
    calls.clear()
    parts = []
    for own in range(shares):
        parts.append(score_ids(reader, PROMPTS, **options, share=(own, shares)))
        assert calls.count(1) == (own + 1) * -(-len(PROMPTS) // shares)
    assert torch.equal(torch.stack(parts).sum(0), whole)


def test_scores_are_read_at_the_last_token_whatever_the_batch(scalar: Any, tokenizer: Any) -> None:
    init_head(scalar, 1.0, 0)
    together = score_ids(scalar, PROMPTS, tokenizer.pad_token_id)
    alone = torch.cat([score_ids(scalar, [ids], tokenizer.pad_token_id) for ids in PROMPTS])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        together, score_ids(scalar, PROMPTS, tokenizer.pad_token_id, tokens_per_batch=1), atol=1e-5, rtol=1e-5
    )
    with torch.no_grad():
        plain = scalar(input_ids=torch.tensor([PROMPTS[2]])).logits[0, 0]
    torch.testing.assert_close(together[2], plain, atol=1e-5, rtol=1e-5)
    assert enable_packed_attention(scalar)
    packed = score_ids(scalar, PROMPTS, tokenizer.pad_token_id)
    torch.testing.assert_close(packed, together, atol=1e-5, rtol=1e-5)


def test_a_frozen_model_held_in_bf16_scores_the_same_under_autocast(scalar: Any, tiny_lm: Any, tokenizer: Any) -> None:
    init_head(scalar, 1.0, 0)
    held = copy.deepcopy(scalar)
    cast_frozen_linears_to_bf16(held)
    assert {p.dtype for name, p in held.named_parameters() if "proj" in name} == {torch.bfloat16}
    assert held.get_input_embeddings().weight.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = (score_ids(model, PROMPTS, tokenizer.pad_token_id) for model in (scalar, held))
    assert torch.equal(expected, found)
    causal = copy.deepcopy(tiny_lm)
    tied = causal.lm_head.weight is causal.get_input_embeddings().weight
    cast_frozen_linears_to_bf16(causal)
    assert (causal.lm_head.weight.dtype == torch.float32) == tied, "the embedding would lose its precision"


def test_score_and_value_subtract_the_same_offset(scalar: Any, tokenizer: Any) -> None:
    init_head(scalar, 1.0, 0)
    before = score_ids(scalar, PROMPTS, tokenizer.pad_token_id)
    setattr(scalar.config, OFFSET, 2.5)
    after = score_ids(scalar, PROMPTS, tokenizer.pad_token_id)
    torch.testing.assert_close(after, before - 2.5)
    batch = pad(PROMPTS, tokenizer.pad_token_id)
    with torch.no_grad():
        values = ValueModel(scalar)(batch, batch.starts + torch.tensor([len(ids) - 1 for ids in PROMPTS]))
    torch.testing.assert_close(values, after, atol=1e-5, rtol=1e-5)


def test_an_offset_survives_saving(scalar: Any, tmp_path: Path) -> None:
    setattr(scalar.config, OFFSET, 1.25)
    scalar.save_pretrained(tmp_path / "saved")
    assert getattr(load_scalar_model(str(tmp_path / "saved")).config, OFFSET) == 1.25


def test_only_one_label_is_a_reward(tiny_lm: Any, tmp_path: Path) -> None:
    tiny_lm.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is no reward model"):
        check_one_score_head(str(tmp_path))


# ---------------------------------------------------------------------------------------------- loading


def test_new_models_take_the_tokenizers_ids(tokenizer: Any) -> None:
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    model = new_causal_lm("LlamaConfig", {**sizes, "max_position_embeddings": 64}, tokenizer, 64)
    assert (model.config.vocab_size, model.config.pad_token_id, model.config.eos_token_id) == (
        len(tokenizer),
        tokenizer.pad_token_id,
        tokenizer.eos_token_id,
    )
    with pytest.raises(UserError, match="has no 'hiden_size'; did you mean 'hidden_size'"):
        new_causal_lm("LlamaConfig", {"hiden_size": 16}, tokenizer, 64)
    with pytest.raises(UserError, match="transformers has no 'LamaConfig'"):
        new_causal_lm("LamaConfig", {}, tokenizer, 64)
    with pytest.raises(UserError, match="exceed the model's context of 64"):
        check_context_length(model.config, 65, "block_tokens")


def test_pad_equal_to_eos_is_replaced(tiny_lm: Any, tokenizer: Any) -> None:
    model, changed = copy.deepcopy(tiny_lm), copy.deepcopy(tokenizer)
    assert assign_pad(changed, model) is None
    changed.pad_token = changed.eos_token
    note = assign_pad(changed, model)
    assert note is not None
    assert changed.pad_token_id not in (None, changed.eos_token_id)
    assert model.config.pad_token_id == changed.pad_token_id < model.get_input_embeddings().weight.shape[0]


def test_a_new_pad_that_would_move_positions_or_cannot_be_read_is_refused(tokenizer: Any) -> None:
    """RoBERTa counts positions from its pad; DeepSeek V4's routers hold a table by token ids."""
    changed = copy.deepcopy(tokenizer)
    changed.pad_token = changed.eos_token
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32}
    pads = {"pad_token_id": changed.eos_token_id, "eos_token_id": changed.eos_token_id}
    config = transformers.RobertaConfig(**sizes, **pads, num_hidden_layers=2, is_decoder=True)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match="counts positions from its pad token"):
        assign_pad(copy.deepcopy(changed), model)
    deepseek = AutoModelForCausalLM.from_config(
        transformers.DeepseekV4Config(**{**DEEPSEEK4, "vocab_size": len(tokenizer)})
    )
    changed.add_tokens(["<|new|>"])
    with pytest.raises(UserError, match="cannot read an added token"):
        add_missing_rows(changed, deepseek)


def test_weights_load_in_fp32(tiny_lm: Any, tmp_path: Path) -> None:
    copy.deepcopy(tiny_lm).to(torch.bfloat16).save_pretrained(tmp_path)
    assert {p.dtype for p in load_causal_lm(str(tmp_path)).parameters()} == {torch.float32}
    with pytest.raises(UserError, match="no model can be loaded"):
        load_causal_lm(str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        ("GPT2Config", {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}),
        (
            "LlamaConfig",  # its rate is a plain attribute of the attention, no module
            {
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "attention_dropout": 0.5,
            },
        ),
    ],
)
def test_dropout_is_off_everywhere(tokenizer: Any, config: str, sizes: dict[str, Any]) -> None:
    """Two passes in training mode are bit-equal; before, they differ."""
    model = new_causal_lm(config, sizes, tokenizer, 32).train()
    ids = torch.arange(20)[None]
    assert not torch.equal(model(ids).logits, model(ids).logits)
    disable_noise(model)
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_lora_targets_are_the_linear_layers(tiny_lm: Any) -> None:
    names = linear_module_names(tiny_lm)
    assert "lm_head" not in names
    assert set(names) >= (
        {"q_proj", "down_proj"} if "Llama" in type(tiny_lm).__name__ else {"c_attn", "c_proj", "c_fc"}
    )

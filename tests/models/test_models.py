"""Models: heads, roles, loading, pad tokens, sampling; LoRA and quantised bases are tested with their stages."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

from pipeline.algorithms.logprobs import tempered_logits, token_logprobs
from pipeline.data.collators import right_pad
from pipeline.data.encoding import ChatEncoder
from pipeline.errors import UserError
from pipeline.models import networks as roles
from pipeline.models.loading import disable_noise, load_causal_lm, new_causal_lm, refuse_beyond_context
from pipeline.models.lora import linear_module_names
from pipeline.models.networks import PolicyModel
from pipeline.models.packed import lay_out, prepare
from pipeline.models.precision import cast_frozen_linears_to_bf16
from pipeline.models.reward_model import (
    OFFSET,
    ValueModel,
    init_head,
    load_scalar_model,
    refuse_other_heads,
    scalar_head,
    score_ids,
)
from pipeline.models.tokenizers import assign_pad, forbidden_token_ids
from pipeline.rollout.rollout import generate, greedy_responses, row_uniforms

import pytest
import torch

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
    assert prepare(scalar)
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
    batch = lay_out(PROMPTS, tokenizer.pad_token_id, packed=False)
    batch["positions"] = batch["starts"][:, None] + torch.tensor([[len(ids) - 1] for ids in PROMPTS])
    with torch.no_grad():
        values = ValueModel(scalar)(batch)
    torch.testing.assert_close(values[:, 0], after, atol=1e-5, rtol=1e-5)


def test_an_offset_survives_saving(scalar: Any, tmp_path: Path) -> None:
    setattr(scalar.config, OFFSET, 1.25)
    scalar.save_pretrained(tmp_path / "saved")
    assert getattr(load_scalar_model(str(tmp_path / "saved")).config, OFFSET) == 1.25


def test_only_one_label_is_a_reward(tiny_lm: Any, tmp_path: Path) -> None:
    tiny_lm.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is no reward model"):
        refuse_other_heads(str(tmp_path))


def reference_logprobs(
    model: Any, prompt: list[int], response: list[int], temperature: float, forbidden: list[int]
) -> torch.Tensor:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return token_logprobs(tempered_logits(logits, temperature, torch.tensor(forbidden)), torch.tensor(response))[0]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("chunks", ["one", "kept", "recomputed"])
def test_response_only_logprobs(
    tiny_lm: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, chunks: str, packed: bool
) -> None:
    """Log-probabilities of the response alone equal those of the whole sequence's logits, with their gradients."""
    if chunks == "recomputed":
        monkeypatch.setattr(roles, "LOGITS_BYTES", 4 * len(tokenizer) * 2)
    if chunks == "kept":
        monkeypatch.setattr(roles, "FEWEST_ROWS", 3)
        monkeypatch.setattr(roles, "CACHED_LOGITS", 3 * len(tokenizer))
    model = copy.deepcopy(tiny_lm)
    forbidden = forbidden_token_ids(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    responses = [[20, 21], [22, 23, 24, 25], [26]]
    policy = PolicyModel(model, 0.7, forbidden)
    assert not packed or prepare(model)
    mask = torch.arange(4)[None] < torch.tensor([[2], [4], [1]])
    starts = torch.tensor([[len(p)] for p in PROMPTS])
    batch = lay_out([p + r for p, r in zip(PROMPTS, responses, strict=True)], 1, packed)
    batch["positions"] = batch["starts"][:, None] + starts - 1
    batch["positions"] = batch["positions"] + torch.minimum(torch.arange(4)[None], mask.sum(1, keepdim=True) - 1)
    batch |= {"tokens": right_pad(responses, 0), "mask": mask}
    logprobs, entropy = policy(batch)
    alone, none = policy(batch, with_entropy=False)
    assert torch.equal(alone, logprobs)
    assert none is None
    assert entropy is not None
    for row, (prompt, response) in enumerate(zip(PROMPTS, responses, strict=True)):
        expected = reference_logprobs(model, prompt, response, 0.7, forbidden)
        torch.testing.assert_close(logprobs[row, : len(response)], expected, atol=1e-5, rtol=1e-5)
    assert logprobs[~mask].abs().sum() == entropy[~mask].abs().sum() == 0
    assert (entropy[mask] > 0).all()
    logprobs.sum().backward()
    whole = copy.deepcopy(tiny_lm)
    total = torch.zeros(())
    for prompt, response in zip(PROMPTS, responses, strict=True):
        logits = whole(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        total = (
            total
            + token_logprobs(tempered_logits(logits, 0.7, torch.tensor(forbidden)), torch.tensor(response))[0].sum()
        )
    total.backward()
    for (name, a), b in zip(model.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-4, msg=name)


def test_models_that_bend_their_logits_are_refused(tiny_lm: Any) -> None:
    PolicyModel(tiny_lm, 1.0, []).refuse_transformed_logits()
    bent = copy.deepcopy(tiny_lm)
    forward = bent.forward

    def capped(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.logits = 5 * torch.tanh(out.logits / 5)
        return out

    bent.forward = capped
    with pytest.raises(UserError, match="after the LM head"):
        PolicyModel(bent, 1.0, []).refuse_transformed_logits()


# ---------------------------------------------------------------------------------------------- sampling


def slow_sample(
    model: Any, prompt: list[int], numbers: torch.Tensor, stop: int, forbidden: list[int], limit: int
) -> list[int]:
    """No cache, no batch, no padding: one forward pass of the whole sequence for every token."""
    ids: list[int] = []
    for step in range(limit):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + ids]), use_cache=False).logits[0, -1].double()
        logits[forbidden] = -math.inf
        cumulative = torch.softmax(logits, 0).cumsum(0)
        ids.append(int((cumulative <= numbers[step] * cumulative[-1]).sum()))
        if ids[-1] == stop:
            break
    return ids


def test_sampling_with_cache_and_padding_equals_slow_sampling(tiny_lm: Any, tokenizer: Any) -> None:
    forbidden = forbidden_token_ids(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    uniforms = row_uniforms(3, range(3), 12)
    options: Any = {
        "stop_ids": [tokenizer.eos_token_id, 30],
        "pad_id": tokenizer.pad_token_id,
        "forbidden": forbidden,
        "max_new_tokens": 12,
    }
    found = generate(tiny_lm, PROMPTS, uniforms, **options)
    expected = [
        slow_sample(tiny_lm, p, uniforms[i], tokenizer.eos_token_id, forbidden, 12) for i, p in enumerate(PROMPTS)
    ]
    expected = [ids[: ids.index(30) + 1] if 30 in ids else ids for ids in expected]
    assert found == expected
    backwards = generate(tiny_lm, PROMPTS[::-1], uniforms.flip(0), **options)
    assert backwards[::-1] == found, "a row's sample does not depend on its place in the batch"
    assert not {i for ids in found for i in ids} & set(forbidden)


def test_finished_rows_leave_the_others_alone(tiny_lm: Any, tokenizer: Any) -> None:
    forbidden = forbidden_token_ids(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    uniforms = row_uniforms(4, range(3), 20)
    long = generate(
        tiny_lm,
        PROMPTS,
        uniforms,
        stop_ids=[tokenizer.eos_token_id],
        pad_id=tokenizer.pad_token_id,
        forbidden=forbidden,
        max_new_tokens=20,
    )
    stop = long[1][1]  # stop row 1 after two tokens
    short = generate(
        tiny_lm,
        PROMPTS,
        uniforms,
        stop_ids=[tokenizer.eos_token_id, stop],
        pad_id=tokenizer.pad_token_id,
        forbidden=forbidden,
        max_new_tokens=20,
    )
    for a, b in zip(long, short, strict=True):
        assert b == (a[: a.index(stop) + 1] if stop in a else a)
    assert len(short[1]) <= 2 < len(long[1])


def test_row_uniforms_are_a_function_of_seed_and_row() -> None:
    whole = row_uniforms(1, range(6), 5)
    assert torch.equal(row_uniforms(1, [4, 2], 5), whole[[4, 2]])
    assert not torch.equal(row_uniforms(2, range(6), 5), whole)
    many = row_uniforms(7, range(2000), 4)
    assert many.mean().item() == pytest.approx(0.5, abs=0.01)
    assert many[:, 0].corrcoef().isfinite() if many[:, 0].ndim > 1 else True
    assert many.min() >= 0
    assert many.max() < 1


def test_greedy_decoding_takes_the_likeliest(tiny_lm: Any, tokenizer: Any) -> None:
    forbidden = forbidden_token_ids(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    found = greedy_responses(tiny_lm, ChatEncoder(tokenizer), PROMPTS, 4, rows=2)
    with torch.no_grad():
        logits = tiny_lm(input_ids=torch.tensor([PROMPTS[0]]), use_cache=False).logits[0, -1]
    logits[forbidden] = -math.inf
    assert found[0][0] == int(logits.argmax())


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
        refuse_beyond_context(model.config, 65, "block_tokens")


def test_pad_equal_to_eos_is_replaced(tiny_lm: Any, tokenizer: Any) -> None:
    model, changed = copy.deepcopy(tiny_lm), copy.deepcopy(tokenizer)
    assert assign_pad(changed, model) is None
    changed.pad_token = changed.eos_token
    note = assign_pad(changed, model)
    assert note is not None
    assert changed.pad_token_id not in (None, changed.eos_token_id)
    assert model.config.pad_token_id == changed.pad_token_id < model.get_input_embeddings().weight.shape[0]


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
    """A16: two passes in training mode are bit-equal; before, they differ."""
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

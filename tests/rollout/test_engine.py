"""Sampling: the same as without cache, batch or padding, on every kind of architecture."""

from __future__ import annotations

import math
from typing import Any

from pipeline.data.encoding import ChatEncoder
from pipeline.models.precision import PRETEND
from pipeline.models.tokenizers import forbidden_token_ids
from pipeline.rollout.engine import (
    CachedDecoder,
    LocalEngine,
    SamplingSettings,
    UncachedDecoder,
    WholeBatchDecoder,
    decoder_of,
    generate,
    per_row_uniforms,
)
from pipeline.rollout.greedy import greedy_engine

import pytest
import torch
import transformers

PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12], [13, 14, 15]]


def settings_of(tokenizer: Any, stop_ids: list[int], tokens: int) -> SamplingSettings:
    forbidden = forbidden_token_ids(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    return SamplingSettings(tokens, stop_ids, forbidden, tokenizer.pad_token_id)


def slow_sample(model: Any, prompt: list[int], numbers: torch.Tensor, settings: SamplingSettings) -> list[int]:
    """No cache, no batch, no padding: one forward pass of the whole sequence for every token."""
    ids: list[int] = []
    for step in range(settings.max_new_tokens):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + ids]), use_cache=False).logits[0, -1].double()
        logits[list(settings.forbidden_ids)] = -math.inf
        cumulative = torch.softmax(logits, 0).cumsum(0)
        ids.append(int((cumulative <= numbers[step] * cumulative[-1]).sum()))
        if ids[-1] in settings.stop_ids:
            break
    return ids


def sample(model: Any, prompts: list[list[int]], uniforms: torch.Tensor, settings: SamplingSettings) -> list[list[int]]:
    return [response.ids for response in generate(model, prompts, uniforms, settings)]


def test_sampling_with_cache_and_padding_equals_slow_sampling(tiny_lm: Any, tokenizer: Any) -> None:
    settings = settings_of(tokenizer, [tokenizer.eos_token_id, 30], 12)
    uniforms = per_row_uniforms(3, range(3), 12)
    sampled = sample(tiny_lm, PROMPTS, uniforms, settings)
    assert sampled == [slow_sample(tiny_lm, p, uniforms[i], settings) for i, p in enumerate(PROMPTS)]
    backwards = sample(tiny_lm, PROMPTS[::-1], uniforms.flip(0), settings)
    assert backwards[::-1] == sampled, "a row's sample does not depend on its place in the batch"
    assert not {i for ids in sampled for i in ids} & set(settings.forbidden_ids)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_rows_leave_the_batch_by_the_devices_multiple(
    device: str, tiny_lm: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU computes multiples of eight rows, so it keeps finished ones; what each row samples is the same."""
    prompts = [[5 + i, 9, 10 + i % 3][: 1 + i % 3] for i in range(19)]
    settings, uniforms = settings_of(tokenizer, list(range(300, 340)), 16), per_row_uniforms(5, range(19), 16)
    sizes: list[int] = []
    monkeypatch.setenv(PRETEND, device)
    hook = tiny_lm.register_forward_pre_hook(lambda _, __, kw: sizes.append(len(kw["input_ids"])), with_kwargs=True)
    try:
        sampled = sample(tiny_lm, prompts, uniforms, settings)
    finally:
        hook.remove()
    assert sampled == [slow_sample(tiny_lm, p, uniforms[i], settings) for i, p in enumerate(prompts)]
    lengths = sorted((len(ids) for ids in sampled), reverse=True)
    going = [sum(length > step for length in lengths) for step in range(lengths[0])]
    assert len(set(going)) > 5, "rows end at different steps"
    multiple = {"cpu": 1, "cuda": 8}[device]
    assert sizes == [min(19, -(-rows // multiple) * multiple) for rows in going]


def test_finished_rows_leave_the_others_alone(tiny_lm: Any, tokenizer: Any) -> None:
    uniforms = per_row_uniforms(4, range(3), 20)
    long = sample(tiny_lm, PROMPTS, uniforms, settings_of(tokenizer, [tokenizer.eos_token_id], 20))
    stop = long[1][1]  # stop row 1 after two tokens
    short = sample(tiny_lm, PROMPTS, uniforms, settings_of(tokenizer, [tokenizer.eos_token_id, stop], 20))
    for a, b in zip(long, short, strict=True):
        assert b == (a[: a.index(stop) + 1] if stop in a else a)
    assert len(short[1]) <= 2 < len(long[1])


def test_uniforms_are_a_function_of_seed_and_row() -> None:
    whole = per_row_uniforms(1, range(6), 5)
    assert torch.equal(per_row_uniforms(1, [4, 2], 5), whole[[4, 2]])
    assert not torch.equal(per_row_uniforms(2, range(6), 5), whole)
    many = per_row_uniforms(7, range(2000), 4)
    assert many.mean().item() == pytest.approx(0.5, abs=0.01)
    assert many.min() >= 0
    assert many.max() < 1


def test_greedy_decoding_takes_the_likeliest(tiny_lm: Any, tokenizer: Any) -> None:
    engine = greedy_engine(tiny_lm, ChatEncoder(tokenizer), 4)
    first = engine.sample(tiny_lm, PROMPTS, None)[0].ids[0]
    with torch.no_grad():
        logits = tiny_lm(input_ids=torch.tensor([PROMPTS[0]]), use_cache=False).logits[0, -1]
    logits[list(engine.settings.forbidden_ids)] = -math.inf
    assert first == int(logits.argmax())


SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 16,
}
HYBRIDS: dict[str, tuple[dict[str, Any], type]] = {
    "Qwen3_5TextConfig": (LINEAR, WholeBatchDecoder),
    "Lfm2Config": ({"layer_types": ["conv", "full_attention"]}, WholeBatchDecoder),
    "MistralConfig": ({"sliding_window": 4}, CachedDecoder),
    "GPT2Config": ({}, CachedDecoder),  # absolute positions: they must not count the padding
    "MambaConfig": ({"state_size": 8}, UncachedDecoder),
}


@pytest.mark.parametrize("name", HYBRIDS)
def test_hybrid_and_recurrent_models_sample_as_alone(name: str) -> None:
    """Rows of different length that end at different times: each gets what it gets alone, by the way that was tried."""
    torch.manual_seed(0)
    changes, way = HYBRIDS[name]
    config = getattr(transformers, name)(**{**SIZES, **changes})
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    assert decoder_of(model) is way
    settings = SamplingSettings(6, [2, 30, 31, 32, 33], [0, 1], 0)
    uniforms = per_row_uniforms(5, range(3), 6)
    responses = LocalEngine(settings).sample(model, PROMPTS, uniforms)
    assert [r.ids for r in responses] == [slow_sample(model, p, uniforms[i], settings) for i, p in enumerate(PROMPTS)]

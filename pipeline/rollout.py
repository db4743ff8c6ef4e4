"""Prompts to responses: sampling with a KV cache, and the tensors that PPO trains on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.algorithms.logprobs import sample_tokens, tempered_logits
from pipeline.data.encoding import forbidden_ids

import torch
from torch import Tensor


@dataclass
class Rollout:
    """One rollout of the whole batch, the same in every process; tensors on the CPU.

    prompt_ids, response_ids: lists of token lists, the response through its stop token.
    stopped: (batch,) bool. scores: (batch,) after the missing-EOS rule.
    logprobs, ref_logprobs, values, rewards, advantages, returns: (batch, longest response) fp32.
    response_mask: (batch, longest response) bool.
    """

    prompt_ids: list[list[int]]
    response_ids: list[list[int]]
    stopped: Tensor
    scores: Tensor
    response_mask: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    rewards: Tensor
    advantages: Tensor
    returns: Tensor


def row_uniforms(seed: int, rows: Sequence[int], length: int) -> Tensor:
    """(rows, length) uniform numbers, each row's a function of `seed` and its own number alone.

    So what a row samples depends neither on its batch nor on the number of processes, and needs no RNG state.
    """
    numbers = torch.empty(len(rows), length, dtype=torch.float64)
    for position, row in enumerate(rows):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + row * 7_919 + 12_345) % 2**63)
        numbers[position] = torch.rand(length, generator=generator, dtype=torch.float64)
    return numbers


@torch.no_grad()
def generate(
    model: Any,
    prompt_ids: Sequence[Sequence[int]],
    uniforms: Tensor | None,
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    pad_id: int,
    forbidden: Sequence[int],
    temperature: float = 1.0,
) -> list[list[int]]:
    """Sample (or, without `uniforms`, decode greedily) a response to each prompt, through its first stop token.

    Prompts are left-padded with positions counted from their first real token; finished rows leave the batch.

    Args:
        uniforms: (rows, max_new_tokens) in [0, 1), one number a token.
        forbidden: ids that are never sampled.

    Returns:
        response ids of each prompt: at most `max_new_tokens`, a stop token last if one was sampled.
    """
    device = next(model.parameters()).device
    longest = max(len(ids) for ids in prompt_ids)
    input_ids = torch.tensor([[pad_id] * (longest - len(ids)) + list(ids) for ids in prompt_ids], device=device)
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompt_ids], device=device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    forbidden_tensor = torch.tensor(list(forbidden), dtype=torch.long, device=device)
    stops = torch.tensor(list(stop_ids), device=device)
    alive = torch.arange(len(prompt_ids), device=device)
    numbers = None if uniforms is None else uniforms.to(device)
    responses: list[list[int]] = [[] for _ in prompt_ids]
    cache = None
    for step in range(max_new_tokens):
        out = model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = out.past_key_values
        logits = tempered_logits(out.logits[:, -1], temperature, forbidden_tensor)
        tokens = logits.argmax(-1) if numbers is None else sample_tokens(logits, numbers[alive, step])
        for row, token in zip(alive.tolist(), tokens.tolist(), strict=True):
            responses[row].append(token)
        going = ~torch.isin(tokens, stops)
        if not going.any():
            break
        if not going.all():
            keep = going.nonzero()[:, 0]
            alive, tokens, mask, positions = alive[keep], tokens[keep], mask[keep], positions[keep]
            cache.batch_select_indices(keep)
        input_ids = tokens[:, None]
        mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)
        positions = positions[:, -1:] + 1
    return responses


def greedy_responses(
    model: Any, tokenizer: Any, prompt_ids: Sequence[Sequence[int]], max_new_tokens: int, rows: int = 64
) -> list[list[int]]:
    """The most likely response to each prompt, in batches of `rows`."""
    forbidden = forbidden_ids(tokenizer, model.config.get_text_config().vocab_size)
    responses: list[list[int]] = []
    for start in range(0, len(prompt_ids), rows):
        responses += generate(
            model,
            prompt_ids[start : start + rows],
            None,
            max_new_tokens=max_new_tokens,
            stop_ids=[tokenizer.eos_token_id],
            pad_id=tokenizer.pad_token_id,
            forbidden=forbidden,
        )
    return responses

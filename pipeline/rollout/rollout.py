"""Prompts to responses: sampling with a KV cache, and the tensors that PPO trains on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pipeline.algorithms.kl import k1, k3
from pipeline.algorithms.logprobs import sample_tokens, tempered_logits
from pipeline.algorithms.masking import masked_mean, whiten
from pipeline.algorithms.ppo import compute_gae, shape_rewards, value_mask_of
from pipeline.data.encoding import ChatEncoder
from pipeline.models.tokenizers import forbidden_token_ids, stop_token_ids

import torch
from torch import Tensor


@dataclass
class Rollout:
    """One rollout of the whole batch, the same in every process; tensors on the CPU.

    prompt_ids, response_ids: lists of token lists, the response through its stop token.
    stopped: (batch,) bool. scores: (batch,) as trained: after the missing-EOS rule, scaling and clipping.
    logprobs, ref_logprobs, values, rewards, advantages, returns: (batch, width) fp32; width is the longest response, and
        one more where the score stands after it.
    response_mask, value_mask: (batch, width) bool; where tokens are, and where values and rewards are.
    advantage_mean, advantage_std: of the advantages before whitening.
    """

    prompt_ids: list[list[int]]
    response_ids: list[list[int]]
    stopped: Tensor
    scores: Tensor
    response_mask: Tensor
    value_mask: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    rewards: Tensor
    advantages: Tensor
    returns: Tensor
    advantage_mean: float
    advantage_std: float


@dataclass(frozen=True)
class Shaping:
    """How scores become advantages (see `arguments.PPOArguments`)."""

    kl_coef: float
    kl_estimator: str = "k1"
    score_position: str = "last"
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    gamma: float = 1.0
    gae_lambda: float = 0.95


def response_mask_of(responses: Sequence[Sequence[int]], score_position: str) -> Tensor:
    """(batch, width) bool; one free column where the score stands after the response."""
    lengths = torch.tensor([len(response) for response in responses])
    width = int(lengths.max()) + int(score_position == "after")
    return torch.arange(width)[None] < lengths[:, None]


def assemble(
    prompt_ids: list[list[int]],
    responses: list[list[int]],
    stopped: Tensor,
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    shaping: Shaping,
) -> Rollout:
    """KL-shaped rewards, and advantages over the whole rollout: statistics are those of all its tokens together.

    Args:
        scores: (batch,); logprobs, ref_logprobs, values: (batch, width) of `response_mask_of`.
    """
    mask = response_mask_of(responses, shaping.score_position)
    value_mask = value_mask_of(mask, shaping.score_position)
    in_reward = shaping.kl_coef if shaping.kl_estimator == "k1" else 0.0
    rewards = shape_rewards(scores, logprobs, ref_logprobs, mask, in_reward, shaping.score_position)
    if shaping.whiten_rewards:
        rewards = whiten(rewards, value_mask, shift_mean=False)
    advantages, returns = compute_gae(rewards, values, value_mask, shaping.gamma, shaping.gae_lambda)
    mean = masked_mean(advantages, mask).item()
    std = masked_mean((advantages - mean) ** 2, mask).sqrt().item()
    return Rollout(
        prompt_ids,
        responses,
        stopped,
        scores,
        mask,
        value_mask,
        logprobs,
        ref_logprobs,
        values,
        rewards,
        whiten(advantages, mask) if shaping.whiten_advantages else torch.where(mask, advantages, 0.0),
        returns,
        mean,
        std,
    )


def rollout_figures(rollout: Rollout) -> dict[str, float]:
    """Means over the rollout's responses or tokens (docs/ppo.md); padding counts nowhere."""
    mask, value_mask = rollout.response_mask, rollout.value_mask
    returns, residual = rollout.returns[value_mask], (rollout.returns - rollout.values)[value_mask]
    spread = returns.var(unbiased=False)
    lengths = mask.sum(1).float()

    def a_response(tokens: Tensor) -> float:
        return torch.where(mask, tokens, 0.0).sum(1).mean().item()

    return {
        "reward": torch.where(value_mask, rollout.rewards, 0.0).sum(1).mean().item(),
        "kl": a_response(k1(rollout.logprobs, rollout.ref_logprobs)),
        "kl_k3": a_response(k3(rollout.logprobs, rollout.ref_logprobs)),
        "response_tokens": lengths.mean().item(),
        "stopped": rollout.stopped.float().mean().item(),
        "advantage_mean": rollout.advantage_mean,
        "advantage_std": rollout.advantage_std,
        "value_mean": masked_mean(rollout.values, value_mask).item(),
        "return_mean": returns.mean().item(),
        "value_explained_variance": (1 - residual.var(unbiased=False) / spread).item() if spread > 0 else 0.0,
    }


class Engine(Protocol):
    """What answers prompts. The local one runs the policy itself; another may ask a server that holds its weights."""

    def responses(self, model: Any, prompt_ids: Sequence[Sequence[int]], uniforms: Tensor) -> list[list[int]]:
        """A response to each prompt, through its stop token; `uniforms` (rows, tokens) decide the samples."""
        ...


@dataclass(frozen=True)
class LocalEngine:
    """Samples with transformers and a KV cache in this process."""

    max_new_tokens: int
    stop_ids: Sequence[int]
    pad_id: int
    forbidden: Sequence[int]
    temperature: float = 1.0
    rows: int = 64  # sampled together

    def responses(self, model: Any, prompt_ids: Sequence[Sequence[int]], uniforms: Tensor) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in prompt_ids]
        order = sorted(range(len(prompt_ids)), key=lambda i: len(prompt_ids[i]))  # like lengths together: less padding
        for start in range(0, len(order), self.rows):
            part = order[start : start + self.rows]
            answered = generate(
                model,
                [prompt_ids[i] for i in part],
                uniforms[part],
                max_new_tokens=self.max_new_tokens,
                stop_ids=self.stop_ids,
                pad_id=self.pad_id,
                forbidden=self.forbidden,
                temperature=self.temperature,
            )
            for i, response in zip(part, answered, strict=True):
                found[i] = response
        return found


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
    model: Any, encoder: ChatEncoder, prompt_ids: Sequence[Sequence[int]], max_new_tokens: int, rows: int = 64
) -> list[list[int]]:
    """The most likely response to each prompt, in batches of `rows`."""
    stop_ids = stop_token_ids(encoder, model.generation_config)
    forbidden = forbidden_token_ids(encoder.tokenizer, model.config.get_text_config().vocab_size, stop_ids)
    responses: list[list[int]] = []
    for start in range(0, len(prompt_ids), rows):
        responses += generate(
            model,
            prompt_ids[start : start + rows],
            None,
            max_new_tokens=max_new_tokens,
            stop_ids=stop_ids,
            pad_id=encoder.tokenizer.pad_token_id,
            forbidden=forbidden,
        )
    return responses

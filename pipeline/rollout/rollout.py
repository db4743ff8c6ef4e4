"""A rollout: sampled responses with their scores, log-probabilities, values, rewards and advantages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.algorithms.kl import k1, k3
from pipeline.algorithms.ppo import compute_gae, kl_penalized_rewards, response_positions, whiten

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """One response with its score, log-probabilities and values; tensors on the CPU, one entry per response token.

    prompt: the prompt's position in its batch. ids: through the stop token where one was sampled.
    score: the weighted sum of its parts, before the missing-EOS rule.
    values: one entry more where the score stands after the response; None where they were not computed.
    sampled_logprobs: log-probabilities of the tokens when the engine sampled them.
    """

    prompt: int
    prompt_ids: list[int]
    ids: list[int]
    finished: bool
    score: float
    score_parts: dict[str, float]
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor | None
    sampled_logprobs: Tensor

    @property
    def kl(self) -> float:
        """Log-ratio of policy and reference, summed over the response: nats."""
        return k1(self.logprobs, self.ref_logprobs).double().sum().item()


@dataclass(frozen=True)
class Rollout:
    """Responses to a batch of prompts, ragged: flat tensors of one entry per token, the sequences concatenated.

    The same in every process, on the CPU, in fp32.

    prompt_ids, response_ids: token ids of each sequence, a response through its stop token.
    finished: (sequences,) bool. scores: (sequences,) as trained: after the missing-EOS rule, scaling and clipping.
    lengths: (sequences,) int64 response tokens; value_lengths: the same, plus one where the score stands after the response.
    logprobs, ref_logprobs, advantages: (response_tokens,). values, rewards, returns: (value_tokens,).
    """

    prompt_ids: list[list[int]]
    response_ids: list[list[int]]
    finished: Tensor
    scores: Tensor
    lengths: Tensor
    value_lengths: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    advantages: Tensor
    values: Tensor
    rewards: Tensor
    returns: Tensor

    def __len__(self) -> int:
        return len(self.response_ids)

    def select(self, rows: Sequence[int]) -> Rollout:
        """The sequences `rows`, in that order."""
        by_token = _positions_of(rows, self.lengths)
        by_value = _positions_of(rows, self.value_lengths)
        index = list(rows)
        return Rollout(
            prompt_ids=[self.prompt_ids[i] for i in rows],
            response_ids=[self.response_ids[i] for i in rows],
            **{name: getattr(self, name)[index] for name in ("finished", "scores", "lengths", "value_lengths")},
            **{name: getattr(self, name)[by_token] for name in ("logprobs", "ref_logprobs", "advantages")},
            **{name: getattr(self, name)[by_value] for name in ("values", "rewards", "returns")},
        )

    def to(self, device: torch.device) -> Rollout:
        moved: dict[str, Any] = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **moved)


def _positions_of(rows: Sequence[int], lengths: Tensor) -> Tensor:
    starts = lengths.cumsum(0) - lengths
    return torch.cat([torch.arange(int(starts[row]), int(starts[row] + lengths[row])) for row in rows])


def build_rollout(samples: Sequence[Sample], scores: Tensor, kl_coef: float, args: Any) -> Rollout:
    """Rewards and advantages of sampled responses; statistics are those of all tokens of the rollout together.

    Args:
        scores: (samples,) as they are trained.
        kl_coef: of the penalty inside the reward.
        args: the recipe's `score_position`, `whiten_rewards`, `whiten_advantages`, `gamma` and `gae_lambda`.
    """
    after = args.score_position == "after"
    lengths = torch.tensor([len(sample.ids) for sample in samples])
    logprobs, ref_logprobs = (torch.cat([getattr(s, name) for s in samples]) for name in ("logprobs", "ref_logprobs"))
    values = torch.cat([sample.values for sample in samples if sample.values is not None])
    rewards = kl_penalized_rewards(scores, logprobs, ref_logprobs, lengths, kl_coef, after)
    if args.whiten_rewards:
        rewards = whiten(rewards, shift_mean=False)
    value_lengths = lengths + int(after)
    advantages, returns = compute_gae(rewards, values, value_lengths, args.gamma, args.gae_lambda)
    is_token, _ = response_positions(lengths, after)
    return Rollout(
        prompt_ids=[sample.prompt_ids for sample in samples],
        response_ids=[sample.ids for sample in samples],
        finished=torch.tensor([sample.finished for sample in samples]),
        scores=scores,
        lengths=lengths,
        value_lengths=value_lengths,
        logprobs=logprobs,
        ref_logprobs=ref_logprobs,
        advantages=advantages[is_token],
        values=values,
        rewards=rewards,
        returns=returns,
    )


def whiten_advantages(rollout: Rollout) -> Rollout:
    """The same rollout with advantages of mean 0 and variance 1 over all its tokens."""
    return replace(rollout, advantages=whiten(rollout.advantages))


def rollout_metrics(rollout: Rollout) -> dict[str, float]:
    """Means over the rollout's responses or tokens (docs/ppo-metrics.md)."""
    n = len(rollout)
    residual = rollout.returns - rollout.values
    variance = rollout.returns.var(unbiased=False)
    return {
        "reward": (rollout.rewards.sum() / n).item(),
        "kl": (k1(rollout.logprobs, rollout.ref_logprobs).sum() / n).item(),
        "kl_k3": (k3(rollout.logprobs, rollout.ref_logprobs).sum() / n).item(),
        "response_tokens": rollout.lengths.float().mean().item(),
        "stopped": rollout.finished.float().mean().item(),
        "advantage_mean": rollout.advantages.mean().item(),
        "advantage_std": rollout.advantages.std(unbiased=False).item(),
        "value_mean": rollout.values.mean().item(),
        "return_mean": rollout.returns.mean().item(),
        "value_explained_variance": (1 - residual.var(unbiased=False) / variance).item() if variance > 0 else 0.0,
    }

"""PPO's arithmetic: shaped rewards, advantages and the two clipped losses (Schulman et al. 2017; Ziegler et al. 2019)."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.algorithms.kl import k1

import torch
from torch import Tensor


def missing_eos_scores(scores: Tensor, stopped: Tensor, mode: str, value: float) -> Tensor:
    """Scores after the rule for responses that did not stop (A20).

    Args:
        scores: (batch,) of the truncated responses.
        stopped: (batch,) bool.
        mode: "none"; "replace" by `value` (Z19, N+); "subtract" |`value`| (TRL).
    """
    if mode == "none":
        return scores
    fallback = torch.full_like(scores, value) if mode == "replace" else scores - abs(value)
    return torch.where(stopped, scores, fallback)


@dataclass
class RunningMoments:
    """Count, mean and summed squared deviation of all scores seen (Chan et al. 1979)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def update(self, values: Tensor) -> None:
        """Add `values`, (n,) fp32, n ≥ 1."""
        values = values.double()
        n, mean = len(values), values.mean().item()
        squares = ((values - mean) ** 2).sum().item()
        shift, total = mean - self.mean, self.count + n
        self.squares += squares + shift**2 * self.count * n / total
        self.mean += shift * n / total
        self.count = total

    @property
    def std(self) -> float:
        """Standard deviation (of a sample); 1 while there is none."""
        variance = self.squares / (self.count - 1) if self.count > 1 else 0.0
        return variance**0.5 if variance > 0 else 1.0


def value_mask_of(response_mask: Tensor, score_position: str) -> Tensor:
    """Where rewards and values stand: the response's tokens, and for "after" the position that follows them (A23).

    Args:
        response_mask: (batch, width) bool, a prefix of each row; for "after", the last column is free.
    """
    if score_position == "last":
        return response_mask
    after = torch.zeros_like(response_mask)
    return response_mask | after.scatter(1, response_mask.sum(1, keepdim=True), True)


def shape_rewards(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    response_mask: Tensor,
    kl_coef: float,
    score_position: str = "last",
) -> Tensor:
    """Per-token rewards: -kl_coef · log(π/π_ref) at every token, the score once (I22, eq. 2; Z19; A21, A23).

    Args:
        scores: (batch,)
        logprobs, ref_logprobs: (batch, width) under the policy that sampled, and the reference.
        response_mask: (batch, width) bool, True through the stop token; a prefix of each row, never empty.
        score_position: "last" response token (Z19), or the position "after" it (N+), which must be there.

    Returns:
        rewards: (batch, width), 0 elsewhere; each row sums to score - kl_coef · Σ k1.
    """
    penalty = -kl_coef * k1(logprobs, ref_logprobs)
    rewards = torch.where(response_mask, penalty, torch.zeros_like(penalty))
    position = response_mask.sum(dim=1) - int(score_position == "last")
    return rewards.scatter_add(1, position[:, None], scores[:, None].to(rewards.dtype))


def compute_gae(
    rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation over response tokens (Schulman et al. 2016, eq. 16).

    Nothing is bootstrapped: the value after the last real token is 0, whether the response stopped or hit the length
    cap. Inputs are not modified.

    Args:
        rewards: (batch, response_len), KL-shaped, in reward-model units.
        values: (batch, response_len), predicted before emitting token t; same units.
        response_mask: (batch, response_len) bool, True through EOS; a prefix of each row.
        gamma: discount per token, in [0, 1].
        gae_lambda: in [0, 1]; 1.0 gives Monte Carlo return minus value.

    Returns:
        advantages, returns: (batch, response_len) each; unwhitened, 0 where masked.
    """
    zero = torch.zeros_like(values)
    values = torch.where(response_mask, values, zero)
    rewards = torch.where(response_mask, rewards, zero)
    advantages = torch.zeros_like(values)
    running = torch.zeros_like(values[:, 0])
    next_values = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_values - values[:, t]
        running = torch.where(response_mask[:, t], delta + gamma * gae_lambda * running, 0.0)
        advantages[:, t] = running
        next_values = values[:, t]
    return advantages, torch.where(response_mask, advantages + values, zero)


def policy_losses(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_range: float
) -> tuple[Tensor, Tensor]:
    """Clipped surrogate of each token (Schulman et al. 2017, eq. 7), to be minimised.

    Args:
        logprobs: new, with gradient; old_logprobs, advantages: constants; all of one shape.

    Returns:
        losses: same shape; masking and averaging are the caller's.
        clipped: bool, where the clipped branch is the active one (its gradient is 0).
    """
    ratio = torch.exp(logprobs - old_logprobs)
    unclipped = -advantages * ratio
    limited = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(unclipped, limited), limited > unclipped


def value_losses(values: Tensor, old_values: Tensor, returns: Tensor, value_clip_range: float) -> tuple[Tensor, Tensor]:
    """Half the squared error of each token, clipped around the old value (OpenAI baselines; Z19).

    Returns:
        losses: same shape as `values`, with gradient.
        clipped: bool, where the clipped branch is the active one.
    """
    near = old_values + (values - old_values).clamp(-value_clip_range, value_clip_range)
    plain, limited = (values - returns) ** 2, (near - returns) ** 2
    return 0.5 * torch.maximum(plain, limited), limited > plain

"""PPO's arithmetic: KL-penalised rewards, advantages and the two clipped losses.

Schulman et al. 2017 (PPO); Schulman et al. 2016 (GAE); Ziegler et al. 2019. Tensors are flat: one entry per token, the
sequences concatenated, with their lengths beside them.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.algorithms.kl import k1

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

MAX_LOG_RATIO = 20.0  # a larger ratio only shows that the run has diverged; e^89 overflows fp32


def missing_eos_scores(scores: Tensor, finished: Tensor, mode: str, value: float) -> Tensor:
    """Scores after the rule for responses that did not end.

    Args:
        scores: (sequences,).
        finished: (sequences,) bool, where a stop token was sampled.
        mode: "none"; "replace" by `value` (Ziegler et al. 2019; Huang et al. 2024); "subtract" |`value`| (TRL).
    """
    if mode == "none":
        return scores
    fallback = torch.full_like(scores, value) if mode == "replace" else scores - abs(value)
    return torch.where(finished, scores, fallback)


@dataclass
class RunningMoments:
    """Count, mean and summed squared deviation of all scores so far (Chan et al. 1979)."""

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


def response_positions(lengths: Tensor, score_after_response: bool) -> tuple[Tensor, Tensor]:
    """Where rewards and values stand: at each response token, and at one more position per response where the score follows it.

    Args:
        lengths: (sequences,) int64, tokens of each response, each ≥ 1.

    Returns:
        is_token: (value_tokens,) bool, False at the positions after the responses.
        last: (sequences,) index of the position that gets each response's score.
    """
    last = (lengths + int(score_after_response)).cumsum(0) - 1
    is_token = torch.ones(int(last[-1]) + 1, dtype=torch.bool, device=lengths.device)
    if score_after_response:
        is_token[last] = False
    return is_token, last


def kl_penalized_rewards(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    lengths: Tensor,
    kl_coef: float,
    score_after_response: bool = False,
) -> Tensor:
    """Per-token rewards: -kl_coef · log(π/π_ref) at every token, and the score once (InstructGPT, equation 2).

    The score stands at the last response token (Ziegler et al. 2019), or at the position after it, where the reward model
    reads (Huang et al. 2024).

    Args:
        scores: (sequences,).
        logprobs, ref_logprobs: (response_tokens,) under the policy that sampled, and under the reference.
        lengths: (sequences,) int64, response tokens of each sequence.

    Returns:
        (value_tokens,); a sequence's entries sum to score - kl_coef · Σ k1.
    """
    is_token, last = response_positions(lengths, score_after_response)
    rewards = torch.zeros(len(is_token), dtype=logprobs.dtype)
    rewards[is_token] = -kl_coef * k1(logprobs, ref_logprobs)
    rewards[last] += scores.to(rewards.dtype)
    return rewards


def compute_gae(
    rewards: Tensor, values: Tensor, lengths: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (Schulman et al. 2016, equation 16).

    Nothing is bootstrapped: the value after a sequence's last entry is 0, whether the response ended or hit the length limit.
    Inputs are not modified.

    Args:
        rewards, values: (value_tokens,), in the reward's units; values as predicted before each token was sampled.
        lengths: (sequences,) int64, entries of each sequence.
        gamma: discount per token, in [0, 1].
        gae_lambda: in [0, 1]; 1.0 gives Monte Carlo return minus value.

    Returns:
        advantages, returns: (value_tokens,) each; advantages are not whitened.
    """
    padded_rewards, padded_values = (
        pad_sequence(x.split(lengths.tolist()), batch_first=True) for x in (rewards, values)
    )
    mask = torch.arange(padded_values.shape[1])[None] < lengths[:, None]  # (sequences, longest)
    padded_advantages = torch.zeros_like(padded_values)
    running = next_values = torch.zeros_like(padded_values[:, 0])
    for t in reversed(range(padded_values.shape[1])):
        delta = padded_rewards[:, t] + gamma * next_values - padded_values[:, t]
        running = torch.where(mask[:, t], delta + gamma * gae_lambda * running, 0.0)
        padded_advantages[:, t] = running
        next_values = padded_values[:, t]
    advantages = padded_advantages[mask]
    return advantages, advantages + values


def whiten(values: Tensor, shift_mean: bool = True) -> Tensor:
    """Scale `values` (n,) to variance 1, and to mean 0 unless `shift_mean` is False (Ziegler et al. 2019, code).

    Statistics are those of all entries together: give the whole rollout, not one process's part.
    """
    mean = values.mean()
    variance = ((values - mean) ** 2).mean()
    white = (values - mean) * torch.rsqrt(variance + 1e-8)
    return white if shift_mean else white + mean


def clipped_policy_losses(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_range: float
) -> tuple[Tensor, Tensor]:
    """Clipped surrogate of each token (Schulman et al. 2017, equation 7), to be minimised.

    Args:
        logprobs: new, with gradient; old_logprobs, advantages: constants; all of one shape.

    Returns:
        losses: same shape; averaging is the caller's.
        clipped: bool, where the clipped branch is the active one (its gradient is 0).
    """
    ratio = torch.exp((logprobs - old_logprobs).clamp(max=MAX_LOG_RATIO))
    unclipped = -advantages * ratio
    limited = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(unclipped, limited), limited > unclipped


def clipped_value_losses(
    values: Tensor, old_values: Tensor, returns: Tensor, value_clip_range: float
) -> tuple[Tensor, Tensor]:
    """Half the squared error of each token, clipped around the old value (OpenAI baselines; Ziegler et al. 2019).

    Returns:
        losses: same shape as `values`, with gradient.
        clipped: bool, where the clipped branch is the active one.
    """
    near = old_values + (values - old_values).clamp(-value_clip_range, value_clip_range)
    plain, limited = (values - returns) ** 2, (near - returns) ** 2
    return 0.5 * torch.maximum(plain, limited), limited > plain

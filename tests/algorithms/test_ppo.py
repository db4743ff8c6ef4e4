"""PPO's arithmetic against numbers worked out by hand and against slow, obvious code."""

from __future__ import annotations

import math

from pipeline.algorithms.kl import k1, k3
from pipeline.algorithms.ppo import (
    RunningMoments,
    clipped_policy_losses,
    clipped_value_losses,
    compute_gae,
    kl_penalized_rewards,
    missing_eos_scores,
    response_positions,
    whiten,
)

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st


def ragged(lengths: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random rewards and values (tokens,), and lengths (sequences,)."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values = (torch.randn(sum(lengths), generator=generator, dtype=torch.float64) for _ in range(2))
    return rewards, values, torch.tensor(lengths)


def slow_advantages(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """GAE by its definition: Σ (γλ)^l δ_{t+l}, with value 0 after the end."""
    n = len(rewards)
    delta = [rewards[t] + gamma * (values[t + 1] if t + 1 < n else 0.0) - values[t] for t in range(n)]
    return [sum((gamma * lam) ** i * delta[t + i] for i in range(n - t)) for t in range(n)]


def test_gae_of_three_tokens_by_hand() -> None:
    rewards = torch.tensor([0.0, 0.0, 1.0])
    values = torch.tensor([0.5, 0.25, 0.5])
    advantages, returns = compute_gae(rewards, values, torch.tensor([3]), 1.0, 0.5)
    # δ = (-0.25, 0.25, 0.5); A2 = 0.5, A1 = 0.25 + 0.25, A0 = -0.25 + 0.25
    assert advantages.tolist() == [0.0, 0.5, 0.5]
    assert returns.tolist() == [0.5, 0.75, 1.0]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.floats(0, 1), st.floats(0, 1), st.integers(0, 1000))
def test_gae_equals_its_definition(lengths: list[int], gamma: float, lam: float, seed: int) -> None:
    rewards, values, counts = ragged(lengths, seed)
    advantages, returns = compute_gae(rewards, values, counts, gamma, lam)
    for part_of_rewards, part_of_values, found in zip(
        rewards.split(lengths), values.split(lengths), advantages.split(lengths), strict=True
    ):
        expected = slow_advantages(part_of_rewards.tolist(), part_of_values.tolist(), gamma, lam)
        assert found.tolist() == pytest.approx(expected, abs=1e-9)
    assert torch.equal(returns, advantages + values)


def test_gae_of_one_sequence_does_not_depend_on_the_others() -> None:
    rewards, values, lengths = ragged([3, 5])
    both, _ = compute_gae(rewards, values, lengths, 0.9, 0.8)
    rewards[3:], values[3:] = 1e30, -1e30
    first, _ = compute_gae(rewards, values, lengths, 0.9, 0.8)
    assert torch.equal(both[:3], first[:3])
    assert rewards[3].item() == 1e30, "inputs are not modified"


def test_lambda_one_is_monte_carlo() -> None:
    rewards, values, lengths = ragged([4])
    advantages, returns = compute_gae(rewards, values, lengths, 1.0, 1.0)
    to_go = rewards.flip(0).cumsum(0).flip(0)
    torch.testing.assert_close(returns, to_go)
    torch.testing.assert_close(advantages, to_go - values)


@pytest.mark.parametrize("after", [False, True])
def test_rewards_sum_to_score_minus_penalty(after: bool) -> None:
    """The score stands once: at the last response token, or at the position after it, also for the longest response."""
    torch.manual_seed(1)
    lengths = torch.tensor([2, 6, 1])
    logprobs, ref_logprobs, scores = torch.randn(9), torch.randn(9), torch.tensor([1.0, -2.0, 0.5])
    rewards = kl_penalized_rewards(scores, logprobs, ref_logprobs, lengths, 0.1, after)
    assert len(rewards) == 9 + 3 * after
    sums = torch.stack([part.sum() for part in rewards.split((lengths + int(after)).tolist())])
    kl = torch.stack([part.sum() for part in (logprobs - ref_logprobs).split(lengths.tolist())])
    torch.testing.assert_close(sums, scores - 0.1 * kl)
    without = kl_penalized_rewards(torch.zeros(3), logprobs, ref_logprobs, lengths, 0.1, after)
    is_token, last = response_positions(lengths, after)
    assert (rewards - without).nonzero()[:, 0].tolist() == last.tolist() == ([2, 9, 11] if after else [1, 7, 8])
    torch.testing.assert_close(without[is_token], -0.1 * (logprobs - ref_logprobs))
    assert not without[~is_token].any()


def test_whitening() -> None:
    torch.manual_seed(0)
    values = 5 + 3 * torch.randn(140)
    white = whiten(values)
    assert white.mean().item() == pytest.approx(0, abs=1e-5)
    assert (white**2).mean().item() == pytest.approx(1, abs=1e-4)
    assert whiten(values, shift_mean=False).mean().item() == pytest.approx(values.mean().item(), abs=1e-4)
    assert whiten(torch.full((4,), 3.0)).abs().max() == 0


def test_running_moments_are_those_of_everything_seen() -> None:
    torch.manual_seed(0)
    values, moments = 3 + 2 * torch.randn(100), RunningMoments()
    assert moments.std == 1.0
    for part in values.split([1, 9, 40, 50]):
        moments.update(part)
    assert (moments.count, moments.mean) == (100, pytest.approx(values.mean().item(), rel=1e-6))
    assert moments.std == pytest.approx(values.std().item(), rel=1e-6)


def test_a_ratio_beyond_all_bounds_stays_finite() -> None:
    logprobs = torch.tensor([200.0, -200.0], requires_grad=True)
    losses, _ = clipped_policy_losses(logprobs, torch.zeros(2), torch.tensor([-1.0, -1.0]), 0.2)
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert torch.isfinite(logprobs.grad).all()


def test_missing_eos() -> None:
    scores, stopped = torch.tensor([2.0, 3.0]), torch.tensor([True, False])
    assert missing_eos_scores(scores, stopped, "none", -1.0).tolist() == [2.0, 3.0]
    assert missing_eos_scores(scores, stopped, "replace", -1.0).tolist() == [2.0, -1.0]
    assert missing_eos_scores(scores, stopped, "subtract", 1.0).tolist() == [2.0, 2.0]
    assert missing_eos_scores(scores, stopped, "subtract", -1.0).tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.5, 2.0, -2.4, 0.0),  # beyond 1.2 there is nothing to gain
        (0.5, 2.0, -1.0, -1.0),  # below, the way back stays open
        (0.5, -2.0, 1.6, 0.0),
        (1.5, -2.0, 3.0, 3.0),
    ],
)
def test_clipped_policy_loss(ratio: float, advantage: float, loss: float, gradient: float) -> None:
    logprobs = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    losses, clipped = clipped_policy_losses(
        logprobs, torch.zeros(1, dtype=torch.float64), torch.tensor([advantage]).double(), 0.2
    )
    losses.sum().backward()
    assert losses.item() == pytest.approx(loss)
    assert logprobs.grad.item() == pytest.approx(gradient)
    assert clipped.item() == (gradient == 0.0)


def test_on_policy_gradient_is_reinforce() -> None:
    """At ratio 1 the clipped loss has the gradient of -A log π."""
    torch.manual_seed(0)
    logprobs, advantages = torch.randn(7, requires_grad=True), torch.randn(7)
    clipped_policy_losses(logprobs, logprobs.detach(), advantages, 0.2)[0].sum().backward()
    torch.testing.assert_close(logprobs.grad, -advantages)


def test_clipped_value_loss_by_hand() -> None:
    values = torch.tensor([1.0, 0.1, 1.0], requires_grad=True)
    losses, clipped = clipped_value_losses(values, torch.zeros(3), torch.tensor([2.0, 2.0, 0.0]), 0.2)
    # Towards the return but beyond the clip: (0.2 - 2)² is larger than (1 - 2)², so its zero gradient wins.
    assert losses.tolist() == pytest.approx([0.5 * 1.8**2, 0.5 * 1.9**2, 0.5 * 1.0])
    assert clipped.tolist() == [True, False, False]
    losses.sum().backward()
    assert values.grad.tolist() == pytest.approx([0.0, -1.9, 1.0])


def test_kl_estimators_are_right_on_average() -> None:
    """Over samples of π, the means of k1 and k3 are KL(π‖ref); k3 is never negative."""
    generator = torch.Generator().manual_seed(0)
    p, q = torch.tensor([0.7, 0.2, 0.1]).double(), torch.tensor([0.4, 0.4, 0.2]).double()
    exact = (p * (p / q).log()).sum().item()
    drawn = torch.multinomial(p, 200_000, replacement=True, generator=generator)
    first, third = k1(p.log()[drawn], q.log()[drawn]), k3(p.log()[drawn], q.log()[drawn])
    assert first.mean().item() == pytest.approx(exact, abs=0.01)
    assert third.mean().item() == pytest.approx(exact, abs=0.01)
    assert third.min() >= 0
    assert third.var() < first.var()

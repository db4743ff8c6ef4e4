"""PPO's arithmetic against numbers worked out by hand and against slow, obvious code."""

from __future__ import annotations

import math

from pipeline.algorithms.kl import k1, k3
from pipeline.algorithms.ppo import compute_gae, missing_eos_scores, policy_losses, shape_rewards, value_losses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st


def batch(lengths: list[int], width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    rewards, values = (torch.randn(len(lengths), width, generator=generator, dtype=torch.float64) for _ in range(2))
    return rewards, values, mask


def slow_advantages(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """GAE by its definition: Σ (γλ)^l δ_{t+l}, with value 0 after the end."""
    n = len(rewards)
    delta = [rewards[t] + gamma * (values[t + 1] if t + 1 < n else 0.0) - values[t] for t in range(n)]
    return [sum((gamma * lam) ** i * delta[t + i] for i in range(n - t)) for t in range(n)]


def test_gae_of_three_tokens_by_hand() -> None:
    rewards = torch.tensor([[0.0, 0.0, 1.0]])
    values = torch.tensor([[0.5, 0.25, 0.5]])
    advantages, returns = compute_gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), 1.0, 0.5)
    # δ = (-0.25, 0.25, 0.5); A2 = 0.5, A1 = 0.25 + 0.25, A0 = -0.25 + 0.25
    assert advantages.tolist() == [[0.0, 0.5, 0.5]]
    assert returns.tolist() == [[0.5, 0.75, 1.0]]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.floats(0, 1), st.floats(0, 1), st.integers(0, 1000))
def test_gae_equals_its_definition(lengths: list[int], gamma: float, lam: float, seed: int) -> None:
    rewards, values, mask = batch(lengths, 9, seed)
    advantages, returns = compute_gae(rewards, values, mask, gamma, lam)
    for row, n in enumerate(lengths):
        expected = slow_advantages(rewards[row, :n].tolist(), values[row, :n].tolist(), gamma, lam)
        assert advantages[row, :n].tolist() == pytest.approx(expected, abs=1e-9)
        assert advantages[row, n:].tolist() == returns[row, n:].tolist() == [0.0] * (9 - n)
    assert torch.equal(returns[mask], (advantages + values)[mask])


def test_gae_does_not_see_padding() -> None:
    rewards, values, mask = batch([3, 5], 5)
    expected = compute_gae(rewards, values, mask, 0.9, 0.8)
    rewards[0, 3:], values[0, 3:] = math.nan, 1e30
    found = compute_gae(rewards, values, mask, 0.9, 0.8)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert math.isnan(rewards[0, 3].item()), "inputs are not modified"


def test_lambda_one_is_monte_carlo() -> None:
    rewards, values, mask = batch([4], 4)
    advantages, returns = compute_gae(rewards, values, mask, 1.0, 1.0)
    to_go = rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(returns, to_go)
    torch.testing.assert_close(advantages, to_go - values)


def test_rewards_sum_to_score_minus_penalty() -> None:
    torch.manual_seed(1)
    mask = torch.arange(6)[None] < torch.tensor([2, 6, 1])[:, None]
    logprobs, ref_logprobs, scores = torch.randn(3, 6), torch.randn(3, 6), torch.tensor([1.0, -2.0, 0.5])
    rewards = shape_rewards(scores, logprobs, ref_logprobs, mask, 0.1)
    penalty = 0.1 * torch.where(mask, logprobs - ref_logprobs, 0).sum(1)
    torch.testing.assert_close(rewards.sum(1), scores - penalty)
    assert rewards[0, 2:].abs().sum() == 0
    # The score stands at the last token that counts, nowhere else.
    difference = rewards - shape_rewards(torch.zeros(3), logprobs, ref_logprobs, mask, 0.1)
    assert [row.nonzero()[0, 0].item() for row in difference] == [1, 5, 0]


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
    losses, clipped = policy_losses(
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
    policy_losses(logprobs, logprobs.detach(), advantages, 0.2)[0].sum().backward()
    torch.testing.assert_close(logprobs.grad, -advantages)


def test_clipped_value_loss_by_hand() -> None:
    values = torch.tensor([1.0, 0.1, 1.0], requires_grad=True)
    losses, clipped = value_losses(values, torch.zeros(3), torch.tensor([2.0, 2.0, 0.0]), 0.2)
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

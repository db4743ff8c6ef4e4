"""Log-probabilities, sampling, the preference loss and schedules, by known answers."""

from __future__ import annotations

import math

from pipeline.algorithms.logprobs import sample_tokens, tempered_logits, token_logprobs
from pipeline.algorithms.preference import pair_losses, ranking_loss
from pipeline.algorithms.schedules import lr_factor

import pytest
import torch


def test_logprobs_are_those_of_the_sampled_distribution() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0, 0.0]]).bfloat16()
    tempered = tempered_logits(logits, 0.5, torch.tensor([3]))
    logprobs, entropy = token_logprobs(tempered, torch.tensor([1]))
    expected = torch.softmax(torch.tensor([2.0, 4.0, 6.0]), 0)
    assert logprobs.item() == pytest.approx(math.log(expected[1]), abs=1e-6)
    assert entropy.item() == pytest.approx(-(expected * expected.log()).sum().item(), abs=1e-6)
    assert tempered.dtype == torch.float32


def test_sampling_inverts_the_distribution() -> None:
    probabilities = torch.tensor([0.2, 0.0, 0.5, 0.3])
    logits = probabilities.log().expand(100_000, 4)
    uniforms = torch.rand(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts = torch.bincount(sample_tokens(logits, uniforms), minlength=4) / 100_000
    torch.testing.assert_close(counts, probabilities, atol=0.005, rtol=0)
    assert counts[1] == 0, "a token without probability is never drawn"
    edges = sample_tokens(probabilities.log().expand(3, 4), torch.tensor([0.0, 0.2, 1 - 1e-16], dtype=torch.float64))
    assert edges.tolist() == [0, 2, 3]


def test_sampling_of_a_row_depends_on_its_own_number_alone() -> None:
    torch.manual_seed(0)
    logits, uniforms = torch.randn(8, 30), torch.rand(8, dtype=torch.float64)
    together = sample_tokens(logits, uniforms)
    alone = torch.cat([sample_tokens(logits[i : i + 1], uniforms[i : i + 1]) for i in range(8)])
    assert torch.equal(together, alone)


def test_pair_loss() -> None:
    assert pair_losses(torch.zeros(1), torch.ones(1)).item() == pytest.approx(math.log(2))
    assert pair_losses(torch.zeros(1), torch.full((1,), 0.5)).item() == pytest.approx(math.log(2))
    assert pair_losses(torch.tensor([2.0]), torch.ones(1)).item() == pytest.approx(math.log(1 + math.exp(-2)))
    far = pair_losses(torch.tensor([-1e4, 1e4]), torch.ones(2))
    assert far.tolist() == [1e4, 0.0]
    assert torch.isfinite(far).all()
    # A tie is least costly where the scores are equal.
    differences = torch.tensor([-1.0, 0.0, 1.0])
    assert pair_losses(differences, torch.full((3,), 0.5)).argmin() == 1


@pytest.mark.parametrize("threshold", [0.01, 0.5, 3.0])
def test_a_tie_model_shares_out_all_probability(threshold: float) -> None:
    """Rao and Kupper: preferred, tied, the other preferred: their probabilities sum to 1 at every difference."""
    difference = torch.linspace(-30, 30, 61, dtype=torch.float64)
    one = torch.ones_like(difference)
    tie = one.bool()
    won = (-pair_losses(difference, one, ~tie, threshold)).exp()
    lost = (-pair_losses(-difference, one, ~tie, threshold)).exp()
    tied = (-pair_losses(difference, one / 2, tie, threshold)).exp()
    assert torch.allclose(won + lost + tied, one, atol=1e-12)
    assert tied.argmax() == 30
    far = pair_losses(torch.tensor([1e4]), torch.ones(1) / 2, torch.tensor([True]), threshold)
    assert torch.isfinite(far).all()
    # Equal scores describe a tie best: nothing pulls them apart.
    score = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    pair_losses(score, torch.ones(1) / 2, torch.tensor([True]), threshold).backward()
    assert score.grad is not None
    assert score.grad.item() == pytest.approx(0.0, abs=1e-12)


def test_ranking_loss_weighs_prompts_alike() -> None:
    """One prompt with one pair and one with three: mean over prompts of the mean over pairs (InstructGPT, section 3.5)."""
    scores = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.0])
    better, worse = torch.tensor([0, 2, 2, 3]), torch.tensor([1, 3, 4, 4])
    weight = torch.tensor([1.0, 1 / 3, 1 / 3, 1 / 3])
    found = ranking_loss(scores, better, worse, torch.ones(4), torch.zeros(4), weight, torch.tensor(2))
    pair = [math.log(1 + math.exp(-d)) for d in (1, 1, 2, 1)]
    assert found.item() == pytest.approx((pair[0] + sum(pair[1:]) / 3) / 2, rel=1e-6)
    with_margin = ranking_loss(scores, better, worse, torch.ones(4), torch.full((4,), 0.5), weight, torch.tensor(2))
    assert with_margin > found


def test_schedules() -> None:
    assert [lr_factor(s, 4, "linear") for s in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert [lr_factor(s, 10, "constant", warmup=4) for s in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert lr_factor(0, 10, "cosine", floor=0.1) == 1.0
    assert lr_factor(10, 10, "cosine", floor=0.1) == pytest.approx(0.1)
    assert lr_factor(5, 10, "cosine") == pytest.approx(0.5)
    with pytest.raises(ValueError, match="unknown schedule"):
        lr_factor(1, 10, "sine")

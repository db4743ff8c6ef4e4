"""Losses of the reward model."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def pair_losses(difference: Tensor, target: Tensor, tie: Tensor | None = None, tie_margin: float = 0.0) -> Tensor:
    """Cross-entropy of a pair under Bradley–Terry: P(better preferred) = sigmoid(difference).

    With target 1 this is -log sigmoid(difference) (InstructGPT, equation 1). 0.5 is an even preference; values in between
    are soft labels.

    With a tie margin t > 0 the model is Rao and Kupper's (1967): P(preferred) = sigmoid(difference - t), either way
    round, and what is left of 1 is the probability of a tie, which is then an event of its own.

    Args:
        difference: (pairs,) score of the better response minus the worse's, margin already taken off.
        target: (pairs,) in [0, 1].
        tie: (pairs,) bool; only read with a tie margin.
        tie_margin: nats, >= 0.

    Returns:
        (pairs,), nats, finite for any finite difference.
    """
    better, worse = F.logsigmoid(difference - tie_margin), F.logsigmoid(-difference - tie_margin)
    losses = -(target * better + (1 - target) * worse)
    if tie is None or tie_margin == 0:
        return losses
    # P(tie) = 1 - σ(d - t) - σ(-d - t) = σ(t + d) σ(t - d) (1 - exp(-2t)): no digits are lost where it is small.
    room = math.log(-math.expm1(-2 * tie_margin))
    tied = -(F.logsigmoid(tie_margin + difference) + F.logsigmoid(tie_margin - difference) + room)
    return torch.where(tie, tied, losses)


def ranking_loss(
    scores: Tensor,
    better: Tensor,
    worse: Tensor,
    target: Tensor,
    margin: Tensor,
    pair_weight: Tensor,
    prompts: Tensor,
    tie: Tensor | None = None,
    tie_margin: float = 0.0,
) -> Tensor:
    """Mean over prompts of the mean over each prompt's pairs (InstructGPT, section 3.5).

    Args:
        scores: (responses,) of all prompts of the batch.
        better, worse: (pairs,) int64 rows of `scores`.
        target, margin, pair_weight: (pairs,); pair_weight is the labeler's weight / pairs of the same prompt.
        prompts: () number of prompts.
        tie, tie_margin: see `pair_losses`.
    """
    difference = scores[better] - scores[worse] - margin
    return (pair_losses(difference, target, tie, tie_margin) * pair_weight).sum() / prompts.clamp(min=1)

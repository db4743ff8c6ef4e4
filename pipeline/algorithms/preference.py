"""Losses of the reward model."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def pair_losses(difference: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of a pair under Bradley–Terry: P(better preferred) = sigmoid(difference).

    With target 1 this is -log sigmoid(difference) (I22, eq. 1); target 0.5 is a tie.

    Args:
        difference: (pairs,) score of the better response minus the worse's, margin already taken off.
        target: (pairs,) in [0, 1].

    Returns:
        (pairs,), nats, finite for any finite difference.
    """
    return -(target * F.logsigmoid(difference) + (1 - target) * F.logsigmoid(-difference))


def ranking_loss(
    scores: Tensor, better: Tensor, worse: Tensor, target: Tensor, margin: Tensor, pair_weight: Tensor, prompts: Tensor
) -> Tensor:
    """Mean over prompts of the mean over each prompt's pairs (I22, section 3.5).

    Args:
        scores: (responses,) of all prompts of the batch.
        better, worse: (pairs,) int64 rows of `scores`.
        target, margin, pair_weight: (pairs,); pair_weight is 1 / pairs of the same prompt.
        prompts: () number of prompts.
    """
    difference = scores[better] - scores[worse] - margin
    return (pair_losses(difference, target) * pair_weight).sum() / prompts.clamp(min=1)

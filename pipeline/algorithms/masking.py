"""Statistics over the tokens that count."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of `values` where `mask` (bool, same shape) is True; garbage elsewhere, even NaN, does not count."""
    return torch.where(mask, values, torch.zeros_like(values)).sum()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` where `mask` is True; 0 if it is True nowhere."""
    return masked_sum(values, mask) / mask.sum().clamp(min=1)


def whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Scale masked `values` to variance 1, and to mean 0 unless `shift_mean` is False (Ziegler et al. 2019, code).

    The statistics are those of all masked entries together: give the whole batch, not one process's part.

    Returns:
        same shape; 0 where masked out.
    """
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean) ** 2, mask)
    white = (values - mean) * torch.rsqrt(variance + 1e-8)
    if not shift_mean:
        white = white + mean
    return torch.where(mask, white, torch.zeros_like(white))

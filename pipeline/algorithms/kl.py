"""KL from the reference: estimators and the per-token penalty."""

from __future__ import annotations

from torch import Tensor


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log π/π_ref of the sampled token: unbiased, may be negative. The only one that is right inside the reward (A21)."""
    return logprobs - ref_logprobs


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """(r - 1) - log r with r = π_ref/π: unbiased, never negative, for reading only (Schulman, "Approximating KL")."""
    log_ratio = ref_logprobs - logprobs
    return log_ratio.exp() - 1 - log_ratio

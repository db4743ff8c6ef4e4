"""KL from the reference: estimators and the per-token penalty."""

from __future__ import annotations

from torch import Tensor


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log π/π_ref of the sampled token: unbiased, may be negative. Inside the reward only this one has the right optimum."""
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Half the squared log ratio: biased as a value, but its gradient in `logprobs` is that of the KL: for a loss."""
    return 0.5 * (logprobs - ref_logprobs) ** 2


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """(r - 1) - log r with r = π_ref/π: unbiased, never negative, for reading only (Schulman, "Approximating KL")."""
    log_ratio = ref_logprobs - logprobs
    return log_ratio.exp() - 1 - log_ratio


def adapt_kl_coef(kl_coef: float, kl: float, target: float, episodes: int, horizon: float) -> float:
    """Adaptive coefficient (Ziegler et al. 2019, section 2.2): times 1 + clip(kl / target - 1, ±0.2) · episodes / horizon.

    Args:
        kl: nats per response (summed over its tokens), mean over the rollout.
        episodes: responses of the rollout; horizon: episodes.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * episodes / horizon)

"""Log-probabilities of chosen tokens under temperature, over the ids that may be sampled."""

from __future__ import annotations

import torch
from torch import Tensor


def tempered_logits(logits: Tensor, temperature: float, forbidden: Tensor | None) -> Tensor:
    """Logits in fp32, divided by the temperature; forbidden ids get the lowest finite number. This distribution is sampled
    and trained. (Not -inf: the probability is exactly 0 either way, but 0 · -inf is NaN in the entropy.)

    Args:
        logits: (..., vocab), any float dtype.
        forbidden: (n,) int64 ids that have no probability (pad, unused); None for none.
    """
    logits = logits.float()
    if temperature != 1.0:
        logits = logits / temperature
    if forbidden is not None and forbidden.numel():
        logits = logits.index_fill(-1, forbidden, torch.finfo(torch.float32).min)
    return logits


def token_logprobs(logits: Tensor, tokens: Tensor, with_entropy: bool = True) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each token, and the entropy of each distribution.

    Args:
        logits: (n, vocab) fp32, finite.
        tokens: (n,) int64.
        with_entropy: it costs as much again.

    Returns:
        logprobs: (n,), nats; with gradient.
        entropy: (n,), nats, detached; or None.
    """
    log_p = torch.log_softmax(logits, dim=-1)
    logprobs = log_p.gather(-1, tokens[:, None])[:, 0]
    if not with_entropy:
        return logprobs, None
    with torch.no_grad():
        return logprobs, -(log_p.exp() * log_p).sum(-1)


def sample_tokens(logits: Tensor, uniforms: Tensor) -> Tensor:
    """One token per row by inversion: the first id whose cumulative probability exceeds the row's uniform number.

    Each row needs only its own number, so a sample does not depend on which other rows are in the batch.

    Args:
        logits: (rows, vocab) fp32, the lowest number where nothing may be sampled.
        uniforms: (rows,) in [0, 1).

    Returns:
        tokens: (rows,) int64, never one whose probability is 0.
    """
    probabilities = torch.softmax(logits.double(), dim=-1)
    cumulative = probabilities.cumsum(-1)
    # Rounding may leave the last cumulative sum below 1: scale the number, not the distribution.
    thresholds = uniforms.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, thresholds, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)

"""Perplexity and bits per byte of a language model."""

from __future__ import annotations

import math


def perplexity(nll: float, tokens: int) -> float:
    """exp(total negative log-likelihood / predicted tokens): every token weighs the same, whatever its batch.

    Args:
        nll: summed over all predicted tokens, nats.
    """
    return math.exp(min(mean_loss(nll, tokens), 700.0))


def mean_loss(nll: float, tokens: int) -> float:
    """Nats per predicted token."""
    return nll / max(tokens, 1)


def bits_per_byte(nll: float, num_bytes: int) -> float:
    """Total negative log-likelihood in bits over the text's UTF-8 bytes: comparable between tokenizers."""
    return nll / math.log(2) / max(num_bytes, 1)

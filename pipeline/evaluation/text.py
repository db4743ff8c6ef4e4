"""Variety of texts, and the KL divergence of one model from another on its own samples."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Distinct n-grams over all n-grams of all texts together (Li et al. 2016): low if every answer is the same."""
    grams = [gram for text in texts for gram in _ngrams(text, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repetition(texts: Sequence[str], n: int = 3) -> float:
    """Mean share of a text's n-grams that occurred in it before: high if a model repeats itself."""
    shares = []
    for text in texts:
        grams = _ngrams(text, n)
        shares.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return math.fsum(shares) / max(len(shares), 1)


def kl_divergence(logprobs: Sequence[float], ref_logprobs: Sequence[float]) -> tuple[float, float]:
    """KL of a policy from its reference, from the policy's own samples: the mean of log p - log q (k1, Schulman 2020).

    Args:
        logprobs, ref_logprobs: of each sampled response, summed over its tokens, nats.

    Returns:
        the estimate and its standard error, nats per response.
    """
    differences = [p - q for p, q in zip(logprobs, ref_logprobs, strict=True)]
    n = max(len(differences), 1)
    mean = math.fsum(differences) / n
    variance = math.fsum((d - mean) ** 2 for d in differences) / max(n - 1, 1)
    return mean, math.sqrt(variance / n)


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]

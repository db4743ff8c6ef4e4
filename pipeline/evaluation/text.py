"""How varied texts are, and how far one model is from another on its own samples."""

from __future__ import annotations

import math
import re
from typing import Any

from pipeline.evaluation.metric_info import metric_info

import evaluate


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.lower())


def _ngrams(words: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


class DistinctN(evaluate.Metric):
    """Distinct n-grams over all n-grams of all texts together (Li et al. 2016): low where a model says the same to everyone."""

    def _info(self) -> evaluate.MetricInfo:
        return metric_info(self, "predictions: texts", "Li et al. 2016", predictions="string")

    def _compute(self, predictions: list[str], n: int = 2) -> dict[str, float]:
        grams = [gram for text in predictions for gram in _ngrams(_words(text), n)]
        return {f"distinct_{n}": len(set(grams)) / len(grams) if grams else 0.0}


class Repetition(evaluate.Metric):
    """Mean share of a text's n-grams that stood in it before: high where a model goes round in circles."""

    def _info(self) -> evaluate.MetricInfo:
        return metric_info(self, "predictions: texts", predictions="string")

    def _compute(self, predictions: list[str], n: int = 3) -> dict[str, float]:
        shares = []
        for text in predictions:
            grams = _ngrams(_words(text), n)
            shares.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
        return {f"repetition_{n}": math.fsum(shares) / max(len(shares), 1)}


class KLDivergence(evaluate.Metric):
    """KL of a policy from its reference in nats a response, from the policy's own samples: mean of log p - log q (k1)."""

    def _info(self) -> evaluate.MetricInfo:
        return metric_info(
            self,
            "logprob, ref_logprob: of each sampled response, summed over its tokens, nats",
            "Schulman 2020",
            logprob="float64",
            ref_logprob="float64",
        )

    def _compute(self, logprob: list[float], ref_logprob: list[float]) -> dict[str, Any]:
        differences = [p - q for p, q in zip(logprob, ref_logprob, strict=True)]
        n = max(len(differences), 1)
        mean = math.fsum(differences) / n
        spread = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / max(n - 1, 1))
        return {"kl": mean, "kl_standard_error": spread / math.sqrt(n)}

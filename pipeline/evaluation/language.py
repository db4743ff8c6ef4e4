"""How well a language model predicts text."""

from __future__ import annotations

import math

from pipeline.evaluation.metric_info import metric_info

import evaluate


class Perplexity(evaluate.Metric):
    """exp(total negative log-likelihood / total predicted tokens): every token weighs the same, whatever its batch."""

    def _info(self) -> evaluate.MetricInfo:
        return metric_info(
            self,
            "nll: summed negative log-likelihood of a text, nats; tokens: its predicted tokens",
            nll="float64",
            tokens="int64",
        )

    def _compute(self, nll: list[float], tokens: list[int]) -> dict[str, float]:
        loss = math.fsum(nll) / max(sum(tokens), 1)
        return {"perplexity": math.exp(min(loss, 700.0)), "loss": loss}


class BitsPerByte(evaluate.Metric):
    """Total negative log-likelihood in bits over the text's UTF-8 bytes: comparable between tokenizers."""

    def _info(self) -> evaluate.MetricInfo:
        return metric_info(
            self,
            "nll: summed negative log-likelihood of a text, nats; num_bytes: its length in UTF-8",
            nll="float64",
            num_bytes="int64",
        )

    def _compute(self, nll: list[float], num_bytes: list[int]) -> dict[str, float]:
        return {"bits_per_byte": math.fsum(nll) / math.log(2) / max(sum(num_bytes), 1)}

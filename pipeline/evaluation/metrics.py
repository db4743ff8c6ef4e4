"""The metrics as `evaluate.Metric` classes that work offline: thin adapters over this folder's functions.

The pipeline itself calls the functions. Importing this module imports `evaluate` and `datasets`, which takes seconds.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from pipeline.evaluation import calibration, intervals, language, text

import datasets
import evaluate


class _Metric(evaluate.Metric):
    """Base of the metrics: description and inputs come from the class."""

    inputs: ClassVar[dict[str, str]] = {}  # name to type
    citation = ""

    def _info(self) -> evaluate.MetricInfo:
        description = type(self).__doc__ or ""
        return evaluate.MetricInfo(
            description=description,
            citation=self.citation,
            inputs_description=", ".join(self.inputs),
            features=datasets.Features({name: datasets.Value(kind) for name, kind in self.inputs.items()}),
        )


class Perplexity(_Metric):
    """`language.perplexity` of texts; nll: summed over a text, nats; tokens: its predicted tokens."""

    inputs: ClassVar[dict[str, str]] = {"nll": "float64", "tokens": "int64"}

    def _compute(self, nll: list[float], tokens: list[int]) -> dict[str, float]:
        total, count = math.fsum(nll), sum(tokens)
        return {"perplexity": language.perplexity(total, count), "loss": language.mean_loss(total, count)}


class BitsPerByte(_Metric):
    """`language.bits_per_byte` of texts; nll: summed over a text, nats; num_bytes: its length in UTF-8."""

    inputs: ClassVar[dict[str, str]] = {"nll": "float64", "num_bytes": "int64"}

    def _compute(self, nll: list[float], num_bytes: list[int]) -> dict[str, float]:
        return {"bits_per_byte": language.bits_per_byte(math.fsum(nll), sum(num_bytes))}


class DistinctN(_Metric):
    """`text.distinct_n` of texts."""

    inputs: ClassVar[dict[str, str]] = {"predictions": "string"}
    citation = "Li et al. 2016"

    def _compute(self, predictions: list[str], n: int = 2) -> dict[str, float]:
        return {f"distinct_{n}": text.distinct_n(predictions, n)}


class Repetition(_Metric):
    """`text.repetition` of texts."""

    inputs: ClassVar[dict[str, str]] = {"predictions": "string"}

    def _compute(self, predictions: list[str], n: int = 3) -> dict[str, float]:
        return {f"repetition_{n}": text.repetition(predictions, n)}


class KLDivergence(_Metric):
    """`text.kl_divergence`; logprob, ref_logprob: of each sampled response, summed over its tokens, nats."""

    inputs: ClassVar[dict[str, str]] = {"logprob": "float64", "ref_logprob": "float64"}
    citation = "Schulman 2020"

    def _compute(self, logprob: list[float], ref_logprob: list[float]) -> dict[str, float]:
        kl, error = text.kl_divergence(logprob, ref_logprob)
        return {"kl": kl, "kl_standard_error": error}


class PairAccuracy(_Metric):
    """`intervals.pair_accuracy`; better, worse: scores of the preferred and the other response of each pair."""

    inputs: ClassVar[dict[str, str]] = {"better": "float64", "worse": "float64"}

    def _compute(self, better: list[float], worse: list[float], groups: list[Any] | None = None) -> dict[str, Any]:
        return intervals.pair_accuracy(better, worse, groups).as_dict()


class WinRate(_Metric):
    """`intervals.win_rate`; candidate, baseline: a judge's scores of both answers to each prompt."""

    inputs: ClassVar[dict[str, str]] = {"candidate": "float64", "baseline": "float64"}

    def _compute(self, candidate: list[float], baseline: list[float]) -> dict[str, Any]:
        return intervals.win_rate(candidate, baseline).as_dict()


class ExpectedCalibrationError(_Metric):
    """`calibration.expected_calibration_error`; probability: stated; outcome: 1 where it happened, 0 where not."""

    inputs: ClassVar[dict[str, str]] = {"probability": "float64", "outcome": "float64"}
    citation = "Naeini et al. 2015; Guo et al. 2017"

    def _compute(self, probability: list[float], outcome: list[float], low: float = 0.0) -> dict[str, float]:
        return {"ece": calibration.expected_calibration_error(probability, outcome, low)}

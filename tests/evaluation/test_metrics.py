"""Metrics of texts and of the distance between models, on known answers; as functions and through evaluate."""

from __future__ import annotations

import math

from pipeline.evaluation.language import bits_per_byte, mean_loss, perplexity
from pipeline.evaluation.metrics import (
    BitsPerByte,
    DistinctN,
    ExpectedCalibrationError,
    KLDivergence,
    PairAccuracy,
    Perplexity,
    Repetition,
    WinRate,
)
from pipeline.evaluation.text import distinct_n, kl_divergence, repetition

import evaluate
import numpy as np
import pytest
from scipy.stats import entropy


def test_variety_by_hand() -> None:
    assert distinct_n(["a b a b", "a b"]) == 2 / 4
    assert distinct_n(["x y z"], n=1) == 1.0
    assert distinct_n([""]) == 0.0
    assert repetition(["a b c a b c", "one two three"]) == pytest.approx((1 - 3 / 4) / 2)
    assert repetition(["short"]) == 0.0


def test_kl_is_scipys_in_the_limit() -> None:
    rng = np.random.default_rng(0)
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
    drawn = rng.choice(3, 40_000, p=p)
    kl, error = kl_divergence(np.log(p[drawn]).tolist(), np.log(q[drawn]).tolist())
    assert kl == pytest.approx(entropy(p, q), abs=4 * error)
    assert kl_divergence([-3.0], [-3.0]) == (0.0, 0.0)


def test_language_by_hand() -> None:
    assert perplexity(math.log(2) * 4, 4) == pytest.approx(2.0)
    assert mean_loss(6.0, 4) == 1.5
    assert bits_per_byte(math.log(2) * 8, 4) == pytest.approx(2.0)


def test_metrics_work_through_evaluate_offline() -> None:
    both = evaluate.combine([DistinctN(), Repetition()])
    assert set(both.compute(predictions=["a b c"])) == {"distinct_2", "repetition_3"}
    assert Perplexity().compute(nll=[math.log(2) * 3, math.log(2)], tokens=[3, 1])["perplexity"] == pytest.approx(2.0)
    assert BitsPerByte().compute(nll=[math.log(2) * 8], num_bytes=[4])["bits_per_byte"] == pytest.approx(2.0)
    assert KLDivergence().compute(logprob=[-1.0, -2.0], ref_logprob=[-2.0, -3.0])["kl"] == pytest.approx(1.0)
    assert PairAccuracy().compute(better=[1.0, 0.0], worse=[0.0, 0.0])["accuracy"] == 0.75
    assert WinRate().compute(candidate=[1.0, 0.0], baseline=[0.0, 0.0])["win_rate"] == 0.75
    ece = ExpectedCalibrationError().compute(probability=[0.95] * 4 + [0.15] * 2, outcome=[1, 1, 1, 0, 0, 1])["ece"]
    assert ece == pytest.approx((4 * 0.2 + 2 * 0.35) / 6)

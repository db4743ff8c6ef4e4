"""Metrics of texts and of distance between models, on known answers; alone and through evaluate."""

from __future__ import annotations

import math

from pipeline.evaluation.metrics import BitsPerByte, DistinctN, KLDivergence, Perplexity, Repetition

import evaluate
import numpy as np
import pytest
from scipy.stats import entropy


def test_variety_by_hand() -> None:
    assert DistinctN().compute(predictions=["a b a b", "a b"]) == {"distinct_2": 2 / 4}
    assert DistinctN()._compute(["x y z"], n=1) == {"distinct_1": 1.0}
    assert DistinctN()._compute([""]) == {"distinct_2": 0.0}
    assert Repetition().compute(predictions=["a b c a b c", "one two three"]) == {
        "repetition_3": pytest.approx((1 - 3 / 4) / 2)
    }
    assert Repetition()._compute(["short"]) == {"repetition_3": 0.0}


def test_kl_is_scipys_in_the_limit() -> None:
    rng = np.random.default_rng(0)
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
    drawn = rng.choice(3, 40_000, p=p)
    found = KLDivergence().compute(logprob=np.log(p[drawn]).tolist(), ref_logprob=np.log(q[drawn]).tolist())
    assert found["kl"] == pytest.approx(entropy(p, q), abs=4 * found["kl_standard_error"])
    assert KLDivergence()._compute([-3.0], [-3.0])["kl"] == 0.0


def test_metrics_combine_offline() -> None:
    both = evaluate.combine([DistinctN(), Repetition()])
    assert set(both.compute(predictions=["a b c"])) == {"distinct_2", "repetition_3"}
    assert Perplexity().compute(nll=[math.log(2) * 3, math.log(2)], tokens=[3, 1])["perplexity"] == pytest.approx(2.0)
    assert BitsPerByte().compute(nll=[math.log(2) * 8], num_bytes=[4])["bits_per_byte"] == pytest.approx(2.0)

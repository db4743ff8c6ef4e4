"""Alarms: one warning per broken invariant, none on healthy metrics, each with a page that explains it."""

from __future__ import annotations

import logging
from pathlib import Path

from pipeline.rollout.alarms import PAGE, Alarms

import pytest

HEALTHY = {
    "first_minibatch_log_ratio": 1e-6,
    "max_log_ratio": 0.8,
    "sampling_drift": 1e-6,
    "sampling_drift_worst_response": 1e-5,
    "value_explained_variance": 0.4,
    "value_grad_norm": 2.0,
    "stopped": 0.95,
}
BROKEN = {
    "first_minibatch_log_ratio": (0.2, "first minibatch already has a log-ratio of 0.2"),
    "max_log_ratio": (25.0, "ratio exceeds e^20"),
    "sampling_drift_worst_response": (0.5, "log-probabilities of sampling and training differ"),
    "value_explained_variance": (-5.3, "explains a share of -5.30"),
    "value_grad_norm": (700.0, "gradient norm is 700"),
    "stopped": (0.1, "only 10% of the responses end"),
}


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("pipeline"), "propagate", True)
    caplog.set_level(logging.WARNING, logger="pipeline.ppo")
    return caplog


def test_healthy_metrics_say_nothing(warnings: pytest.LogCaptureFixture) -> None:
    for rollout in range(1, 6):
        Alarms(max_grad_norm=1.0, precision="fp32").check(HEALTHY, rollout)
    assert not warnings.records


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_invariant_is_said_once(warnings: pytest.LogCaptureFixture, name: str) -> None:
    value, says = BROKEN[name]
    alarms = Alarms(max_grad_norm=1.0, precision="fp32")
    for rollout in (5, 6):
        alarms.check({**HEALTHY, name: value}, rollout)
    (record,) = warnings.records
    assert says in record.getMessage()
    assert record.getMessage().startswith("ppo rollout 5: ")
    assert PAGE in record.getMessage()


def test_a_value_model_may_be_wrong_at_first(warnings: pytest.LogCaptureFixture) -> None:
    Alarms(max_grad_norm=1.0, precision="fp32").check({**HEALTHY, "value_explained_variance": -5.0}, 1)
    assert not warnings.records


def test_the_page_of_the_alarms_exists() -> None:
    assert (Path(__file__).resolve().parents[2] / PAGE).is_file()

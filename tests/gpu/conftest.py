"""`make test-gpu` ends with one JSON line: the device, and what each run of a stage needed."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

RESULTS = pytest.StashKey[dict[str, Any]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULTS] = {}


@pytest.fixture(scope="session")
def results(pytestconfig: pytest.Config) -> dict[str, Any]:
    """By the run's name: peak memory, the plan's, tokens per second."""
    return pytestconfig.stash[RESULTS]


def pytest_unconfigure(config: pytest.Config) -> None:
    if config.option.markexpr == "gpu":
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none: nothing was tested"
        print(json.dumps({"device": device, "runs": config.stash[RESULTS]}))

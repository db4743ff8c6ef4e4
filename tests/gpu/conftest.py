"""`make test-gpu` ends with one JSON line: the device, and what each run of a stage needed.

Runs are shared by all workers of pytest-xdist. RLHF_GPU_RUNS names a folder that keeps them.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

RUNS, TEMPORARY = "RLHF_GPU_RUNS", pytest.StashKey[bool]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TEMPORARY] = RUNS not in os.environ
    if RUNS not in os.environ:  # workers inherit the variable
        os.environ[RUNS] = tempfile.mkdtemp(prefix="rlhf-gpu-")


@pytest.fixture(scope="session")
def folder() -> Path:
    """Where runs are, by name, with `NAME.json` of each: peak memory, the plan's, tokens per second."""
    return Path(os.environ[RUNS])


def pytest_unconfigure(config: pytest.Config) -> None:
    if config.option.markexpr == "gpu" and "PYTEST_XDIST_WORKER" not in os.environ:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none: nothing was tested"
        runs = {path.stem: json.loads(path.read_text()) for path in sorted(Path(os.environ[RUNS]).glob("*.json"))}
        print(json.dumps({"device": device, "runs": runs}))
    if config.stash[TEMPORARY]:
        shutil.rmtree(os.environ.pop(RUNS))

"""Fixtures that many tests share; nothing here needs a network or a GPU."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1",
    WANDB_MODE="offline",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_DISABLE_TELEMETRY="1",
    RLHF_DATA_CACHE=tempfile.mkdtemp(prefix="rlhf-test-cache-"),  # of this process and those that it launches
    OMP_NUM_THREADS="1",
)

from helpers.launches import CARDS, ROOT, STAGES, launch, tiny_flags
from helpers.tiny_models import make_lm
from pipeline.models.tokenizer_training import train_tokenizer

import filelock
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _data_cache() -> Iterator[None]:
    yield
    shutil.rmtree(os.environ["RLHF_DATA_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    lines = (CARDS / "demo_corpus" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:200]
    return train_tokenizer([json.loads(line)["text"] for line in lines], 400)


@pytest.fixture(scope="session", params=["llama", "gpt2"])
def tiny_lm(request: pytest.FixtureRequest, tokenizer: Any) -> Any:
    """A random causal LM of either style, in evaluation mode."""
    return make_lm(request.param, tokenizer)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all workers of this run of the tests."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base


@pytest.fixture(scope="session")
def recipes(shared_folder: Path) -> Path:
    """The demo's recipes without a tracker and with less data."""
    with made_once(shared_folder / "recipes") as folder:
        if folder is not None:
            write_recipes(folder)
    return shared_folder / "recipes"


def write_recipes(folder: Path) -> None:
    for stage in STAGES:
        text = (ROOT / "recipes" / "demo" / f"{stage}.yaml").read_text(encoding="utf-8")
        text = text.replace("report_to: [wandb]\n", "")
        for card, rows in (("demo_corpus", 300), ("demo_demonstrations", 500), ("demo_comparisons", 400)):
            text = text.replace(
                f"  - path: data_cards/{card}\n", f"  - path: data_cards/{card}\n    max_rows: {rows}\n"
            )
        (folder / f"{stage}.yaml").write_text(text, encoding="utf-8")


@pytest.fixture(scope="session")
def chain(shared_folder: Path, recipes: Path) -> Path:
    """All four stages, run once for all tests that need a finished stage, whichever worker runs them."""
    with made_once(shared_folder / "chain") as run:
        if run is not None:
            for stage in STAGES:
                launch(stage, tiny_flags(stage, run, config=recipes / f"{stage}.yaml", report_to=None))
    return shared_folder / "chain"


@contextlib.contextmanager
def made_once(folder: Path) -> Iterator[Path | None]:
    """The folder to fill for the worker that comes first; None, once it is filled, for the others."""
    with filelock.FileLock(f"{folder}.lock"):
        done = folder.with_name(f"{folder.name}.done")
        if done.exists():
            yield None
            return
        folder.mkdir()
        yield folder
        done.touch()

"""Fixtures that many tests share; nothing here needs a network or a GPU."""

from __future__ import annotations

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
)

from helpers.launches import CARDS, ROOT, STAGES, launch, tiny_flags
from helpers.tiny_models import make_lm
from pipeline.models.tokenizer_training import train_tokenizer

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
def recipes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's recipes without a tracker and with less data."""
    folder = tmp_path_factory.mktemp("recipes")
    for stage in STAGES:
        text = (
            (ROOT / "recipes" / "demo" / f"{stage}.yaml")
            .read_text(encoding="utf-8")
            .replace("report_to: [wandb]\n", "")
        )
        for card, rows in (("demo_corpus", 300), ("demo_demonstrations", 500), ("demo_comparisons", 400)):
            text = text.replace(
                f"  - path: data_cards/{card}\n", f"  - path: data_cards/{card}\n    max_rows: {rows}\n"
            )
        (folder / f"{stage}.yaml").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory, recipes: Path) -> Path:
    """All four stages, each by `accelerate launch` in one process, run once for all tests that need a finished stage."""
    run = tmp_path_factory.mktemp("chain")
    for stage in STAGES:
        launch(stage, tiny_flags(stage, run, config=recipes / f"{stage}.yaml", report_to=None))
    return run

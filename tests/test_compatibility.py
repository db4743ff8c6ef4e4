"""docs/compatibility.md says what is so: a sample of its rows made again, all of them in `make test-full`."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from typing import Any

from helpers.launches import ROOT

import pytest

sys.path.insert(0, str(ROOT / "scripts"))

import compatibility

PAGE = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
ROWS = {
    cells[0].strip(): [cell.strip().replace("\\|", "|") for cell in cells[1:]]
    for line in PAGE.splitlines()
    if line.startswith("| ") and " --- " not in line
    for cells in [re.split(r"(?<!\\)\|", line.strip("|"))]
}
QUICK_TEMPLATES = (
    "gemma",
    "qwen 3",
    "deepseek r1",
    "mistral on a SentencePiece tokenizer",
    "trl: gptoss",
    "trl: smolvlm",
)
QUICK_ARCHITECTURES = ("Llama", "OPT")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def templates() -> dict[str, Any]:
    return compatibility.templates()


def test_no_cell_is_wrong_and_every_row_is_there(templates: dict[str, Any]) -> None:
    assert not [name for name, cells in ROWS.items() for cell in cells if cell.startswith(("wrong", "differs"))]
    assert set(templates) <= set(ROWS)
    assert {name.removesuffix("Config") for name in compatibility.ARCHITECTURES} <= set(ROWS)
    assert len(compatibility.ARCHITECTURES) >= 30


@pytest.mark.parametrize("name", QUICK_TEMPLATES)
def test_a_template_does_what_its_row_says(name: str, templates: dict[str, Any]) -> None:
    assert compatibility.template_row(templates[name]) == ROWS[name]


@pytest.mark.parametrize("name", QUICK_ARCHITECTURES)
def test_an_architecture_does_what_its_row_says(name: str) -> None:
    assert compatibility.architecture_row(name + "Config") == ROWS[name]


@pytest.mark.full
def test_every_template_does_what_its_row_says(templates: dict[str, Any]) -> None:
    for name in templates.keys() - set(QUICK_TEMPLATES):
        assert compatibility.template_row(templates[name]) == ROWS[name], name


@pytest.mark.full
@pytest.mark.parametrize("name", sorted(compatibility.ARCHITECTURES))
def test_every_architecture_does_what_its_row_says(name: str) -> None:
    assert compatibility.architecture_row(name) == ROWS[name.removesuffix("Config")]

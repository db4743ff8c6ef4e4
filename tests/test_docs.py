"""What the documentation names exists: files, functions, tests, keys, metrics of PPO."""

from __future__ import annotations

import ast
import dataclasses
import functools
import json
import re
from pathlib import Path

from pipeline.config.ppo import PPOArguments

import pytest

ROOT = Path(__file__).resolve().parent.parent
DETAILS = (ROOT / "docs" / "implementation_details.md").read_text(encoding="utf-8")
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "recipes").glob("*/README.md")],
    key=lambda path: str(path.relative_to(ROOT)),
)


@functools.cache
def names_of(path: Path) -> set[str]:
    """Functions and classes of a file, methods as `Class.method`."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return names


def test_every_detail_has_code_and_a_test() -> None:
    rows = [
        line.split("|")[1:-1] for line in DETAILS.splitlines() if line.startswith("| ") and "| detail |" not in line
    ]
    numbers = [int(row[0]) for row in rows if row[0].strip().isdigit()]
    assert numbers == list(range(1, 36))
    for row in rows:
        code, tests = row[-3], row[-1]
        assert re.search(r"`pipeline/\S+\.py:\w", code), row
        assert re.search(r"`tests/\S+\.py::test_\w", tests), row


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_page_names_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:pipeline|tests|recipes|docs|scripts|data_cards)/[\w./-]+\.\w+)", text):
        assert (ROOT / name).is_file(), name
    pairs = re.findall(r"`((?:pipeline|tests)/[\w/]+\.py):{1,2}([\w.]+)`", text)
    pairs += re.findall(r"`(pipeline/[\w/]+\.py)`: `(\w+)`", text)
    for file, name in pairs:
        assert name in names_of(ROOT / file) or f"{name} = " in (ROOT / file).read_text(encoding="utf-8"), (
            f"{file}: {name}"
        )


def test_the_way_of_one_prompt_names_functions_that_are_there() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    steps = re.findall(r"^\| \d+ \| `(\S+)` \| (.+?) \|", text, re.MULTILINE)
    assert len(steps) > 15
    for file, functions in steps:
        for name in re.findall(r"`(\S+?)`", functions):
            assert name in names_of(ROOT / file), f"{file}: {name}"


def test_the_tree_names_every_folder() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for path in (ROOT / "pipeline").iterdir():
        if (path.is_dir() and (path / "__init__.py").is_file()) or (path.suffix == ".py" and path.stem != "__init__"):
            assert f"\n  {path.name}" in text, path.name


def test_options_of_ppo_are_keys() -> None:
    text = (ROOT / "docs" / "ppo-options.md").read_text(encoding="utf-8")
    keys = {field.name for field in dataclasses.fields(PPOArguments)}
    for cell in re.findall(r"^\| (`.+?`) \|", text, re.MULTILINE):
        for name in re.findall(r"`(\w+)(?:: \w+)?`", cell):
            assert name in keys or name in ("shared_trunk", "adapters", "policy"), name


def metrics_of_the_page() -> list[re.Pattern[str]]:
    text = (ROOT / "docs" / "ppo-metrics.md").read_text(encoding="utf-8")
    names = [n for row in re.findall(r"^\| (`.+?`) \|", text, re.MULTILINE) for n in re.findall(r"`(\S+?)`", row)]
    return [re.compile(re.sub(r"<\w+>", r".+", name)) for name in names]


@pytest.mark.full
def test_every_metric_of_ppo_is_explained(chain: Path) -> None:
    lines = (chain / "ppo" / "history.jsonl").read_text(encoding="utf-8").splitlines()
    logged = {name for line in lines for name in json.loads(line)}
    patterns = metrics_of_the_page()
    assert not [name for name in logged if not any(pattern.fullmatch(name) for pattern in patterns)]


def test_every_alarm_is_explained() -> None:
    page = (ROOT / "docs" / "ppo-troubleshooting.md").read_text(encoding="utf-8")
    headings = re.findall(r"^### (.+)$", page, re.MULTILINE)
    source = (ROOT / "pipeline" / "rollout" / "alarms.py").read_text(encoding="utf-8")
    assert len(headings) == len(re.findall(r"^\s+broken\[", source, re.MULTILINE)) + 1  # and the missing-EOS score

"""Imports go down only, and no module of ours hides one of the libraries'."""

from __future__ import annotations

import ast
import importlib.metadata
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PIPELINE = ROOT / "pipeline"
LAYERS = {
    "errors": 0, "hashing": 0, "algorithms": 0, "arguments": 0,
    "data": 1, "models": 1, "checkpoints": 1, "metrics": 1,
    "rollout": 2, "scoring": 2, "best_of_n": 2, "stage": 2, "training": 2, "judging": 2, "plots": 2, "sizing": 2,
    "devices": 1, "trackers": 1, "frontier": 2, "llm_judge": 2, "lm_eval_tasks": 2, "report_page": 2,
    "pretrain": 3, "sft": 3, "reward": 3, "ppo": 3, "check": 3, "report": 3, "score_file": 3, "check_data": 3, "plan": 3, "compare": 3,
    "run": 4, "dry_run": 4, "cli": 4,
}  # fmt: skip
STAGE_FILES = {"pretrain", "sft", "reward", "ppo", "check", "report"}


def part_of(path: Path) -> str:
    relative = path.relative_to(PIPELINE)
    return relative.parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write `from pipeline.…`"
            found |= {node.module or ""} if node.module != "pipeline" else {f"pipeline.{a.name}" for a in node.names}
    return found


FILES = sorted(path for path in PIPELINE.rglob("*.py") if path != PIPELINE / "__init__.py")


def test_every_module_has_a_layer() -> None:
    assert {part_of(path) for path in FILES} == set(LAYERS)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PIPELINE)))
def test_imports_go_down_only(path: Path) -> None:
    own = part_of(path)
    for name in imports_of(path):
        if not name.startswith("pipeline."):
            continue
        other = name.split(".")[1]
        if other == "__version__":
            continue
        assert LAYERS[other] <= LAYERS[own], f"{path.name} (layer {LAYERS[own]}) imports {name} (layer {LAYERS[other]})"
        if own in STAGE_FILES and other in STAGE_FILES:
            assert other == own, (
                f"{path.name} imports {name}: stages and commands of one layer do not import each other"
            )


@pytest.mark.parametrize("path", sorted((PIPELINE / "algorithms").glob("*.py")), ids=lambda p: p.name)
def test_algorithms_need_torch_alone(path: Path) -> None:
    for name in imports_of(path):
        top = name.split(".")[0]
        assert top == "torch" or top in sys.stdlib_module_names or name.startswith("pipeline.algorithms"), name


def test_lower_layers_take_plain_arguments() -> None:
    """Data and models never see a stage's argument object."""
    for path in FILES:
        if LAYERS[part_of(path)] == 1:
            assert "pipeline.arguments" not in imports_of(path), path


def test_no_module_shadows_a_package() -> None:
    """`accelerate launch pipeline/sft.py` puts pipeline/ first on sys.path."""
    installed = set(importlib.metadata.packages_distributions()) | set(sys.stdlib_module_names)
    ours = {path.stem if path.is_file() else path.name for path in PIPELINE.iterdir() if path.suffix in ("", ".py")}
    assert not (ours - {"__init__", "__pycache__"}) & installed

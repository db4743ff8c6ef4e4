"""Folders are layers: imports go down only, and nothing at the top of `pipeline/` hides an importable package."""

from __future__ import annotations

import ast
import importlib.metadata
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PIPELINE = ROOT / "pipeline"
# Each folder (or file at the top) may import its own line and the lines above it.
LAYERS = [
    ["errors", "algorithms"],
    ["data"],
    ["config"],
    ["models"],
    ["training"],
    ["rollout"],
    ["planning"],
    ["evaluation"],
    ["labeling"],
    ["rounds"],
    ["chat"],
    ["pretrain", "sft", "reward", "ppo"],
    ["commands"],
    ["cli"],
]
LAYER = {part: number for number, parts in enumerate(LAYERS) for part in parts}
STAGES = LAYERS[-3]


def part_of(path: Path) -> str:
    return path.relative_to(PIPELINE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write `from pipeline.…`"
            modules |= {node.module or ""} if node.module != "pipeline" else {f"pipeline.{a.name}" for a in node.names}
    return modules


FILES = sorted(path for path in PIPELINE.rglob("*.py") if path != PIPELINE / "__init__.py")


def test_every_folder_has_a_layer() -> None:
    assert {part_of(path) for path in FILES} == set(LAYER)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PIPELINE)))
def test_imports_go_down_only(path: Path) -> None:
    own = part_of(path)
    for name in imports_of(path):
        if not name.startswith("pipeline."):
            continue
        other = name.split(".")[1]
        if other == "__version__":
            continue
        assert LAYER[other] <= LAYER[own], f"{path.relative_to(ROOT)} imports {name}, which lies above it"
        assert other == own or {own, other} - set(STAGES), (
            f"{path.name} imports {name}: stages do not import each other"
        )


@pytest.mark.parametrize("path", sorted((PIPELINE / "algorithms").glob("*.py")), ids=lambda p: p.name)
def test_algorithms_need_torch_alone(path: Path) -> None:
    for name in imports_of(path):
        top = name.split(".")[0]
        assert top == "torch" or top in sys.stdlib_module_names or name.startswith("pipeline.algorithms"), name


def test_no_module_shadows_a_package() -> None:
    """`accelerate launch pipeline/sft.py` puts pipeline/ first on sys.path."""
    installed = set(importlib.metadata.packages_distributions()) | set(sys.stdlib_module_names)
    ours = {path.stem if path.is_file() else path.name for path in PIPELINE.iterdir() if path.suffix in ("", ".py")}
    assert not (ours - {"__init__", "__pycache__"}) & installed

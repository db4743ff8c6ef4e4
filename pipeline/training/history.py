"""history.jsonl: one line per logged step, exact over resumes."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.training.json_files import finite_or_null

logger = logging.getLogger("pipeline")
HISTORY = "history.jsonl"


def append(folder: Path, row: dict[str, Any]) -> None:
    with (folder / HISTORY).open("a", encoding="utf-8") as file:
        file.write(_line(row))


def read(folder: Path) -> list[dict[str, Any]]:
    """The rows up to the first line that is no JSON object: the last line of a killed run, or damage, which is logged."""
    path = folder / HISTORY
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rows: list[dict[str, Any]] = []
    for line in lines if lines[-1] and _parse(lines[-1]) else lines[:-1]:
        row = _parse(line)
        if row is None:
            logger.warning("%s:%d: not a JSON object; later lines are not read", path, len(rows) + 1)
            break
        rows.append(row)
    return rows


def write(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Replace the file whole."""
    path = folder / HISTORY
    temporary = path.with_name(HISTORY + ".tmp")
    temporary.write_text("".join(map(_line, rows)), encoding="utf-8")
    os.replace(temporary, path)


def _line(row: dict[str, Any]) -> str:
    return json.dumps(finite_or_null(row), ensure_ascii=False, allow_nan=False) + "\n"


def _parse(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None

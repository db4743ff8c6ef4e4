"""history.jsonl: one line per logged step, exact over resumes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

HISTORY = "history.jsonl"


def append(folder: Path, row: dict[str, Any]) -> None:
    with (folder / HISTORY).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read(folder: Path) -> list[dict[str, Any]]:
    path = folder / HISTORY
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:  # the last line of a killed run; its step is run again
            break
    return rows


def rewind(folder: Path, rows: int) -> None:
    """Keep the first `rows` lines: a resumed run writes the later ones again."""
    kept = read(folder)[:rows]
    path = folder / HISTORY
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept), encoding="utf-8")
    os.replace(temporary, path)

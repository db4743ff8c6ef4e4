"""One key of a recipe: its default, help and range stand in one place, the field of a dataclass."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def key(
    default: Any,
    help: str,
    low: float | None = None,
    high: float | None = None,
    *,
    group: str | None = None,
    path: bool = False,
) -> Any:
    """A dataclass field that a recipe or a flag may set.

    Args:
        low, high: smallest and largest value, both included; the reader refuses others.
        group: heading in `--help` of this key and of those after it.
        path: the value is a path; `~` is expanded.
    """
    metadata = {"help": help, "low": low, "high": high, "group": group, "path": path}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)

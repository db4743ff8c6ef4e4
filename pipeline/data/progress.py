"""How far reading, encoding and packing are: a bar on a terminal, elsewhere a line every 30 seconds."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm.auto import tqdm

logger = logging.getLogger("pipeline.progress")
SECONDS_BETWEEN_LINES = 30.0
Item = TypeVar("Item")


class DataProgress:
    """Counts rows (or what `unit` names). A process that logs no information shows nothing.

    Args:
        total: rows in all, where that is known.
    """

    def __init__(self, description: str, total: int | None = None, unit: str = "row"):
        self.description, self.total, self.unit, self.done = description, total, unit, 0
        shown = any(handler.level <= logging.INFO for handler in logging.getLogger("pipeline").handlers)
        on_terminal = shown and sys.stderr.isatty() and os.environ.get("LOCAL_RANK", "0") == "0"
        self._bar = tqdm(
            total=total, desc=description, unit=unit, unit_scale=True, leave=False, delay=1.0, disable=not on_terminal
        )
        self._lines = not on_terminal
        self._started = self._last_line = time.monotonic()

    def update(self, rows: int = 1) -> None:
        self.done += rows
        self._bar.update(rows)
        if self._lines and time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            logger.info("%s", self.line())

    def line(self) -> str:
        speed = self.done / max(time.monotonic() - self._started, 1e-9)
        whole = f"/{self.total:,}" if self.total else ""
        left = f", {(self.total - self.done) / max(speed, 1e-9):.0f} s left" if self.total else ""
        return f"{self.description}: {self.done:,}{whole} {self.unit}s, {speed:,.0f} {self.unit}s/s{left}"

    def each(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, each counted."""
        try:
            for item in items:
                yield item
                self.update()
        finally:
            self.close()

    def close(self) -> None:
        self._bar.close()

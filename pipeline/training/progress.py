"""Progress of a long loop: a bar on a terminal, else one log line every 30 seconds."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from pipeline.data.progress import SECONDS_BETWEEN_LINES
from pipeline.training.run import Run

from tqdm.auto import tqdm

logger = logging.getLogger("pipeline")


class Progress:
    """Shows the steps done, the last metrics, the speed and the time left. Only rank 0 shows anything.

    Args:
        total: steps of the whole run.
        done: steps done before this start.
    """

    def __init__(self, total: int, description: str, run: Run[Any], done: int = 0, unit: str = "step"):
        self.total, self.description, self.done, self.unit = total, description, done, unit
        self._lines = run.is_main and not run.show_progress
        self._bar = tqdm(total=total, initial=done, desc=description, unit=unit, disable=not run.show_progress)
        self._started_at, self._started = done, time.monotonic()
        self._last_line = self._started

    def update(self, metrics: Mapping[str, float] | None = None, steps: int = 1) -> None:
        """Count `steps` more.

        Args:
            metrics: what to show beside them, already on the host.
        """
        self.done += steps
        self._bar.update(steps)
        if self._lines and time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            logger.info(self.line(metrics or {}))

    def line(self, metrics: Mapping[str, float]) -> str:
        speed = (self.done - self._started_at) / max(time.monotonic() - self._started, 1e-9)
        parts = [f"{self.unit} {self.done}/{self.total}", *(f"{name} {value:.4g}" for name, value in metrics.items())]
        parts.append(f"{speed:.2f} {self.unit}s/s" if speed >= 1 else f"{1 / max(speed, 1e-9):.1f} s per {self.unit}")
        return f"{self.description}: {', '.join(parts)}, {duration((self.total - self.done) / max(speed, 1e-9))} left"

    def close(self) -> None:
        self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def duration(seconds: float) -> str:
    """A length of time in its two largest units: `2 h 5 min`, `3 min 20 s`, `12 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"

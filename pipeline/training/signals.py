"""SIGTERM and SIGINT while a stage runs."""

from __future__ import annotations

import logging
import os
import signal
import time
import types

logger = logging.getLogger("pipeline")
SAME_SIGNAL_WITHIN = 1.0  # seconds; a launcher passes on what the terminal or `rlhf run` has sent to all processes


class Interruption:
    """The first signal ends the stage at its next safe point, a second one ends it at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.received = 0.0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self.received = number, now
            logger.warning("%s received: ending at the next safe point (again: at once)", signal.Signals(number).name)
        elif now - self.received > SAME_SIGNAL_WITHIN:
            os._exit(128 + number)

"""What reading and encoding say about the data, collected, so that a start which reads the cache says the same."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

READING = "pipeline.data"  # the parent of the loggers whose words are kept
Note = tuple[str, int, str]  # logger, level, text


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.notes: list[Note] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.notes.append((record.name, record.levelno, record.getMessage()))


@contextlib.contextmanager
def collected_notes() -> Iterator[list[Note]]:
    """Keep what `pipeline.data` logs inside, in processes that show nothing too; `say` says it afterwards."""
    logger, collector = logging.getLogger(READING), _Collector()
    before = logger.handlers, logger.propagate, logger.level
    logger.handlers, logger.propagate = [collector], False
    logger.setLevel(logging.INFO)
    try:
        yield collector.notes
    finally:
        logger.handlers, logger.propagate = before[0], before[1]
        logger.setLevel(before[2])


def say(notes: list[Note]) -> None:
    for name, level, text in notes:
        logging.getLogger(name).log(level, "%s", text)

"""Logging of a stage: to the terminal and to log.txt."""

from __future__ import annotations

import io
import logging
import sys
from pathlib import Path

logger = logging.getLogger("pipeline")


def accept_any_terminal() -> None:
    """Characters that the terminal's encoding lacks are escaped instead of ending the program."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def on_terminal() -> bool:
    return sys.stderr.isatty()


def quiet_libraries() -> None:
    """Silence what libraries print while they load; errors still pass."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    for name in ("trl", "py.warnings"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.captureWarnings(True)


def set_up_logging(log_file: Path | None, rank: int, quiet: bool) -> None:
    """Everything to `log_file`; to the terminal info lines, or only warnings if quiet."""
    quiet_libraries()
    logging.raiseExceptions = False  # a full disk is reported once, by what cannot be saved
    for handler in logger.handlers:
        handler.close()
    logger.handlers.clear()
    logger.propagate = False
    logger.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    console = logging.StreamHandler()
    console.setLevel(logging.WARNING if quiet else logging.INFO)
    console.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(console)
    if rank == 0 and log_file is not None:
        file = logging.FileHandler(log_file, encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(file)

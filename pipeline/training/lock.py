"""One run at a time in an output folder."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import UserError

logger = logging.getLogger("pipeline")
LOCK = ".lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the output folder for this process: two runs at once would mix their checkpoints.

    Raises:
        UserError: another process holds it.
    """
    import fcntl

    with (folder / LOCK).open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"output_dir {str(folder)!r} is in use by another run; wait for it, or end it") from None
        except OSError as error:  # some network file systems know no locks
            logger.warning("%s cannot be locked (%s); do not start two runs in it", folder, error.strerror)
        yield

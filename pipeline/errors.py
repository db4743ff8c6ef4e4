"""Errors that the user can fix are printed as one line; every other exception is a bug of ours and keeps its traceback."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Writers that are not Python report a full disk in their own words: safetensors (Rust), torch's zip writer.
DISK_FULL_WORDS = ("No space left on device", "Disk quota exceeded", "os error 28", "unexpected pos")


class UserError(Exception):
    """Bad input or a bad recipe: printed as one line, `file:line: what is wrong; what to do`, exit code 2."""

    def __init__(self, message: str, *, file: str | os.PathLike[str] | None = None, line: int | None = None):
        where = "" if file is None else f"{os.fspath(file)}:" if line is None else f"{os.fspath(file)}:{line}:"
        super().__init__(f"{where} {message}".strip())


def shorten(value: object, limit: int = 80) -> str:
    """`repr(value)` cut to `limit` characters, for messages."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def describe_system_error(error: BaseException, folder: Path | None = None) -> str | None:
    """One line about a full disk or a missing right, or None where the error is something else.

    Args:
        folder: where the program writes, for errors that name no file.
    """
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return f"{error.filename}: {error.strerror}; give this user the right to write there"
    for cause in _causes(error):
        full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or any(words in str(cause) for words in DISK_FULL_WORDS):
            named = cause.filename if isinstance(cause, OSError) and isinstance(cause.filename, str) else None
            return _disk_full(Path(named) if named else None, folder)
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it came from."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _disk_full(file: Path | None, folder: Path | None) -> str:
    candidates = [file] if file else [folder or Path.cwd(), Path(tempfile.gettempdir()), Path.home()]
    mounts = {_mount(path): path for path in reversed(candidates)}
    mount = min(mounts, key=lambda place: shutil.disk_usage(place).free)
    usage = shutil.disk_usage(mount)
    return (
        f"{mounts[mount]}: no space left on its disk ({mount}: {usage.free / 2**20:,.1f} MiB free of "
        f"{usage.total / 2**20:,.1f}{_needed(folder)}); free some or write to another disk, then start the same command again"
    )


def _needed(folder: Path | None) -> str:
    """The size of a checkpoint in the folder, or of the part of one that was written before the disk was full."""
    sizes = {True: 0, False: 0}
    for checkpoint in folder.glob("checkpoint-*") if folder else []:
        size = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
        whole = (checkpoint / "manifest.json").is_file()
        sizes[whole] = max(sizes[whole], size)
    if sizes[True]:
        return f"; a checkpoint takes {sizes[True] / 2**20:,.1f} MiB"
    return f"; a checkpoint takes more than {sizes[False] / 2**20:,.1f} MiB" if sizes[False] else ""


def _mount(path: Path) -> Path:
    """The mount point of the disk that a path is, or would be, on."""
    place = path.absolute()
    while not os.path.ismount(place):
        place = place.parent
    return place

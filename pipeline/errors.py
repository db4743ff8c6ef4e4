"""The one error that is the user's to fix; everything else is a bug of ours and keeps its traceback."""

from __future__ import annotations

import os


class UserError(Exception):
    """Bad input or a bad recipe: printed as one line, `file:line: what is wrong; what to do`, exit code 2."""

    def __init__(self, message: str, *, file: str | os.PathLike[str] | None = None, line: int | None = None):
        where = "" if file is None else f"{os.fspath(file)}:" if line is None else f"{os.fspath(file)}:{line}:"
        super().__init__(f"{where} {message}".strip())


def shorten(value: object, limit: int = 80) -> str:
    """`repr(value)` cut to `limit` characters, for messages."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"

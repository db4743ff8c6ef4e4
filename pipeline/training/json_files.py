"""JSON files: written whole or not at all, always valid JSON; read as data from outside."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any


class NotAnObject(ValueError):
    """A file that should hold one JSON object does not; the message says why."""


def finite_or_null(value: Any) -> Any:
    """The same data with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite_or_null(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_null(item) for item in value]
    return value


def write_json(path: Path, value: Any) -> None:
    """Write by rename, so that a reader (or a full disk) never sees half a file; NaN and infinity become null."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(finite_or_null(value), file, indent=2, ensure_ascii=False, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        NotAnObject: there is no such regular file, it cannot be read, or it holds something else.
    """
    if not path.is_file():  # neither a folder nor a FIFO, which would block
        raise NotAnObject("is missing or no regular file")
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise NotAnObject(f"cannot be read: {error.strerror}") from error
    except RecursionError as error:
        raise NotAnObject("not valid JSON (nested too deeply)") from error
    except ValueError as error:
        raise NotAnObject(f"not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise NotAnObject(f"holds a {type(value).__name__}, not an object")
    return value

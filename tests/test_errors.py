"""System errors that are the user's to fix, told in one line."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from pipeline.errors import describe_system_error

import pytest


def raised(*errors: Exception) -> Exception:
    """The last error, raised while the one before it was handled."""
    try:
        if errors[1:]:
            try:
                raise raised(*errors[:-1])
            except Exception:
                raise errors[-1]  # noqa: B904
        raise errors[0]
    except Exception as error:
        return error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
        ValueError("Error while serializing: I/O error: No space left on device (os error 28)"),
        raised(OSError(errno.ENOSPC, "x"), RuntimeError("the writer failed")),
    ],
    ids=["disk", "quota", "torch", "safetensors", "cause"],
)
def test_a_full_disk_names_the_disk_and_what_is_free(error: Exception, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-10"
    checkpoint.mkdir()
    (checkpoint / "optimizer.pt").write_bytes(b"x" * 2**20)
    for takes in ("more than 1\\.0", "1\\.0"):
        line = describe_system_error(error, tmp_path)
        assert line is not None
        assert "\n" not in line
        where = r": no space left on its disk \(/\S*: [\d,.]+ MiB free of [\d,.]+; a checkpoint takes "
        assert re.search(f"{where}{takes} MiB\\)", line)
        (checkpoint / "manifest.json").touch()
    assert line is not None
    assert "then start the same command again" in line


def test_a_full_disk_of_a_named_file(tmp_path: Path) -> None:
    line = describe_system_error(OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "cache")), Path("/"))
    assert line is not None
    assert line.startswith(f"{tmp_path / 'cache'}: no space left")


def test_a_missing_right_is_named_and_a_bug_is_not_hidden() -> None:
    line = describe_system_error(PermissionError(errno.EACCES, "Permission denied", "/x"))
    assert line == "/x: Permission denied; give this user the right to write there"
    assert describe_system_error(RuntimeError("shapes do not match")) is None
    assert describe_system_error(FileNotFoundError(errno.ENOENT, "No such file", "/x")) is None

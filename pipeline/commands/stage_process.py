"""One stage in a forked process: its state, threads and crashes stay apart from the command's."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.errors import UserError, describe_system_error


def stage_body(name: str) -> Callable[[Any], None]:
    """The `main` of a stage's file."""
    import importlib

    return importlib.import_module(f"pipeline.{name}").main  # type: ignore[no-any-return]


def run_in_process(name: str, work: Callable[[], None], scratch: Path) -> list[str]:
    """Run `work` in a forked process; returns the lines that the stage printed about itself.

    Args:
        scratch: folder for its output, `<name>.log`.

    Raises:
        UserError: the one that `work` raised, or the last line of another exception.
    """
    log, error_file = scratch / f"{name}.log", scratch / f"{name}-error.json"
    process = multiprocessing.get_context("fork").Process(target=_child, args=(work, log, error_file), daemon=False)
    process.start()
    process.join()
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    if process.exitcode == 0:
        return [line for line in lines if line.startswith(f"{name}: ")]
    if error_file.is_file():
        raise UserError(json.loads(error_file.read_text(encoding="utf-8")))
    last = lines[-1] if lines else f"exit code {process.exitcode}"
    raise UserError(f"{name}: its step fails: {last}")


def _child(work: Callable[[], None], log: Path, error_file: Path) -> None:
    out = log.open("w", encoding="utf-8", buffering=1)
    os.dup2(out.fileno(), 1)
    os.dup2(out.fileno(), 2)
    sys.stdout = sys.stderr = out
    os.environ |= {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    code = 0
    try:
        work()
    except UserError as error:
        error_file.write_text(json.dumps(str(error)), encoding="utf-8")
        code = 2
    except Exception as error:
        code = 1
        if message := describe_system_error(error, error_file.parent):
            error_file.write_text(json.dumps(message), encoding="utf-8")
        else:
            traceback.print_exc()
    out.flush()
    os._exit(code)

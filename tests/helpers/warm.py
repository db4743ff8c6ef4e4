"""Stages in processes of their own that need not import torch and transformers again.

A server process imports the stages once and forks for every start. Each start has a session, a working folder, an
environment, arguments and output of its own, runs the stage's file as `python pipeline/<stage>.py` does, and ends with the
same exit code. Imports take 10 to 15 seconds, a tiny stage takes a few.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["pipeline.pretrain", "pipeline.sft", "pipeline.reward", "pipeline.ppo", "transformers.models.llama.modeling_llama"]
)


class WarmProcess:
    """One script in a forked process."""

    def __init__(self, script: Path, arguments: Sequence[str], environment: dict[str, str], folder: Path):
        self._printed = Path(tempfile.mkdtemp(prefix="warm-"))
        whole = (str(script), list(arguments), environment, str(folder), str(self._printed))
        self._process = _CONTEXT.Process(target=_run, args=whole)
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        """The exit code as a shell gives it (negative: ended by that signal), or None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            self.kill()
            raise TimeoutError(f"still running after {timeout} s\n{''.join(self.read())[-3000:]}")
        return self._process.exitcode

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self._process.join(30)

    def signal(self, number: int) -> None:
        if self._process.exitcode is None:
            os.killpg(self.pid, number)

    def read(self) -> tuple[str, str]:
        """What it wrote to stdout and to stderr."""
        out, err = (
            (self._printed / name).read_text(encoding="utf-8", errors="replace") for name in ("stdout", "stderr")
        )
        shutil.rmtree(self._printed)
        return out, err


def start(
    script: Path, arguments: Sequence[str], environment: dict[str, str], folder: Path, processes: int = 1
) -> list[WarmProcess]:
    """`processes` copies of a script, which find each other as torchrun's do."""
    if processes == 1:
        return [WarmProcess(script, arguments, environment, folder)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    return [
        WarmProcess(script, arguments, {**environment, **shared, "RANK": str(i), "LOCAL_RANK": str(i)}, folder)
        for i in range(processes)
    ]


def _run(script: str, arguments: list[str], environment: dict[str, str], folder: str, printed: str) -> None:
    """In the forked process: become the program."""
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{printed}/{name}", os.O_WRONLY | os.O_APPEND | os.O_CREAT), descriptor)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")

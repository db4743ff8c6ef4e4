"""A function of many batches, on all cores, in order."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, TypeVar

from pipeline.data.notes import Note, collected_notes, say

Item = TypeVar("Item")
Result = TypeVar("Result")
SERIAL_BATCHES = 4  # so few batches are done before processes have started
PR_SET_PDEATHSIG = 1
_function: Callable[[Any], Any] | None = None  # of the pool; forked processes have it without pickling


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_batches(
    function: Callable[[Item], Result], batches: Iterable[Item], processes: int | None = None
) -> Iterator[Result]:
    """`function` of each batch, in the order of the batches; a few batches at most wait in memory.

    Works in processes that are forked, so that a tokenizer need not be loaded again; in this process where there are
    few batches, one core, or no safe fork (other systems than Linux). What it logs in `pipeline.data` is said here.

    Raises:
        whatever the function raises, that of the first such batch.
    """
    processes = cores() if processes is None else processes
    waiting = iter(batches)
    first = [batch for _, batch in zip(range(SERIAL_BATCHES), waiting, strict=False)]
    yield from map(function, first)
    if processes < 2 or sys.platform != "linux":
        yield from map(function, waiting)
    elif len(first) == SERIAL_BATCHES:
        yield from _in_processes(function, waiting, processes)


def _in_processes(function: Callable[[Item], Result], batches: Iterator[Item], processes: int) -> Iterator[Result]:
    global _function
    _function = function
    pool = ProcessPoolExecutor(processes, get_context("fork"), _die_with_parent, (os.getpid(),))
    running: deque[Future[tuple[Any, list[Note]]]] = deque()
    try:
        for batch in batches:
            with warnings.catch_warnings():  # forking a process with threads; the children use none of what these hold
                warnings.simplefilter("ignore", DeprecationWarning)
                running.append(pool.submit(_call, batch))
            if len(running) > 2 * processes:
                yield _result(running.popleft())
        while running:
            yield _result(running.popleft())
    finally:
        pool.shutdown(cancel_futures=True)
        _function = None


def _result(future: Future[tuple[Any, list[Note]]]) -> Any:
    result, notes = future.result()
    say(notes)
    return result


def _call(batch: Any) -> tuple[Any, list[Note]]:
    assert _function is not None
    with collected_notes() as notes:
        return _function(batch), notes


def _die_with_parent(parent: int) -> None:
    """A process whose parent was killed would wait for ever."""
    gc.freeze()  # what the parent holds is not looked through, and its pages stay shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)

"""`accelerate launch` for `rlhf run`: the stage's own exit code, and nothing printed beside what the stage prints.

    python -m pipeline.training.launcher [accelerate's options] pipeline/sft.py [the stage's flags]

The only place that calls accelerate's launcher from Python (accelerate 1.15: `launch_command_parser`, `launch_command`;
torch 2.13: `ChildFailedError.failures`, `SignalException.sigval`). As a command of its own it turns every exit code into 1 and adds a traceback.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from pipeline.errors import UserError

import yaml

RUN_COMMAND = "RLHF_RUN_COMMAND"  # the `rlhf run …` that a stage belongs to, set for its processes
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def main(argv: Sequence[str]) -> int:
    """Launch a script under accelerate; returns the exit code of the process that failed first, 0 if none did."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    args = launch_command_parser().parse_args(list(argv))
    for number in SIGNALS:  # the stage gets the signal too; wait for its exit
        signal.signal(number, lambda *_: None)
    try:
        launch_command(args)
    except subprocess.CalledProcessError as error:
        return _exit_code([error.returncode])
    except ChildFailedError as error:
        return _exit_code([failure.exitcode for failure in error.failures.values()])
    except SignalException as error:  # torch's launcher has ended the processes
        return 128 + int(error.sigval)
    return 0


def _exit_code(codes: list[int]) -> int:
    """2 where a process returned it, else the first code; a process that a signal ended counts as 128 plus the signal."""
    return 2 if 2 in codes else 128 - codes[0] if codes[0] < 0 else codes[0]


def accelerate_config(path: str) -> dict[str, Any]:
    """An accelerate config file as it stands.

    Raises:
        UserError: it cannot be read, or is none.
    """
    if not os.path.isfile(path):
        raise UserError("cannot be read as an accelerate config (no such file)", file=path)
    try:
        with open(path, encoding="utf-8") as file:
            config = yaml.safe_load(file)
        int(config["num_processes"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"cannot be read as an accelerate config ({error!r})", file=path) from error
    return dict(config)


def cpu_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

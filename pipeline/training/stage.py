"""How a stage starts and ends: arguments, output folder, process state; exit codes, one line for each error."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.config.functions import import_from
from pipeline.config.reader import load, split_config
from pipeline.config.stage import StageArguments
from pipeline.config.stages import check_sharding
from pipeline.errors import UserError, describe_system_error
from pipeline.training import trackers
from pipeline.training.launcher import RUN_COMMAND, cpu_cores
from pipeline.training.lock import locked
from pipeline.training.logs import accept_any_terminal, set_up_logging
from pipeline.training.output_folder import StageOutput, holds_a_run
from pipeline.training.processes import Processes
from pipeline.training.run import Run
from pipeline.training.signals import Interruption

if TYPE_CHECKING:
    from pipeline.models.sharding import ShardingOptions

logger = logging.getLogger("pipeline")
ROOT = Path(__file__).resolve().parent.parent.parent
# Of a process for the others: one may fill the data cache, or run a user's rewards, for hours. One that has died ends all at once.
LONGEST_WAIT = datetime.timedelta(hours=6)
RANK_0_REPORTS_WITHIN = 15.0  # seconds; on a busy machine a process needs a while to end
Arguments = TypeVar("Arguments", bound=StageArguments)
Body = Callable[[Run[Arguments]], None]


def launch(name: str, cls: type[Arguments], body: Body[Arguments], argv: Sequence[str] | None = None) -> None:
    """A stage as a program: runs it, and turns its errors into one line and an exit code.

    Without --config, the demo's recipe.
    """
    accept_any_terminal()
    flags = list(sys.argv[1:] if argv is None else argv)
    rank = int(os.environ.get("RANK", "0"))
    try:
        run_stage(name, cls, body, flags)
    except UserError as error:
        message: str | None = str(error)
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
    except Exception as error:
        message = describe_system_error(error, output_folder(flags, cls))
        if message is None:
            raise
    else:
        return
    _report_error(f"{name}: {message}" if RUN_COMMAND in os.environ else str(message), rank)
    raise SystemExit(2)


def run_stage(name: str, cls: type[Arguments], body: Body[Arguments], flags: list[str]) -> None:
    """Run a stage's body in this process.

    Raises:
        UserError: what is wrong with the recipe, the data, a parent or the output folder.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    config, _ = split_config(flags)
    if config is None:
        config = ROOT / "recipes" / "demo" / f"{name}.yaml"
        flags = ["--config", str(config), *flags]
    args = load(cls, flags)
    import_from(config.parent)  # a recipe may carry its own rewards and judges
    with contextlib.ExitStack() as held:
        try:
            body(_claim(name, args, config, held))
        except SystemExit:  # interrupted, all processes alike
            end_process_group()
            raise
        end_process_group()


def output_folder(flags: list[str], cls: type[StageArguments]) -> Path | None:
    """The stage's output folder, for a message about its disk."""
    with contextlib.suppress(UserError):
        return Path(load(cls, flags).output_dir)
    return None


def _claim(name: str, args: Arguments, config: Path, held: contextlib.ExitStack) -> Run[Arguments]:
    """The run of a stage in its output folder, which no other process then writes to."""
    folder = Path(args.output_dir)
    check_output_folder(folder, args)
    processes, sharding = prepare_process(name, args)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output_dir {str(folder)!r} cannot be made: {error.strerror}") from error
    if processes.is_main:
        held.enter_context(locked(folder))
    set_up_logging(folder / "log.txt", processes.rank, args.quiet)
    _log_hardware(name, processes, sharding)
    trackers.set_up(args.trackers, folder, processes.rank)
    output = StageOutput(folder, name, dataclasses.asdict(args), config=str(config))
    return Run(name, args, output, Interruption(), processes, sharding)


def check_output_folder(folder: Path, args: StageArguments) -> None:
    """Refuse to write where something else lies.

    Raises:
        UserError: a file, the parent's folder, or a folder that no stage wrote.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir {str(folder)!r} is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not holds_a_run(folder):
        raise UserError(
            f"output_dir {str(folder)!r} holds files that no stage of ours wrote; name a new or empty folder"
        )
    parent = getattr(args, "parent", None)
    if parent and folder.resolve() == Path(parent).resolve():
        raise UserError(f"output_dir {str(folder)!r} is the parent too; it would be overwritten, name another folder")


def prepare_process(name: str, args: StageArguments) -> tuple[Processes, ShardingOptions | None]:
    """Threads, determinism, this process's place among the others, and how models are sharded over them.

    Raises:
        UserError: the stage does not run under this launch's sharding.
    """
    from pipeline.models.precision import accelerator_type
    from pipeline.models.sharding import take_options_of_launch

    import torch
    from accelerate import PartialState

    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("1", "true"):
        check_sharding(name, args, "DEEPSPEED")
    sharding = take_options_of_launch()
    if sharding is not None:
        check_sharding(name, args, "FSDP")
    PartialState(cpu=accelerator_type() == "cpu", timeout=LONGEST_WAIT)
    if args.threads:
        torch.set_num_threads(args.threads)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs a third of a step
    return Processes.of_this_launch(), sharding


def _log_hardware(name: str, processes: Processes, sharding: ShardingOptions | None) -> None:
    import torch
    from accelerate import PartialState

    threads, cores, device = torch.get_num_threads(), cpu_cores(), PartialState().device
    logger.info("%s: %d process(es) on %s, %d CPU threads each", name, processes.count, device, threads)
    if sharding is not None:
        groups = f", {sharding.replicas} times" if sharding.replicas > 1 else ""
        logger.info("%s: models are sharded over the processes%s (FSDP2)", name, groups)
    used = threads * processes.count
    if device.type == "cpu" and used < cores and processes.is_main:
        logger.warning("%d CPU thread(s) used of %d cores; set OMP_NUM_THREADS or --threads", used, cores)


def end_process_group() -> None:
    """Part from the other processes after all of them have come here; an unannounced end aborts those that wait."""
    import torch.distributed
    from accelerate import PartialState

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        PartialState().wait_for_everyone()
        PartialState().destroy_process_group()


def _report_error(message: str, rank: int) -> None:
    """One line, from rank 0 where it failed too; what only another rank met (its rows' rewards, say) that rank reports."""
    if rank != 0:
        ended: list[Any] = []
        signal.signal(signal.SIGTERM, lambda number, _: ended.append(number))
        time.sleep(RANK_0_REPORTS_WITHIN)  # the launcher ends this process when rank 0 has failed
        if ended:
            return
    print(f"error: {message}", file=sys.stderr, flush=True)

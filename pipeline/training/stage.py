"""What every stage does around its own work: arguments, threads, logs, signals, exit codes, lineage, the summary line."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import logging
import os
import signal
import sys
import time
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from pipeline.config import arguments
from pipeline.config.functions import import_from
from pipeline.errors import UserError
from pipeline.training import trackers
from pipeline.training.json_files import write_json
from pipeline.training.output_folder import LOCK, StageOutput, holds_a_run
from pipeline.training.processes import Processes

import yaml

logger = logging.getLogger("pipeline")
ROOT = Path(__file__).resolve().parent.parent.parent
ERROR_FILE = "RLHF_ERROR_FILE"  # where `rlhf run` reads a stage's own words: accelerate's launcher hides exit codes
TERMINAL = "RLHF_TERMINAL"  # set by `rlhf run` where a person reads its terminal
RANK_0_REPORTS_WITHIN = 3.0  # seconds
Arguments = TypeVar("Arguments", bound=arguments.StageArguments)


class Interruption:
    """SIGTERM or SIGINT ends the stage at its next safe point; a second signal ends it at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = number
        logger.warning("%s received: ending at the next safe point (again: at once)", signal.Signals(number).name)


@dataclasses.dataclass
class Run(Generic[Arguments]):
    """One running stage: its arguments, its output folder, its place among the processes."""

    name: str
    args: Arguments
    output: StageOutput
    interruption: Interruption
    processes: Processes = dataclasses.field(default_factory=Processes)

    @property
    def is_main(self) -> bool:
        return self.processes.is_main

    @property
    def show_progress(self) -> bool:
        return self.is_main and not self.args.quiet and on_terminal()

    def interrupted(self) -> bool:
        """Whether any process got a signal; the same answer in all of them."""
        got = self.processes.any(self.interruption.signal is not None)
        if got and self.interruption.signal is None:
            self.interruption.signal = signal.SIGTERM
        return got

    def leave_interrupted(self) -> typing.NoReturn:
        number = self.interruption.signal or signal.SIGTERM
        if self.is_main:
            command = f": {command_line()}" if self.processes.count == 1 else ""
            print(f"{self.name}: interrupted; run the same command again to resume{command}", flush=True)
        raise SystemExit(128 + number)

    def already_done(self) -> bool:
        """Whether the output is complete for these inputs; says so. Rank 0 looks, all know."""
        done = self.processes.from_main(self.output.finished)
        if done and self.is_main:
            print(f"{self.name}: already complete in {self.output.folder} for the same inputs", flush=True)
        return done

    def begin(self, checkpoint: Path | None) -> list[int]:
        """Start at `checkpoint`, or at nothing; returns the steps at which this run was resumed."""
        self.processes.barrier()  # all have found the checkpoint before broken ones go
        steps = self.processes.from_main(lambda: self.output.begin(checkpoint))
        if checkpoint:
            logger.info("%s: resuming from %s", self.name, checkpoint.name)
        return steps

    def finish(
        self,
        *,
        parents: list[dict[str, Any]],
        datasets: list[dict[str, Any]],
        tokenizer: Any,
        metrics: dict[str, Any],
        flops: float,
        resumed_from: list[int],
        summary: str,
    ) -> None:
        """On rank 0: model card, metrics.json, lineage.json; then one line on the terminal."""
        from pipeline.training.identity import tokenizer_hashes
        from pipeline.training.model_card import write_model_card

        seconds = self.output.seconds
        if self.is_main:
            tokenizer_hash, template_hash = tokenizer_hashes(tokenizer)
            write_model_card(self.output.folder, self.name, self.output.recipe, parents, datasets, metrics)
            lineage = {
                "parents": parents,
                "datasets": datasets,
                "tokenizer_sha256": tokenizer_hash,
                "chat_template_sha256": template_hash,
                "seconds": round(seconds, 2),
                "flops": flops,
                "started": _iso(self.output.started),
                "finished": _iso(time.time()),
                "processes": self.processes.count,
                "resumed_from": resumed_from,
            }
            self.output.finish(lineage, metrics)
            print(f"{self.name}: {summary} · {seconds:.0f} s · {self.output.folder}", flush=True)
        self.processes.barrier()


def launch(
    name: str, cls: type[Arguments], body: Callable[[Run[Arguments]], None], argv: Sequence[str] | None = None
) -> None:
    """Run a stage's body between argument parsing and exit code; without --config, the demo's recipe."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--config" not in argv and "--help" not in argv and "-h" not in argv:
        argv = ["--config", str(ROOT / "recipes" / "demo" / f"{name}.yaml"), *argv]
    config = Path(argv[argv.index("--config") + 1]) if "--config" in argv[:-1] else None
    if config is not None:
        import_from(config.parent)  # a recipe may carry its own rewards and judges
    rank = int(os.environ.get("RANK", "0"))
    with contextlib.ExitStack() as held:
        try:
            args = arguments.load(cls, argv)
            body(_open(name, args, config, rank, held))
        except UserError as error:
            _report_error(str(error), rank)
            raise SystemExit(2) from None
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EROFS, errno.EPERM):
                raise
            _report_error(f"{error.filename}: {error.strerror}; give this user the right to write there", rank)
            raise SystemExit(2) from None


def _open(name: str, args: Arguments, config: Path | None, rank: int, held: contextlib.ExitStack) -> Run[Arguments]:
    import torch
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available())
    folder = Path(args.output_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir {str(folder)!r} is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not holds_a_run(folder):
        raise UserError(
            f"output_dir {str(folder)!r} holds files that no stage of ours wrote; name a new or empty folder"
        )
    if getattr(args, "parent", None) and folder.resolve() == Path(str(args.parent)).resolve():  # type: ignore[attr-defined]
        raise UserError(f"output_dir {str(folder)!r} is the parent too; it would be overwritten, name another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output_dir {str(folder)!r} cannot be made: {error.strerror}") from error
    if rank == 0:
        held.enter_context(_lock(folder))
    if args.threads:
        torch.set_num_threads(args.threads)
    _set_up_logging(args, folder, rank)
    cores = cpu_cores()
    used = torch.get_num_threads() * state.num_processes
    logger.info(
        "%s: %d process(es) on %s, %d CPU threads each",
        name,
        state.num_processes,
        state.device,
        torch.get_num_threads(),
    )
    if state.device.type == "cpu" and used < cores and rank == 0:
        logger.warning("%d CPU thread(s) used of %d cores; set OMP_NUM_THREADS or --threads", used, cores)
    trackers.set_up(args.trackers, folder, rank)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs a third of a step
    output = StageOutput(folder, name, arguments.as_dict(args), config=str(config) if config else None)
    return Run(name, args, output, Interruption(), Processes.of_this_launch())


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Hold the output folder for this process: two runs at once would mix their checkpoints."""
    import fcntl

    with (folder / LOCK).open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"output_dir {str(folder)!r} is in use by another run; wait for it, or end it") from None
        except OSError as error:  # some network file systems know no locks
            logger.warning("%s cannot be locked (%s); do not start two runs in it", folder, error.strerror)
        yield


def quiet_libraries() -> None:
    """What libraries say while they load is not what our user asked; errors still pass."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    for name in ("trl", "py.warnings"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.captureWarnings(True)


def _set_up_logging(args: arguments.StageArguments, folder: Path, rank: int) -> None:
    """Everything to `log.txt`; to the terminal info lines, or only warnings with --quiet."""
    quiet_libraries()
    logger.handlers.clear()
    logger.propagate = False
    logger.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    console = logging.StreamHandler()
    console.setLevel(logging.WARNING if args.quiet else logging.INFO)
    console.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(console)
    if rank == 0:
        file = logging.FileHandler(folder / "log.txt", encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(file)


def accelerate_config(path: str) -> dict[str, Any]:
    """An accelerate config file as it stands.

    Raises:
        UserError: it cannot be read, or is none.
    """
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        int(found["num_processes"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"cannot be read as an accelerate config ({error!r})", file=path) from error
    return dict(found)


def refuse_sharded(why: str) -> None:
    """FSDP and DeepSpeed hold no whole model in any process."""
    for variable, name in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if os.environ.get(variable, "false").lower() in ("1", "true"):
            raise UserError(
                f"{why}, which does not work under {name} yet; use one process or DDP (recipes/accelerate/ddp.yaml)"
            )


def _report_error(message: str, rank: int) -> None:
    """One line, from rank 0 where it failed too; what only another rank met (its rows' rewards, say) that rank reports."""
    if rank != 0:
        asked_to_end: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, _: asked_to_end.append(number))
        time.sleep(RANK_0_REPORTS_WITHIN)  # the launcher ends this process when rank 0 has failed
        if asked_to_end:
            return
    print(f"error: {message}", file=sys.stderr, flush=True)
    if path := os.environ.get(ERROR_FILE):
        write_json(Path(path), {"message": message})


def cpu_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def on_terminal() -> bool:
    return sys.stderr.isatty() or bool(os.environ.get(TERMINAL))


def command_line() -> str:
    return " ".join(["python", *sys.argv])


def _iso(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")

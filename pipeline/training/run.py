"""One running stage: what its body is given, and what it calls at its start and end."""

from __future__ import annotations

import dataclasses
import datetime
import logging
import os
import shlex
import signal
import sys
import time
import typing
from pathlib import Path
from typing import Any, Generic, TypeVar

from pipeline.config.stage import StageArguments
from pipeline.training.launcher import RUN_COMMAND
from pipeline.training.logs import on_terminal
from pipeline.training.output_folder import StageOutput
from pipeline.training.processes import Processes
from pipeline.training.signals import Interruption

if typing.TYPE_CHECKING:
    from pipeline.models.sharding import ShardingOptions

logger = logging.getLogger("pipeline")
Arguments = TypeVar("Arguments", bound=StageArguments)


@dataclasses.dataclass
class Run(Generic[Arguments]):
    """One running stage: its arguments, its output folder, its place among the processes."""

    name: str
    args: Arguments
    output: StageOutput
    interruption: Interruption | None  # None where nothing is trained
    processes: Processes = dataclasses.field(default_factory=Processes)
    sharding: ShardingOptions | None = None

    @property
    def is_main(self) -> bool:
        return self.processes.is_main

    @property
    def show_progress(self) -> bool:
        return self.is_main and not self.args.quiet and on_terminal()

    def interrupted(self) -> bool:
        """Whether any process got a signal; the same answer in all of them."""
        assert self.interruption is not None
        got = self.processes.any(self.interruption.signal is not None)
        if got and self.interruption.signal is None:
            self.interruption.signal = signal.SIGTERM
        return got

    def leave_if_interrupted(self) -> None:
        """End the stage after a signal; called in all processes."""
        if self.interrupted():
            self.leave_interrupted()

    def leave_interrupted(self) -> typing.NoReturn:
        assert self.interruption is not None
        number = self.interruption.signal or signal.SIGTERM
        if self.is_main:
            print(f"{self.name}: interrupted; run the same command again to resume{self._command()}", flush=True)
        raise SystemExit(128 + number)

    def _command(self) -> str:
        """The command of this process, where it is the one that the user gave."""
        if RUN_COMMAND in os.environ:
            return f": {os.environ[RUN_COMMAND]}"
        return f": {shlex.join(['python', *sys.argv])}" if self.processes.count == 1 else ""

    def already_done(self) -> bool:
        """Whether the output is complete for these inputs; prints it if so. Rank 0 reads the folder and tells the others."""
        done = self.processes.from_main(self.output.finished)
        if done and self.is_main:
            print(f"{self.name}: already complete in {self.output.folder} for the same inputs", flush=True)
        return done

    def begin(self, checkpoint: Path | None) -> list[int]:
        """Start at `checkpoint`, or at nothing; returns the steps at which this run was resumed."""
        self.processes.barrier()  # all processes have chosen the checkpoint before broken ones are removed
        steps = self.processes.from_main(lambda: self.output.begin(checkpoint))
        if checkpoint:
            logger.info("%s: resuming from %s", self.name, checkpoint.name)
        return steps

    def round_saved_weights(self) -> None:
        """On rank 0: with `save_dtype: bf16`, round what was saved: the model, PPO's value model and moving average."""
        from pipeline.models.weight_files import round_weights_to_bf16

        if self.is_main and self.args.save_dtype == "bf16":
            for folder in (self.output.folder, self.output.folder / "value", self.output.folder / "ema"):
                if (folder / "config.json").is_file():
                    round_weights_to_bf16(folder)

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

        self.round_saved_weights()
        seconds = self.output.seconds
        if self.is_main:
            tokenizer_hash, template_hash = tokenizer_hashes(tokenizer)
            write_model_card(
                self.output.folder,
                self.name,
                recipe=self.output.recipe,
                parents=parents,
                datasets=datasets,
                metrics=metrics,
            )
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
                "sharding": self.sharding and "fsdp2",
                "resumed_from": resumed_from,
            }
            self.output.finish(lineage, metrics)
            print(f"{self.name}: {summary} · {seconds:.0f} s · {self.output.folder}", flush=True)
        self.processes.barrier()


def _iso(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")

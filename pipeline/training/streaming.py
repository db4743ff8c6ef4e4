"""A streamed dataset in a run: its commit, its position in checkpoints, its errors told to all processes."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from pipeline.data.entries import DatasetEntry
from pipeline.data.streaming import HubStream, StreamedBlocks
from pipeline.training.checkpoints import Manifest
from pipeline.training.json_files import NotAnObject, read_json_object, write_json
from pipeline.training.run import Run

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

POSITION = "stream.json"


def open_stream(run: Run[Any], entry: DatasetEntry, held_out_fraction: float) -> HubStream | None:
    """A streamed dataset at the commit that the run's checkpoints name, else at its newest; None where it is not streamed."""
    if not entry.streaming:
        return None
    revision = run.processes.from_main(lambda: _pinned(run) or HubStream(entry, held_out_fraction).revision)
    return HubStream(entry, held_out_fraction, revision)


def _pinned(run: Run[Any]) -> str | None:
    """The commit at which an earlier start of the run read its stream."""
    for checkpoint in reversed(run.output.checkpoints()):
        with contextlib.suppress(NotAnObject, KeyError, IndexError, TypeError):
            revision: str | None = Manifest.read(checkpoint).inputs["data"][0]["revision"]
            return revision
    return None


class StreamPosition(TrainerCallback):
    """Saves the position of the blocks with each checkpoint and goes there at a resume.

    Added before `StageCallback`, which seals the checkpoint. The first process reads the stream for all; where it fails, all of them end.
    """

    def __init__(self, blocks: StreamedBlocks, run: Run[Any], trainer: Any):
        self.blocks, self.run, self.trainer = blocks, run, trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        checkpoint = self.trainer.stage_callback.resumed_from
        if checkpoint is not None:
            self.blocks.go_to(read_json_object(checkpoint / POSITION))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.run.processes.any(self.blocks.error is not None):
            self.run.processes.from_main(self._raise_error)

    def _raise_error(self) -> None:
        if self.blocks.error is not None:
            raise self.blocks.error

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.run.is_main:
            checkpoint = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            write_json(checkpoint / POSITION, self.blocks.position(state.global_step * self.run.args.examples_per_step))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.blocks.close()

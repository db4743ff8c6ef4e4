"""Which checkpoints sharded processes resume."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import UserError
from pipeline.training.checkpoints import Manifest, seal
from pipeline.training.sharded_trainer import check_resumable

import pytest


def checkpoint(folder: Path, step: int, best: int, *, parts: bool) -> Path:
    made = folder / f"checkpoint-{step}"
    (made / ("tensors" if parts else "whole")).mkdir(parents=True)
    manifest = Manifest(
        step=step, stage="sft", fingerprint="f", recipe={}, inputs={}, files={}, seconds=1.0, best=f"checkpoint-{best}"
    )
    seal(made, manifest)
    return made


@pytest.mark.parametrize(("parts", "best", "sharded"), [(True, 4, False), (True, 2, True), (False, 2, False)])
def test_checkpoints_that_are_resumed(tmp_path: Path, parts: bool, best: int, sharded: bool) -> None:
    checkpoint(tmp_path, 2, 2, parts=parts)
    check_resumable(checkpoint(tmp_path, 4, best, parts=parts), sharded=sharded)


def test_whole_best_weights_are_refused_to_sharded_processes(tmp_path: Path) -> None:
    """At the start, in one line: they are read at the end of the training."""
    checkpoint(tmp_path, 2, 2, parts=False)
    with pytest.raises(
        UserError, match=r"^checkpoint-2, the best until checkpoint-4, was written without FSDP2; resume"
    ):
        check_resumable(checkpoint(tmp_path, 4, 2, parts=False), sharded=True)

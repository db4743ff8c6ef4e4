"""Output folders of stages without the stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.training.output_folder import StageOutput

import torch
from safetensors.torch import save_file

RECIPE = {
    "learning_rate": 1e-3, "output_dir": "x", "datasets": [{"path": "a", "weight": None}], "seed": 0, "stop_tokens": ["<|im_end|>"],
}  # fmt: skip


def output(folder: Path, **changes: Any) -> StageOutput:
    return StageOutput(folder, "sft", {**RECIPE, **changes}, {"data": "d", "parent": "p"})


def finished(
    folder: Path, metrics: dict[str, Any] | None = None, inputs: dict[str, Any] | None = None, **changes: Any
) -> StageOutput:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"w": torch.zeros(2)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    run = output(folder, **changes)
    run.inputs = inputs or run.inputs
    run.finish({"parents": [], "datasets": [], "seconds": 1.0}, {"loss": 1.0} if metrics is None else metrics)
    return run


def sealed(run: StageOutput, step: int) -> Path:
    """A checkpoint of one file."""
    folder = run.folder / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "optimizer.pt").write_bytes(b"state" * step)
    run.seal(folder)
    return folder

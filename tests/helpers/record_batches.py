"""Run a stage and store the token ids of its steps: `record_batches.py STAGE OUT -- flags`, one file per process."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from pipeline.config.stages import STAGES
from pipeline.training.stage import launch

from accelerate import PartialState
from torch import nn


def main(stage: str, out: Path, flags: list[str]) -> None:
    module = importlib.import_module(f"pipeline.{stage}")
    train = module.train
    batches: list[list[list[int]]] = []

    def recorded(trainer: Any, run: Any) -> Any:
        embeddings: nn.Module = trainer.model.get_input_embeddings()

        def record(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            if trainer.model.training:
                batches.append(inputs[0].tolist())

        embeddings.register_forward_pre_hook(record)
        return train(trainer, run)

    module.train = recorded
    launch(stage, STAGES[stage], module.main, flags)
    out.with_name(f"{out.name}-{PartialState().process_index}.json").write_text(json.dumps(batches))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[4:])

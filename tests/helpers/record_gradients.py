"""Run a stage and store the gradients of its first update: `record_gradients.py STAGE OUT [ROLLOUT] -- flags`.

PPO's rollout is stored in ROLLOUT by the first run and read by the next, so that both update on the same one.
"""

from __future__ import annotations

import importlib
import pickle
import sys
from pathlib import Path
from typing import Any

from pipeline.config.stages import STAGES
from pipeline.models.sharding import whole
from pipeline.training.stage import launch

import torch
from accelerate import Accelerator, PartialState


class Done(Exception):
    """The first update's gradients are stored."""


def store(out: Path, name: str, parameters: Any) -> None:
    gradients = [whole(p.grad).clone() for p in parameters if p.grad is not None]
    assert gradients
    if PartialState().is_main_process:
        torch.save(gradients, out.with_name(f"{out.name}-{name}.pt"))


def main(stage: str, out: Path, rollout_file: Path, flags: list[str]) -> None:
    module = importlib.import_module(f"pipeline.{stage}")
    if stage == "ppo":
        collect, clip = module.collect_rollout, module.clip_grad_norm
        names = iter(("policy", "value"))

        def stored(*args: Any) -> Any:
            if rollout_file.is_file():
                return pickle.loads(rollout_file.read_bytes())
            collected = collect(*args)
            rollout_file.write_bytes(pickle.dumps(collected))
            return collected

        def record(parameters: Any, *args: Any) -> Any:
            parameters = list(parameters)
            name = next(names)
            store(out, name, parameters)
            if name == "value":
                PartialState().wait_for_everyone()
                raise Done
            return clip(parameters, *args)

        module.collect_rollout = stored
        module.clip_grad_norm = record
    else:

        def record_trainer(self: Any, parameters: Any, *args: Any, **kwargs: Any) -> Any:
            store(out, "model", parameters)
            PartialState().wait_for_everyone()
            raise Done

        Accelerator.clip_grad_norm_ = record_trainer
    try:
        launch(stage, STAGES[stage], module.main, flags)
    except Done:
        print(f"processes: {PartialState().num_processes}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[5:])

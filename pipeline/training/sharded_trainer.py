"""transformers' Trainer over a model that our own FSDP2 shards: placement, gradient norms, checkpoints of parts.

Ties to the insides of transformers' Trainer (5.23), all in this file: `is_distributed_loading_by_transformers`, by which it
leaves placement and the exchange of gradients to the model (its own `__init__` would refuse checkpoints then, so it is set
afterwards), and the methods that `ShardedTrainer` overrides. tests/training/test_trainer.py fails where one is gone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import UserError, shorten
from pipeline.models.precision import accelerator_type, device_plan
from pipeline.models.sharding import Sharding, save_whole, whole
from pipeline.training.checkpoints import Manifest
from pipeline.training.processes import Processes
from pipeline.training.run import Run
from pipeline.training.tensor_files import PARTS, changed_names, read_tensors, shard_tensors, write_tensors

import torch
from accelerate import PartialState
from peft import PeftModel
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME


def sharding_of(run: Run[Any]) -> Sharding | None:
    """How a Trainer stage's models are sharded in this launch."""
    if run.sharding is None:
        return None
    bf16 = device_plan(accelerator_type(), run.args.precision).bf16
    return Sharding(run.sharding, run.processes.count, PartialState().device, bf16=bf16)


def holds_parts(checkpoint: Path | str) -> bool:
    """Whether sharded processes wrote a checkpoint; any number of processes, sharded or not, reads it."""
    return (Path(checkpoint) / PARTS).is_dir()


def check_resumable(checkpoint: Path, *, sharded: bool) -> None:
    """Refuse sharded processes a checkpoint whose best weights were written by processes that each held all weights."""
    best = Manifest.read(checkpoint).best
    if sharded and best is not None and not holds_parts(checkpoint.parent / best):
        raise UserError(
            f"{best}, the best until {checkpoint.name}, was written without FSDP2; resume without it "
            "(recipes/accelerate/ddp.yaml), or start in a new output_dir"
        )


class ShardedTrainer:
    """Mixed in before a Trainer class.

    Args:
        sharding: shards the model when training starts; None leaves it whole.
    """

    model: Any
    args: Any
    state: Any
    optimizer: Any
    lr_scheduler: Any

    def __init__(self, *, sharding: Sharding | None = None, **options: Any):
        self.sharding = sharding
        super().__init__(**options)
        self.is_distributed_loading_by_transformers = sharding is not None
        self.first_save = True

    def _move_model_to_device(self, model: Any, device: Any) -> None:
        """A model to be sharded stays on the CPU: no device may have room for all of it."""
        if self.sharding is None:
            super()._move_model_to_device(model, device)  # type: ignore[misc]

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        if self.sharding is not None:
            self.sharding.shard(self.model)
        return super()._prepare_for_training(*args, **kwargs)  # type: ignore[misc]

    def _defer_fsdp_gradient_reduction(self) -> Any:
        """Every micro-batch's gradients are exchanged: those that waited for the last one would be whole in every process."""
        return contextlib.nullcontext()

    def _clip_grad_norm(self, model: Any) -> Any:
        return whole(super()._clip_grad_norm(model))  # type: ignore[misc]

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[misc]
        return whole(norm) if isinstance(norm, torch.Tensor) else norm

    # ------------------------------------------------------------------------------------------ checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Of a sharded model: the whole model, written by the first process; a checkpoint's parts are written with the optimizer's."""
        folder = Path(output_dir or self.args.output_dir)
        if self.sharding is None:
            super().save_model(output_dir, _internal_call)  # type: ignore[misc]
        elif not _internal_call:
            save_whole(self.model, folder)
        elif self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)  # where it is missing, it is not taken for the best

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.sharding is None:
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
            return
        folder, processes = Path(output_dir), Processes.of_this_launch()
        if processes.is_main:
            torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)
        processes.barrier()
        tensors = {"model": self._trained_tensors(), "optimizer": self.optimizer.state_dict()}
        write_tensors(folder, tensors, processes)
        if self.first_save:  # before hours pass
            self.first_save = False
            if changed := changed_names(folder, tensors, processes):
                raise UserError(
                    f"what was saved reads back differently ({shorten(', '.join(changed))}); the checkpoint before it is "
                    "as it was: try another disk, and other versions of torch and its drivers",
                    file=folder,
                )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Parts are read once the model is sharded and the optimizer is there."""
        check_resumable(Path(resume_from_checkpoint), sharded=self.sharding is not None)
        if not holds_parts(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or (self.sharding is None and not holds_parts(checkpoint)):
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
            return
        folder, like = Path(checkpoint), {"model": self._trained_tensors(), "optimizer": self._optimizer_tensors()}
        if holds_parts(folder):
            read = read_tensors(folder, like)
            self._set_weights(read["model"])
            states = read["optimizer"]
        else:
            states = torch.load(folder / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
            states = shard_tensors(states, like["optimizer"])
        self.optimizer.load_state_dict(states)
        self.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER_NAME, weights_only=True))

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if holds_parts(best):
            self._set_weights(read_tensors(Path(best), {"model": self._trained_tensors()})["model"])
        else:
            super()._load_best_model()  # type: ignore[misc]

    def _trained_tensors(self) -> dict[str, torch.Tensor]:
        """What training changes: all of a model's state, or its trained parameters where adapters are trained."""
        state: dict[str, torch.Tensor] = self.model.state_dict()  # it also brings parameters back to their parts
        if isinstance(self.model, PeftModel):
            trained = {name for name, p in self.model.named_parameters() if p.requires_grad}
            return {name: tensor for name, tensor in state.items() if name in trained}
        return state

    def _optimizer_tensors(self) -> dict[str, Any]:
        """AdamW's tensors by the names of its state_dict: moments are sharded as their parameters are."""
        parameters = [p.data for group in self.optimizer.param_groups for p in group["params"]]
        step = torch.zeros((), dtype=torch.float32)
        return {"state": {i: {"step": step, "exp_avg": p, "exp_avg_sq": p} for i, p in enumerate(parameters)}}

    def _set_weights(self, tensors: Mapping[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in self._trained_tensors().items():
                tensor.copy_(tensors[name])

"""The state of a PPO run, and its resumable checkpoints."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import shutil
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.algorithms.ppo import RunningMoments
from pipeline.errors import UserError
from pipeline.models.sharding import whole
from pipeline.training.checkpoints import BEST, being_written, writing
from pipeline.training.json_files import write_json
from pipeline.training.output_folder import StageOutput
from pipeline.training.processes import Processes
from pipeline.training.random_states import random_states, set_random_states
from pipeline.training.tensor_files import changed_names, map_tensors, read_tensors, shard_tensors, write_tensors

import torch

logger = logging.getLogger("pipeline.ppo")
STATE, RANDOM = "state.json", "random.pt"


@dataclass
class PPOState:
    """The state of a run beside its tensors.

    rollout: rollouts done. policy_steps, value_steps: optimizer steps. flops: floating-point operations of training.
    moments: of the scores, for `scale_scores`. best: the best value of `best_metric`. ended: why the run ended early.
    """

    kl_coef: float
    rollout: int = 0
    policy_steps: int = 0
    value_steps: int = 0
    flops: float = 0.0
    moments: RunningMoments = field(default_factory=RunningMoments)
    best: float | None = None
    best_rollout: int | None = None
    evaluations_since_best: int = 0
    ended: str | None = None

    @classmethod
    def read(cls, checkpoint: Path) -> PPOState:
        """The state in a checkpoint.

        Raises:
            UserError: another version of this package wrote other fields.
        """
        values = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        try:
            return cls(**{**values, "moments": RunningMoments(**values["moments"])})
        except (KeyError, TypeError) as error:
            raise _of_another_version(checkpoint / STATE) from error


def save_checkpoint(
    output: StageOutput, state: PPOState, tensors: Mapping[str, Any], processes: Processes, *, check: bool = False
) -> None:
    """A resumable checkpoint at a rollout's boundary, written beside and renamed into place; called by every process.

    The best networks until here are copied into it: those beside it may be of a later rollout when it is resumed.

    Args:
        tensors: state dictionaries by name; each process's random state is written beside them.
        check: read sharded tensors back before the checkpoint gets its name.

    Raises:
        UserError: what was read back differs.
    """
    states = processes.gather(lambda: [random_states()])
    checkpoint = output.folder / f"checkpoint-{state.rollout}"
    with writing(checkpoint) if processes.is_main else contextlib.nullcontext(being_written(checkpoint)) as folder:
        processes.barrier()  # the folder is there
        write_tensors(folder, tensors, processes)
        if check and (changed := changed_names(folder, tensors, processes)):
            raise UserError(
                f"{checkpoint.name} does not read back as it was written ({changed[0]}); look at the disk, and start the "
                "same command again"
            )
        if processes.is_main:
            torch.save(states, folder / RANDOM)
            write_json(folder / STATE, asdict(state))
            if state.best_rollout is not None:
                shutil.copyfile(output.folder / BEST, folder / BEST)
            output.seal(folder)
    if processes.is_main:
        output.prune(output.recipe["keep_checkpoints"])
    processes.barrier()


def load_checkpoint(checkpoint: Path, like: Mapping[str, Any], processes: Processes) -> dict[str, Any]:
    """The tensors of a checkpoint, sharded as those in `like` are; its best networks are put back beside it.

    This process's random state is set where the number of processes is the same; else the run goes on up to rounding only.
    """
    if processes.is_main and (checkpoint / BEST).is_file():
        shutil.copyfile(checkpoint / BEST, checkpoint.parent / BEST)
    if not (checkpoint / RANDOM).is_file():
        raise _of_another_version(checkpoint)
    states = torch.load(checkpoint / RANDOM, map_location="cpu", weights_only=True)
    if not isinstance(states, list) or not all(isinstance(state, dict) for state in states):
        raise _of_another_version(checkpoint / RANDOM)
    if len(states) == processes.count:
        set_random_states(states[processes.rank])
    else:
        logger.warning(
            "ppo: %s was saved by %d process(es), now there are %d: equal up to rounding, and rewards that draw random "
            "numbers draw others",
            checkpoint.name,
            len(states),
            processes.count,
        )
    return read_tensors(checkpoint, like)


def _of_another_version(file: Path) -> UserError:
    return UserError(
        "another version of this package wrote this checkpoint, and it cannot be resumed exactly; "
        "finish the run with that version, or start it again with another output_dir",
        file=file,
    )


def save_best(folder: Path, tensors: Mapping[str, Any], processes: Processes) -> None:
    """Keep the networks of the best evaluation beside the checkpoints, until the run has finished; called by every process."""
    wholes = map_tensors(
        tensors, lambda tensor: whole(tensor).cpu() if processes.is_main else whole(tensor).new_empty(0)
    )
    if processes.is_main:
        temporary = folder / (BEST + ".tmp")
        torch.save(wholes, temporary)
        os.replace(temporary, folder / BEST)
    processes.barrier()


def load_best(folder: Path, like: Mapping[str, Any]) -> dict[str, Any]:
    """The networks that `save_best` kept, sharded as those in `like` are.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        best: dict[str, Any] = torch.load(folder / BEST, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, LookupError, EOFError, pickle.UnpicklingError, struct.error) as error:
        raise UserError(
            "is missing or damaged; nothing else is lost: start the same command again, it resumes from the last checkpoint",
            file=folder / BEST,
        ) from error
    return shard_tensors(best, like)

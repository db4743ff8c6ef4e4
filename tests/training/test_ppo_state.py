"""PPO's checkpoints: the random states that reward functions draw from."""

from __future__ import annotations

import random
from pathlib import Path

from helpers.outputs import output
from pipeline.training.ppo_state import PPOState, load_checkpoint, save_checkpoint
from pipeline.training.processes import Processes

import numpy as np
import torch


def test_every_random_state_goes_on_where_the_checkpoint_was_saved(tmp_path: Path) -> None:
    """A reward function may draw from any of them, and a resumed run must see the numbers of an uninterrupted one."""

    def draws() -> tuple[float, float, float, float]:
        return random.random(), random.gauss(0, 1), float(np.random.normal()), float(torch.rand(()))

    tmp_path.joinpath("out").mkdir()
    run = output(tmp_path / "out", keep_checkpoints=1)
    draws()  # numpy and random keep a second normal number back
    save_checkpoint(run, PPOState(0.1, rollout=2), {"weights": torch.ones(2)}, Processes())
    expected = draws()
    saved = load_checkpoint(tmp_path / "out" / "checkpoint-2", Processes())
    assert list(saved) == ["weights"]
    assert draws() == expected

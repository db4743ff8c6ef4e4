"""PPO's checkpoints: the random states that reward functions draw from."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

from helpers.outputs import output
from pipeline.errors import UserError
from pipeline.training.ppo_state import PPOState, load_checkpoint, save_checkpoint
from pipeline.training.processes import Processes

import numpy as np
import pytest
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
    saved = load_checkpoint(tmp_path / "out" / "checkpoint-2", {"weights": torch.zeros(2)}, Processes())
    assert torch.equal(saved["weights"], torch.ones(2))
    assert draws() == expected


@pytest.mark.parametrize("random_states", [[torch.zeros(3, dtype=torch.uint8)], None], ids=["one tensor", "none"])
def test_a_checkpoint_with_other_random_states_is_refused_in_one_line(tmp_path: Path, random_states: Any) -> None:
    torch.save({"weights": torch.ones(2)}, tmp_path / "tensors.pt")
    torch.save(random_states, tmp_path / "random.pt")
    with pytest.raises(
        UserError, match=r"random\.pt: another version of this package wrote this checkpoint.*output_dir"
    ):
        load_checkpoint(tmp_path, {"weights": torch.ones(2)}, Processes())


def test_a_checkpoint_without_random_states_is_refused_in_one_line(tmp_path: Path) -> None:
    torch.save({"weights": torch.ones(2), "random": [{}]}, tmp_path / "tensors.pt")
    with pytest.raises(UserError, match="another version of this package wrote this checkpoint"):
        load_checkpoint(tmp_path, {"weights": torch.ones(2)}, Processes())


def test_a_checkpoint_with_other_fields_is_refused_in_one_line(tmp_path: Path) -> None:
    values = dataclasses.asdict(PPOState(0.1))
    for changed in ({**values, "steps": 3}, {k: v for k, v in values.items() if k != "moments"}):
        (tmp_path / "state.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match=r"state\.json: another version of this package"):
            PPOState.read(tmp_path)

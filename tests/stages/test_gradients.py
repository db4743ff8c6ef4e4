"""In fp32 without dropout, the first update of two processes is that of one, at the same global batch."""

from __future__ import annotations

from pathlib import Path

from helpers.launches import ROOT, STAGES, launch, parents, tiny_flags

import pytest
import torch

SCRIPT = str(ROOT / "tests" / "helpers" / "record_gradients.py")


@pytest.mark.parametrize("stage", [pytest.param(s, marks=[pytest.mark.full] if s != "ppo" else []) for s in STAGES])
def test_first_gradients_of_one_and_two_processes(chain: Path, recipes: Path, tmp_path: Path, stage: str) -> None:
    for processes in (1, 2):
        # Two processes also cut their rows into unequally many micro-batches.
        changes = (
            {"micro_batch_tokens": 4096 if processes == 1 else 300}
            if stage == "ppo"
            else {"examples_per_device": 4 if stage != "reward" else 2}
        )
        flags = tiny_flags(
            stage,
            tmp_path / str(processes),
            config=recipes / f"{stage}.yaml",
            report_to=None,
            **parents(stage, chain),
            **changes,
        )
        done = launch(
            SCRIPT,
            [stage, str(tmp_path / f"p{processes}"), str(tmp_path / "rollout.pkl"), "--", *flags],
            processes=processes,
        )
        assert f"processes: {processes}" in done.stdout
    names = ("policy", "value") if stage == "ppo" else ("model",)
    for name in names:
        one, two = (torch.load(tmp_path / f"p{processes}-{name}.pt") for processes in (1, 2))
        assert len(one) == len(two) > 10
        whole_one, whole_two = (torch.cat([g.flatten() for g in gradients]) for gradients in (one, two))
        assert whole_one.norm() > 0
        relative = (whole_one - whole_two).norm() / whole_one.norm()
        assert relative < 1e-5, f"{name}: relative difference {relative:.2e}"

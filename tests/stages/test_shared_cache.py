"""Two processes read one data cache, and see the batches of one process at the same global batch."""

from __future__ import annotations

import json
import os
from pathlib import Path

from helpers.launches import ROOT, launch, parents, tiny_flags
from pipeline.data.cache import LOCKS, DataCache

import pytest

SCRIPT = str(ROOT / "tests" / "helpers" / "record_batches.py")
STEPS = 50


def steps_of(folder: Path, processes: int) -> list[list[list[int]]]:
    """The rows of each step, over all processes, without padding and sorted."""
    shares = [json.loads((folder / f"p{processes}-{rank}.json").read_text()) for rank in range(processes)]
    batches = len(shares[0]) // STEPS  # of one process in one step
    steps = []
    for step in range(STEPS):
        own = [row for share in shares for batch in share[step * batches : (step + 1) * batches] for row in batch]
        steps.append(sorted(row[: max((i + 1 for i, token in enumerate(row) if token != 1), default=0)] for row in own))
    return steps


@pytest.mark.full
@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_two_processes_build_one_cache_and_see_the_batches_of_one(
    chain: Path, recipes: Path, tmp_path: Path, stage: str
) -> None:
    caches = []
    for processes in (1, 2):
        cache = tmp_path / f"cache{processes}"
        flags = tiny_flags(
            stage,
            tmp_path / str(processes),
            config=recipes / f"{stage}.yaml",
            report_to=None,
            data_cache=cache,
            max_steps=STEPS,
            examples_per_step=4,
            examples_per_device=2,
            **parents(stage, chain),
        )
        launch(SCRIPT, [stage, str(tmp_path / f"p{processes}"), "--", *flags], processes=processes)
        caches.append(sorted(entry.folder.name for entry in DataCache(cache).entries()))
        assert sorted(os.listdir(cache)) == sorted([*caches[-1], LOCKS])
    assert caches[0] == caches[1] != []
    one, two = (steps_of(tmp_path, processes) for processes in (1, 2))
    assert one == two
    assert len({json.dumps(step) for step in one}) > STEPS // 2

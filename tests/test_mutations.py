"""The tests notice known bugs: `scripts/mutation_check.py` puts each of them back."""

from __future__ import annotations

import os
import subprocess
import sys

from helpers.launches import ROOT

import pytest


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_every_known_bug_is_caught_by_its_test() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "mutation_check.py")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    missed = [line for line in done.stdout.splitlines() if line.startswith("MISSED")]
    assert done.returncode == 0, f"{missed}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    *_, last = done.stdout.splitlines()
    count = last.removeprefix("caught ").partition(" of ")
    assert count[0] == count[2]

"""A sample of scripts/kill_enumerator.py: killed at any file operation and resumed, a stage ends as if undisturbed."""

from __future__ import annotations

import subprocess
import sys

from helpers.launches import ROOT, STAGES, environment

import pytest


@pytest.mark.full
@pytest.mark.parametrize("stage", STAGES)
def test_kills_at_file_operations(stage: str) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "kill_enumerator.py"), "--stages", stage, "--sample", "6"]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert done.stdout.splitlines()[-1] == "identical 14 of 14", "six kills and one undisturbed run, in two variants"

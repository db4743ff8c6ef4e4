"""Run a stage on this machine's GPU: `measured_stage.py STAGE FLAGS…`; the last line is JSON with its peak memory."""

from __future__ import annotations

import importlib
import json
import sys

from pipeline.config.stages import STAGES
from pipeline.training.stage import launch

import torch

if __name__ == "__main__":
    stage, *flags = sys.argv[1:]
    launch(stage, STAGES[stage], importlib.import_module(f"pipeline.{stage}").main, flags)
    print(json.dumps({"peak_bytes": torch.cuda.max_memory_allocated()}))

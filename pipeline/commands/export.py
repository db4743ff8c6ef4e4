"""`rlhf export RUN_OR_STAGE --to FOLDER`: what is shipped of a run, and nothing else."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="RUN_OR_STAGE", type=os.path.expanduser,
        help="folder of one stage, or of a run: then the first finished one of ppo, sft, pretrain, reward",
    )  # fmt: skip
    parser.add_argument("--to", required=True, metavar="FOLDER", type=os.path.expanduser, help="a new or empty folder")
    parser.add_argument(
        "--dtype", choices=["fp32", "bf16"], default="fp32", help="of the weights (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    from pipeline.commands.shipped_model import export
    from pipeline.training.logs import quiet_libraries

    quiet_libraries()
    target = Path(args.to)
    stage = export(Path(args.source), target, args.dtype)
    size = sum(path.stat().st_size for path in target.rglob("*"))
    print(f"export: {stage.stage} of {stage.path} in {target}, {args.dtype}, {size / 2**20:,.1f} MiB")
    return 0

"""`rlhf push RUN_OR_STAGE --to OWNER/NAME`: what `rlhf export` makes, to the Hugging Face Hub."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="RUN_OR_STAGE", type=os.path.expanduser,
        help="folder of one stage, or of a run: then the first finished one of ppo, sft, pretrain, reward",
    )  # fmt: skip
    parser.add_argument("--to", required=True, metavar="OWNER/NAME", help="repository of the Hub; made if it is new")
    parser.add_argument(
        "--dtype", choices=["fp32", "bf16"], default="fp32", help="of the weights (default: %(default)s)"
    )
    parser.add_argument("--public", action="store_true", help="a new repository that everybody sees; default: private")
    parser.add_argument("--update", action="store_true", help="add a commit to a repository that exists")
    parser.add_argument(
        "--dry-run", action="store_true", help="list files, sizes and the card's metadata; upload nothing"
    )


def run(args: argparse.Namespace) -> int:
    from pipeline.commands.upload import Upload, push
    from pipeline.training.logs import quiet_libraries

    from huggingface_hub import HfApi

    quiet_libraries()
    options = Upload(repository=args.to, dtype=args.dtype, public=args.public, update=args.update, dry_run=args.dry_run)
    push(Path(args.source), options, HfApi(library_name="rlhf-pipeline"))
    return 0

"""`rlhf check`: a recipe, a recipe's dry run, or a file of comparisons, before anything is launched."""

from __future__ import annotations

import argparse

from pipeline.commands.check_data import check_data, is_data


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target",
        help="recipe folder, or one stage's YAML; or comparisons: a .jsonl, .jsonl.gz, .parquet, card folder",
    )
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--dry-run", action="store_true", help="one real step of every stage, shrunk")
    recipe.add_argument("--data-root", help="what relative dataset paths are relative to")
    recipe.add_argument("--parent", help="model that the first stage starts from")
    recipe.add_argument("--accelerate", metavar="FILE", help="the accelerate config it will run under, with --dry-run")
    data = parser.add_argument_group("comparisons")
    data.add_argument("--tokenizer", metavar="DIR", help="count tokens with this tokenizer")
    data.add_argument(
        "--against", nargs="+", default=[], metavar="FILE", help="files whose prompts should not be in them"
    )
    data.add_argument("--column", action="append", default=[], metavar="OURS=THEIRS", help="a column of another name")
    data.add_argument("--split", default="train", help="split of a card folder")
    data.add_argument("--held-out-fraction", type=float, default=0.1, help="share of the hash split")
    data.add_argument("--seed", type=int, default=0, help="of the samples")
    data.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    if is_data(args.target):
        return check_data(
            args.target,
            tokenizer=args.tokenizer,
            against=args.against,
            columns=args.column,
            as_json=args.json,
            held_out_fraction=args.held_out_fraction,
            split=args.split,
            seed=args.seed,
        )
    from pipeline.training.logs import quiet_libraries

    quiet_libraries()
    if args.dry_run:
        from pipeline.commands.dry_run import dry_run

        return dry_run(args.target, args.data_root, args.parent, args.accelerate)
    from pipeline.commands.check_recipe import check_recipe

    return check_recipe(args.target, args.data_root, args.parent)

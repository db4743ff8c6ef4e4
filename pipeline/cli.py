"""The console command `rlhf`: run a recipe's stages, check before, report after."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pipeline import __version__
from pipeline.errors import UserError


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="rlhf", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run", help="all stages of a recipe, in order; finished ones are skipped, interrupted ones resume"
    )
    run.add_argument("recipe", help="folder with pretrain.yaml, sft.yaml, reward.yaml, ppo.yaml (any of them)")
    run.add_argument("--output-dir", help="folder of the run; default: what the recipe's stages say")
    run.add_argument("--from", dest="first", metavar="STAGE", help="first stage to run")
    run.add_argument("--to", dest="last", metavar="STAGE", help="last stage to run")
    run.add_argument("--accelerate", metavar="FILE", help="an accelerate config, e.g. recipes/accelerate/fsdp2.yaml")
    run.add_argument("--num-processes", type=int, help="processes of each stage")
    run.add_argument("--data-root", help="what relative dataset paths are relative to")
    run.add_argument("--parent", help="model that the first stage starts from, instead of the recipe's")
    run.add_argument("--seed", type=int, help="seed of every stage, instead of the recipe's")
    run.add_argument("--quiet", action="store_true", help="summary lines and warnings only")

    check = commands.add_parser("check", help="validate a recipe: YAML, data, tokenizer, template, lengths")
    check.add_argument("recipe", help="recipe folder, or one stage's YAML")
    check.add_argument("--data-root", default=None, help="what relative dataset paths are relative to")

    report = commands.add_parser("report", help="measure a run and write report/report.json and report/index.html")
    report.add_argument("run_dir", help="folder that holds the stages' outputs, e.g. runs/demo")
    report.add_argument(
        "--judge", action="append", default=[], metavar="MODULE:FUNCTION", help="Python judge; may be given again"
    )
    report.add_argument("--prompts", metavar="FILE", help="held-out prompts; default: those of the PPO recipe")
    report.add_argument("--num-prompts", type=int, default=200, help="held-out prompts answered by every stage")
    report.add_argument("--data-root", default=None, help="what relative dataset paths are relative to")

    args = parser.parse_args(argv)
    try:
        code = _dispatch(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    raise SystemExit(code)


def _dispatch(args: argparse.Namespace) -> int:
    # Imported late: `rlhf --help` should not load torch.
    if args.command == "run":
        from pipeline.run import run_recipe

        return run_recipe(args)
    if args.command == "check":
        from pipeline.check import check_recipe
        from pipeline.stage import quiet_libraries

        quiet_libraries()
        return check_recipe(args.recipe, args.data_root)
    from pipeline.report import write_report
    from pipeline.stage import quiet_libraries

    quiet_libraries()

    write_report(
        args.run_dir,
        judges=args.judge,
        prompts_file=args.prompts,
        num_prompts=args.num_prompts,
        data_root=args.data_root,
    )
    return 0


if __name__ == "__main__":
    main()

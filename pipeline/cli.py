"""The console command `rlhf`: run a recipe's stages, check before, report after."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pipeline import __version__
from pipeline.commands import report as report_command
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
    run.add_argument("--reward-seeds", type=int, metavar="K", help="train K reward models, to <reward>-seed-1 …")
    run.add_argument(
        "--labeler-folds", type=int, metavar="K", help="train K reward models, each without one group of labelers"
    )
    run.add_argument("--quiet", action="store_true", help="summary lines and warnings only")

    check = commands.add_parser("check", help="validate a recipe, or survey a file of comparisons")
    check.add_argument(
        "target", help="recipe folder, or one stage's YAML; or comparisons: a .jsonl, .jsonl.gz, .parquet, card folder"
    )
    check.add_argument("--data-root", default=None, help="recipe: what relative dataset paths are relative to")
    check.add_argument("--dry-run", action="store_true", help="recipe: one real step of every stage, shrunk")
    check.add_argument("--parent", help="recipe: model that the first stage starts from, with --dry-run")
    check.add_argument(
        "--accelerate", metavar="FILE", help="recipe: the accelerate config it will run under, with --dry-run"
    )
    check.add_argument("--tokenizer", metavar="DIR", help="comparisons: count tokens with this tokenizer")
    check.add_argument(
        "--against",
        nargs="+",
        default=[],
        metavar="FILE",
        help="comparisons: files whose prompts should not be in them",
    )
    check.add_argument(
        "--column", action="append", default=[], metavar="OURS=THEIRS", help="comparisons: a column of another name"
    )
    check.add_argument("--split", default="train", help="comparisons: split of a card folder")
    check.add_argument("--held-out-fraction", type=float, default=0.1, help="comparisons: share of the hash split")
    check.add_argument("--seed", type=int, default=0, help="comparisons: of the samples")
    check.add_argument("--json", action="store_true", help="comparisons: print JSON")

    plan = commands.add_parser("plan", help="memory, compute, hours and cost of a recipe, before it is launched")
    plan.add_argument("recipe", help="recipe folder")
    plan.add_argument("--gpus", type=int, default=1, help="devices")
    plan.add_argument("--gpu", required=True, metavar="NAME", help="of pipeline/planning/devices.yaml, e.g. h100, l4")
    plan.add_argument("--devices", metavar="FILE", help="YAML with devices of your own, in the same form")
    plan.add_argument("--accelerate", metavar="FILE", help="an accelerate config; default: data-parallel")
    plan.add_argument("--mfu", type=float, default=0.4, help="share of the peak that training reaches")
    plan.add_argument("--generation-mfu", type=float, default=0.05, help="share of it while PPO generates")
    plan.add_argument("--prompt-tokens", type=float, help="mean prompt of PPO; default: that of the data")
    plan.add_argument("--response-tokens", type=float, help="mean response of PPO; default: the longest allowed")
    plan.add_argument("--data-root", default=None, help="what relative dataset paths are relative to")
    plan.add_argument("--parent", help="model that the first stage starts from, instead of the recipe's")
    plan.add_argument("--json", action="store_true", help="print JSON")

    score = commands.add_parser("score", help="write a reward model's scores beside the rows of a file")
    score.add_argument("file", help="JSONL of demonstrations, comparisons or rankings")
    score.add_argument("--reward", required=True, metavar="DIR", help="folder or Hub id of a reward model")
    score.add_argument("--output", metavar="FILE", help="default: the file's name with .scored.jsonl")
    score.add_argument("--column", action="append", default=[], metavar="OURS=THEIRS", help="a column of another name")

    report_command.add_arguments(
        commands.add_parser("report", help="measure a run and write report/report.json and report/index.html")
    )

    compare = commands.add_parser("compare", help="what differs between two runs: recipe, data, code, result")
    compare.add_argument("runs", nargs=2, metavar="RUN", help="folder of a run, or of one stage")
    compare.add_argument("--json", action="store_true", help="print JSON")

    best = commands.add_parser(
        "best-of", help="rejection sampling: the best of n responses a prompt, as demonstrations"
    )
    best.add_argument("--policy", required=True, help="folder or Hub id of the model that answers")
    best.add_argument(
        "--reward", required=True, nargs="+", help="model folder or module:function, `*0.2` after it: weight"
    )
    best.add_argument("--prompts", required=True, metavar="FILE", help="JSONL with a column `prompt`")
    best.add_argument("--output", required=True, metavar="FILE", help="JSONL of prompt, response, score")
    best.add_argument("-n", type=int, default=16, help="responses sampled a prompt")
    best.add_argument("--max-response-tokens", type=int, default=64, help="longest response")
    best.add_argument("--temperature", type=float, default=1.0, help="of the samples")
    best.add_argument("--seed", type=int, default=0, help="of the samples")

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
        from pipeline.commands.run import run_recipe

        return run_recipe(args)
    if args.command == "check":
        from pipeline.commands.check_data import check_data, is_data

        if is_data(args.target):
            return check_data(
                args.target,
                args.tokenizer,
                args.against,
                args.column,
                args.json,
                args.held_out_fraction,
                args.split,
                args.seed,
            )
        from pipeline.commands.check import check_recipe
        from pipeline.training.stage import quiet_libraries

        quiet_libraries()
        if args.dry_run:
            from pipeline.commands.dry_run import dry_run

            return dry_run(args.target, args.data_root, args.parent, args.accelerate)
        return check_recipe(args.target, args.data_root)
    if args.command == "compare":
        from pipeline.commands.compare import compare_runs

        return compare_runs(args.runs[0], args.runs[1], args.json)
    if args.command == "plan":
        from pipeline.planning.plan import plan_recipe
        from pipeline.training.stage import quiet_libraries

        quiet_libraries()
        return plan_recipe(args)
    if args.command == "score":
        from pipeline.commands.score import score_file
        from pipeline.training.stage import quiet_libraries

        quiet_libraries()
        return score_file(args.file, args.reward, args.output, args.column)
    if args.command == "best-of":
        from pipeline.commands.best_of import BestOfOptions, write_demonstrations
        from pipeline.config.rewards import reward_source
        from pipeline.training.stage import quiet_libraries

        quiet_libraries()
        for name in ("n", "max_response_tokens", "temperature"):
            if getattr(args, name) <= 0:
                raise UserError(f"command line: {name} must be above 0")
        write_demonstrations(
            BestOfOptions(
                policy=args.policy,
                reward=[reward_source(text) for text in args.reward],
                prompts=args.prompts,
                output=args.output,
                n=args.n,
                max_response_tokens=args.max_response_tokens,
                temperature=args.temperature,
                seed=args.seed,
            )
        )
        return 0
    return report_command.run(args)


if __name__ == "__main__":
    main()

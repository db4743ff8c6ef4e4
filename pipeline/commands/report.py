"""`rlhf report`: measure a run, write its report."""

from __future__ import annotations

import argparse
import os


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run_dir", type=os.path.expanduser, help="folder that holds the stages' outputs, e.g. runs/demo"
    )
    parser.add_argument(
        "--judge",
        action="append",
        default=[],
        metavar="JUDGE",
        help="module:function, or a reward model's folder; may be given again",
    )
    parser.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="DIR",
        help="a model outside the run that answers, too; may be given again",
    )
    parser.add_argument(
        "--llm-judge",
        metavar="WHERE",
        help="a language model that compares answers in pairs: a folder, or the base URL of an OpenAI-compatible server "
        "(key in RLHF_JUDGE_API_KEY or OPENAI_API_KEY)",
    )
    parser.add_argument("--llm-judge-model", metavar="NAME", help="the model's name at that server")
    parser.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="lm-eval tasks of every stage")
    parser.add_argument("--tasks-path", metavar="DIR", help="folder of task files of your own")
    parser.add_argument("--watts", type=float, help="power of one device (of the machine, on CPUs), for the energy")
    parser.add_argument("--prompts", metavar="FILE", help="held-out prompts; default: those of the PPO recipe")
    parser.add_argument("--num-prompts", type=int, default=200, help="held-out prompts answered by every stage")
    parser.add_argument(
        "--best-of", type=int, default=8, metavar="N", help="reference point beside PPO: best of N; 0: none"
    )
    parser.add_argument("--data-root", help="what relative dataset paths are relative to")


def run(args: argparse.Namespace) -> int:
    from pipeline.evaluation.report import write_report
    from pipeline.training.logs import quiet_libraries

    quiet_libraries()
    write_report(
        args.run_dir,
        judges=args.judge,
        prompts_file=args.prompts,
        num_prompts=args.num_prompts,
        data_root=args.data_root,
        best_of=args.best_of,
        against=args.against,
        llm_judge=args.llm_judge,
        llm_judge_model=args.llm_judge_model,
        tasks=args.tasks,
        tasks_path=args.tasks_path,
        watts=args.watts,
    )
    return 0

"""`rlhf report RUN_DIR`: measure a run and write report/report.json and report/index.html."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", help="folder that holds the stages' outputs, e.g. runs/demo")
    add = parser.add_argument_group("judges").add_argument
    add(
        "--judge",
        action="append",
        default=[],
        metavar="JUDGE",
        help="module:function, or a reward model's folder; may be given again",
    )
    add(
        "--recipe",
        metavar="DIR",
        help="folder whose Python files the run's recipe may name as judges; without it only code in the current folder "
        "and in recipes that ship is run",
    )
    add(
        "--llm-judge",
        metavar="WHERE",
        help="a language model that compares answers in pairs: a folder, or the base URL of an OpenAI-compatible server "
        "(key in RLHF_JUDGE_API_KEY or OPENAI_API_KEY, sent over https or to this machine only)",
    )
    add("--llm-judge-model", metavar="NAME", help="the model's name at that server")
    add = parser.add_argument_group("answers").add_argument
    add("--prompts", metavar="FILE", help="held-out prompts; default: those of the PPO recipe")
    add("--num-prompts", type=int, default=200, help="held-out prompts answered by every stage")
    add("--data-root", help="what relative dataset paths are relative to")
    add(
        "--against",
        action="append",
        default=[],
        metavar="DIR",
        help="a model outside the run that answers, too; may be given again",
    )
    add("--best-of", type=int, default=8, metavar="N", help="reference point beside PPO: best of N; 0: none")
    add(
        "--engine-url",
        metavar="URL",
        help="a vLLM server that samples the answers (docs/engines.md); default: this process",
    )
    add = parser.add_argument_group("further measurements").add_argument
    add("--tasks", nargs="+", default=[], metavar="TASK", help="lm-eval tasks of every stage")
    add("--tasks-path", metavar="DIR", help="folder of task files of your own")
    add("--watts", type=float, help="power of one device (of the machine, on CPUs), for the energy")


def run(args: argparse.Namespace) -> int:
    # Imported late: `rlhf --help` should not load torch.
    from pipeline.errors import UserError
    from pipeline.evaluation.report import ReportOptions, write_report
    from pipeline.training.logs import quiet_libraries

    quiet_libraries()
    if args.num_prompts < 1:
        raise UserError(f"--num-prompts {args.num_prompts} is out of range; at least 1")
    options = ReportOptions(
        judges=args.judge,
        recipe_dir=args.recipe,
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
        engine_url=args.engine_url,
    )
    write_report(args.run_dir, options)
    return 0

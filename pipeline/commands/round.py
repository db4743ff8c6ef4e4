"""`rlhf round`: iterated RLHF, round by round: answers to label, reward model and PPO on the labels, a report."""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeline.errors import UserError

_EPILOG = """\
rlhf round new RUN --recipe DIR      prompts that no round has had, answers by the newest policies, a folder to label
rlhf label RUN/round-1/labeling      people label
rlhf round train RUN                 reward model on all rounds' labels, then PPO
rlhf round report RUN                RUN/report/report.json and index.html
rlhf round new RUN                   the next round
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    parser.add_argument("action", choices=("new", "train", "report"))
    parser.add_argument("run_dir", metavar="RUN", help="folder of the rounds")
    parser.add_argument(
        "--recipe", metavar="DIR", help="round.yaml, reward.yaml, ppo.yaml; default: what RUN began with"
    )
    train = parser.add_argument_group("train")
    train.add_argument("--partial", action="store_true", help="train although some items lack labels")
    train.add_argument("--num-processes", type=int, metavar="N", help="as of rlhf run")
    train.add_argument("--accelerate", metavar="FILE", help="as of rlhf run")
    train.add_argument("--quiet", action="store_true", help="summary lines and warnings only")
    report = parser.add_argument_group("report")
    report.add_argument(
        "--judge", action="append", default=[], help="module:function or reward model; may be given again"
    )
    report.add_argument("--num-prompts", type=int, default=200, help="held-out prompts answered by every policy")
    report.add_argument("--to", metavar="DIR", help="default: RUN/report")


def run(args: argparse.Namespace) -> int:
    from pipeline.commands.round_steps import TrainOptions, new_round, train_round
    from pipeline.rounds.folder import open_rounds
    from pipeline.rounds.report import RoundReportOptions, write_round_report
    from pipeline.training.logs import quiet_libraries

    quiet_libraries()
    rounds = open_rounds(Path(args.run_dir), args.recipe)
    if args.action == "new":
        new_round(rounds)
        return 0
    if args.action == "train":
        return train_round(rounds, TrainOptions(args.partial, args.num_processes, args.accelerate, args.quiet))
    if args.num_prompts < 1:
        raise UserError(f"--num-prompts {args.num_prompts} is out of range; at least 1")
    write_round_report(rounds, RoundReportOptions(args.judge, args.num_prompts, args.to))
    return 0

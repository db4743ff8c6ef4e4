"""`rlhf init FOLDER`: a recipe for your model, data and hardware, checked and planned."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from pipeline.errors import UserError

KINDS = {
    "documents": ("document", "plain text, for pretraining"),
    "demonstrations": ("demonstration", "prompts with good responses, for SFT"),
    "comparisons": ("ranking", "ranked or compared responses, for the reward model"),
    "prompts": ("prompt", "for PPO; default: those of the comparisons"),
}  # flag: kind of the rows, help


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=os.path.expanduser, help="the new recipe's folder")
    parser.add_argument("--base", metavar="MODEL", help="folder or Hub id to start from; without: a model from nothing")
    for name, (_, text) in KINDS.items():
        help_text = f"files, card folders or Hub ids: {text}"
        parser.add_argument(f"--{name}", nargs="+", default=[], metavar="DATA", help=help_text)
    parser.add_argument("--column", action="append", default=[], metavar="OURS=THEIRS", help="a column of another name")
    parser.add_argument("--reward", metavar="MODEL", help="a reward model (or module:function) that is there already")
    parser.add_argument("--task", help="what the model shall do, in a sentence, for the README")
    hardware = parser.add_argument_group("hardware (default: what is in this machine)")
    hardware.add_argument("--gpus", type=int, default=1, help="devices (default: %(default)s)")
    hardware.add_argument("--gpu", metavar="NAME", help="of pipeline/planning/devices.yaml, e.g. h100, l4; or cpu")
    hardware.add_argument("--memory", type=float, metavar="GIB", help="of one device, where it is not in that table")


def run(args: argparse.Namespace) -> int:
    folder = Path(args.folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{str(folder)!r} is there already; nothing is overwritten, name a new folder")
    asking = sys.stdin.isatty() and not any(getattr(args, name) for name in KINDS)
    if asking:
        ask_for_missing(args, ask)
    if not any(getattr(args, name) for name in KINDS):
        raise UserError(f"command line: no data; give one of {', '.join(f'--{name}' for name in KINDS)}")
    from pipeline.commands.begin import begin
    from pipeline.training.logs import quiet_libraries

    quiet_libraries()
    begin(args, ask_column if sys.stdin.isatty() else None)
    return 0


def ask_for_missing(args: argparse.Namespace, ask: Callable[[str], str]) -> None:
    """Ask for what no flag says; an empty answer leaves it as it is."""
    args.task = args.task or ask("What shall the model do? (a sentence, for the README)")
    args.base = args.base or ask("Model to start from (a folder or a Hub id; nothing: a model from nothing)") or None
    for name, (_, text) in KINDS.items():
        args.__dict__[name] = ask(f"{name.capitalize()}: {text} (files, separated by spaces; nothing: none)").split()
    if args.gpu is None and args.memory is None:
        args.gpu = ask("Device (h100, a100-80gb, l4, rtx4090, …, cpu; nothing: what is in this machine)") or None
        if args.gpu not in (None, "cpu"):
            args.gpus = _count(ask("How many of them? (nothing: 1)"))


def _count(text: str) -> int:
    if text and not text.isdigit():
        raise UserError(f"{text!r} is no number of devices")
    return int(text or 1)


def ask(question: str) -> str:
    """A line from the terminal."""
    try:
        return input(f"{question}: ").strip()
    except EOFError:
        raise UserError("the input ended; give the answers as flags, see --help") from None


def ask_column(question: str) -> str:
    """As `ask`, until there is an answer."""
    while not (answer := ask(question)):
        pass
    return answer

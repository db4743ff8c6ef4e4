"""The console command `rlhf`: run a recipe's stages, check before, report after."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline import __version__
from pipeline.errors import UserError, describe_system_error
from pipeline.training.logs import accept_any_terminal

# Each is a file in pipeline/commands with `add_arguments(parser)` and `run(args) -> exit code`.
COMMANDS = {
    "init": "a recipe for your model, data and hardware, checked and planned",
    "run": "all stages of a recipe, in order; finished ones are skipped, interrupted ones resume",
    "check": "validate a recipe, or a file of comparisons",
    "cache": "list or clear the data that stages have read and encoded",
    "plan": "memory, compute, hours and cost of a recipe, before it is launched",
    "score": "write a reward model's scores beside the rows of a file",
    "report": "measure a run and write report/report.json and report/index.html",
    "compare": "what differs between two runs: recipe, data, code, result",
    "export": "what is shipped of a run: weights, tokenizer, generation config and card in a folder of its own",
    "sample": "several answers to each prompt of a file, from one or several models, for labelers",
    "push": "upload what is shipped of a run to the Hugging Face Hub, private unless told otherwise",
    "chat": "talk to a model in the terminal, or on a page of this machine",
    "label": "a web page on which people compare, rank and write answers; their labels as records",
    "round": "iterated RLHF: answers to label, then reward model and PPO on the labels, then a report; round by round",
    "best-of": "rejection sampling: the best of n responses per prompt, as demonstrations",
}


def main(argv: Sequence[str] | None = None) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    accept_any_terminal()
    words = [_with_home(word) for word in (sys.argv[1:] if argv is None else argv)]
    try:
        args = _parse(words)
        code = args.run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except BrokenPipeError:  # `rlhf check … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except Exception as error:
        message = describe_system_error(error, Path.cwd())
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        code = 2
    raise SystemExit(code)


def _with_home(word: str) -> str:
    """A shell leaves the `~` of `--output-dir=~/runs` as it is."""
    name, equals, path = word.partition("=")
    return f"{name}={os.path.expanduser(path)}" if equals and name.startswith("--") else os.path.expanduser(word)


def _parse(words: list[str]) -> argparse.Namespace:
    """The arguments of the command that is named; other commands' modules are not imported."""
    parser = argparse.ArgumentParser(prog="rlhf", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    named = next((word for word in words if not word.startswith("-")), None)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if name == named:
            module = importlib.import_module(f"pipeline.commands.{name.replace('-', '_')}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser.parse_args(words)


if __name__ == "__main__":
    main()

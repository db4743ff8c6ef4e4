"""`rlhf chat MODEL`: talk to a model, in the terminal or on a page."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

WRITERS = ("ppo", "sft", "pretrain")  # stages whose models write text; of a run, the first that is finished


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", type=os.path.expanduser,
        help="a run's folder (its last stage that writes text), a stage's, a model's or a LoRA adapter's, or a Hub id",
    )  # fmt: skip
    parser.add_argument("--compare", metavar="OTHER", type=os.path.expanduser, help="another model that answers too")
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    parser.add_argument("--prompt", metavar="TEXT", help="answer this and end")
    parser.add_argument(
        "--temperature", type=float, help="0: greedy; default: as the model's generation_config.json samples, else 1"
    )
    parser.add_argument(
        "--max-tokens", type=int, help="of an answer; default: that of generation_config.json, else 512"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default: %(default)s)")
    page = parser.add_argument_group("page")
    page.add_argument("--web", action="store_true", help="a page with the chat, on this machine")
    page.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all of this machine's")
    page.add_argument("--port", type=int, default=8766, help="0: any free one")


def run(args: argparse.Namespace) -> int:
    _check(args)
    from pipeline.chat.model import Sampling
    from pipeline.training.logs import quiet_libraries

    quiet_libraries()
    sampling = Sampling(temperature=args.temperature, max_tokens=args.max_tokens)
    models = [load(name) for name in (args.model, args.compare) if name is not None]
    if args.web:
        from pipeline.chat.serve import Address, serve

        serve(models, sampling, args.system, Address(host=args.host, port=args.port, public_url=None))
    elif args.prompt is not None:
        from pipeline.chat.terminal import answer_once

        system = [{"role": "system", "content": args.system}] if args.system else []
        answer_once(models, [*system, {"role": "user", "content": args.prompt}], sampling, args.seed)
    else:
        from pipeline.chat.terminal import Terminal

        terminal = Terminal(model=models[0], load=load, sampling=sampling, seed=args.seed, system=args.system)
        terminal.other = models[1] if len(models) > 1 else None
        terminal.run()
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse flags that do not go together, before anything is loaded."""
    if args.web and args.prompt is not None:
        raise UserError("command line: --prompt asks one question, --web serves a page; give one of them")
    if args.prompt is not None and not args.prompt.strip():
        raise UserError("command line: --prompt is empty")
    if args.temperature is not None and not 0 <= args.temperature <= 100:
        raise UserError(f"command line: --temperature {args.temperature:g} must lie between 0 and 100")
    if args.max_tokens is not None and args.max_tokens < 1:
        raise UserError(f"command line: --max-tokens {args.max_tokens} must be above 0")
    if not 0 <= args.seed < 2**32:
        raise UserError(f"command line: --seed {args.seed} must lie between 0 and {2**32 - 1}")


def writing_stage(name: str) -> str:
    """What a name stands for: a run's folder means its last stage that writes text; any other name is itself."""
    from pipeline.commands.shipped_model import finished_stage
    from pipeline.config.stages import STAGES

    folder = Path(name)
    if not (folder / "config.json").is_file() and any((folder / stage).is_dir() for stage in STAGES):
        return str(finished_stage(folder, WRITERS))
    return name


def load(name: str) -> Any:
    """The model that a name stands for.

    Raises:
        UserError: there is none.
    """
    import sys

    from pipeline.chat.model import load_chat_model

    name = writing_stage(name)
    model = load_chat_model(name)
    for note in model.notes:
        print(f"{name}: {note}", file=sys.stderr)
    return model

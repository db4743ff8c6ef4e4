"""`rlhf label`: the labeling page of a folder; its labelers, imports and exports."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.labeling.live import Models
    from pipeline.labeling.settings import Settings

_EPILOG = """\
rlhf label FOLDER                        serve the page of a folder; with `mode: chat` in its label.yaml, a live chat
rlhf label users add NAME [--lead]       add a labeler and print their personal link
rlhf label users link NAME               a new link; the old one stops working
rlhf label users list
rlhf label users exclude NAME [--altogether], users include NAME
rlhf label export [--to DIR]             append new labels to DIR/rankings.jsonl and DIR/demonstrations.jsonl
rlhf label export --format argilla --to FILE.json     (or label-studio)
rlhf label import FILE                   tasks and judgements of Label Studio or Argilla
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    parser.add_argument("words", nargs="+", metavar="FOLDER | users … | export | import FILE", help="see below")
    parser.add_argument(
        "--folder", default=".", help="labeling folder of users, export and import (default: the current one)"
    )
    page = parser.add_argument_group("page")
    page.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all of this machine's")
    page.add_argument("--port", type=int, default=8765, help="0: any free one")
    page.add_argument("--public-url", metavar="URL", help="the page's address where a proxy with TLS stands in front")
    other = parser.add_argument_group("users, export")
    other.add_argument("--lead", action="store_true", help="users add: this one sees the lead's page")
    other.add_argument("--altogether", action="store_true", help="users exclude: their labels no longer count either")
    other.add_argument("--to", metavar="PATH", help="export: a folder (default FOLDER/export), or with --format a file")
    other.add_argument("--format", choices=("label-studio", "argilla"), help="export: a file of this tool")


def run(args: argparse.Namespace) -> int:
    action, *rest = args.words
    if action == "users":
        return _users(args, rest)
    if action == "export":
        _no_more(rest, "export takes no words; name the folder with --folder")
        return _export(args)
    if action == "import":
        if len(rest) != 1:
            raise UserError("command line: rlhf label import FILE [--folder FOLDER]")
        return _import(Path(args.folder), Path(rest[0]))
    _no_more(rest, f"{action!r} is taken for a folder; rlhf label --help shows the other forms")
    return _serve(args, Path(action))


def _no_more(rest: Sequence[str], message: str) -> None:
    if rest:
        raise UserError(f"command line: {message}")


def _serve(args: argparse.Namespace, folder: Path) -> int:
    from pipeline.labeling.serve import Address, serve

    url = args.public_url
    if url is not None and not url.startswith(("http://", "https://")):
        raise UserError("command line: --public-url begins with http:// or https://")
    if args.host not in ("127.0.0.1", "::1", "localhost") and url is None:
        print(f"warning: --host {args.host} without TLS: links and labels cross the network as plain text", flush=True)

    def load_models(settings: Settings) -> Models:
        from pipeline.chat.labeled import load_labeled_models
        from pipeline.commands.chat import writing_stage
        from pipeline.training.logs import quiet_libraries

        quiet_libraries()
        print("loading the model …", flush=True)
        return load_labeled_models(folder, settings, writing_stage)

    address = Address(host=args.host, port=args.port, public_url=url)
    serve(folder, address, lambda text: print(text, flush=True), load_models)
    return 0


def _users(args: argparse.Namespace, words: Sequence[str]) -> int:
    from pipeline.labeling.labelers import add_labeler, labelers, renew_token, set_excluded
    from pipeline.labeling.project import open_existing, open_project
    from pipeline.labeling.store import DATABASE

    verb, names = (words[0], words[1:]) if words else ("", [])
    if verb not in ("add", "link", "list", "exclude", "include") or len(names) != (verb != "list"):
        raise UserError("command line: rlhf label users add|link|exclude|include NAME, or users list")
    folder = Path(args.folder)
    project = open_existing(folder) if (folder / DATABASE).is_file() else open_project(folder)
    with contextlib.closing(project.store) as store:
        if verb == "list":
            for person in labelers(store):
                state = {None: "", "from_now": "excluded", "altogether": "excluded altogether"}[person.excluded]
                print(f"{person.name}\t{'lead' if person.lead else 'labeler'}\t{state}".rstrip())
        elif verb in ("add", "link"):
            token = add_labeler(store, names[0], args.lead) if verb == "add" else renew_token(store, names[0])
            print(f"{names[0]}'s link, shown this once: {_url(args)}/in/{token}")
        else:
            excluded = None if verb == "include" else "altogether" if args.altogether else "from_now"
            set_excluded(store, names[0], excluded, project.settings.overlap)
            print(f"{names[0]}: {verb}d" + (" altogether" if excluded == "altogether" else ""))
    return 0


def _url(args: argparse.Namespace) -> str:
    from pipeline.labeling.serve import Address
    from pipeline.labeling.store import served_at

    return served_at(Path(args.folder)) or Address(host=args.host, port=args.port, public_url=args.public_url).url(
        args.port
    )


def _export(args: argparse.Namespace) -> int:
    from pipeline.labeling.export import export
    from pipeline.labeling.interchange import write_labels
    from pipeline.labeling.project import open_existing

    project = open_existing(Path(args.folder))
    with contextlib.closing(project.store) as store:
        if args.format:
            if args.to is None:
                raise UserError("command line: --format needs --to FILE.json")
            print(f"export: {write_labels(store, args.format, Path(args.to)):,} labels in {args.to}")
            return 0
        done = export(store, project.settings, Path(args.to) if args.to else None)
    for kind, added in done.added.items():
        if added or done.before[kind]:
            print(f"export: {added:,} new {kind}s in {done.folder}, {done.before[kind]:,} were there")
    if not any(done.added.values()) and not any(done.before.values()):
        print("export: no labels yet")
    if done.excluded:
        print(
            f"export: {done.excluded:,} earlier lines are of labelers excluded altogether; --to a new folder leaves them out"
        )
    return 0


def _import(folder: Path, source: Path) -> int:
    from pipeline.labeling.importing import import_labels

    done = import_labels(folder, source)
    again = f", {done.there_already:,} were there" if done.there_already else ""
    print(f"import: {done.items:,} items in {done.rows}, {done.labels:,} new labels{again}")
    return 0

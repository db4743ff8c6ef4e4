"""`rlhf cache`: what the data cache holds, and removing it."""

from __future__ import annotations

import argparse
import time

from pipeline.data.cache import DataCache, readable

from rich.console import Console
from rich.table import Table

DAY = 24 * 3600.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", nargs="?", default="list", choices=("list", "clear"), help="default: list")
    parser.add_argument(
        "--data-cache", metavar="DIR", help="default: $RLHF_DATA_CACHE, else ~/.cache/rlhf-pipeline/data"
    )
    parser.add_argument(
        "--older-than", type=float, default=0.0, metavar="DAYS", help="clear only what no stage has read for so long"
    )


def run(args: argparse.Namespace) -> int:
    cache = DataCache(args.data_cache)
    if args.action == "clear":
        removed, freed = cache.clear(args.older_than * DAY)
        print(f"{removed} entries removed, {readable(freed)} freed in {cache.root}")
        return 0
    entries = sorted(cache.entries(), key=lambda entry: -entry.used)
    table = Table("what", "rows", "size", "last read", title=str(cache.root), title_justify="left")
    for entry in entries:
        rows = entry.facts.get("rows")
        days = (time.time() - entry.used) / DAY
        age = f"{days:.0f} days ago" if days >= 1 else f"{days * 24:.0f} h ago"
        table.add_row(entry.what, "" if rows is None else f"{rows:,}", readable(entry.bytes), age)
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"{len(entries)} entries, {readable(sum(entry.bytes for entry in entries))}; `rlhf cache clear` removes them"
    )
    return 0

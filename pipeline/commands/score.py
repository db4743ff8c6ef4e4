"""`rlhf score`: a reward model's scores beside the rows of a file; killed and started again, it goes on where it was."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.data.hashing import sha256_file
from pipeline.data.records import PARSERS, Record, RecordError, iter_records, renaming
from pipeline.data.sources import column_map
from pipeline.errors import UserError
from pipeline.training.json_files import write_json

from rich.console import Console
from rich.progress import track

ROWS = 64  # scored and written together


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="demonstrations, comparisons or rankings, in any form that the stages read")
    parser.add_argument("--reward", required=True, metavar="DIR", help="folder or Hub id of a reward model")
    parser.add_argument("--output", metavar="FILE", help="default: the file's name with .scored.jsonl")
    parser.add_argument("--column", action="append", default=[], metavar="OURS=THEIRS", help="a column of another name")


def run(args: argparse.Namespace) -> int:
    from pipeline.training.logs import quiet_libraries

    quiet_libraries()
    return score_file(args.file, args.reward, args.output, args.column)


def score_file(file: str, reward: str, output: str | None = None, columns: Sequence[str] = ()) -> int:
    """Write every row with a new key: `score` of a demonstration, `scores` of a ranking's or comparison's responses.

    Rows are appended in order; `OUTPUT.state.json` holds what they are scores of, so that rows of another file or
    another model are never mixed with them.

    Raises:
        UserError: bad rows, before anything is scored; or an output that belongs to something else.
    """
    source = Path(file)
    if not source.is_file():
        raise UserError("does not exist", file=source)
    target = Path(output) if output else source.with_name(source.name.split(".")[0] + ".scored.jsonl")
    if target.resolve() == source.resolve():
        raise UserError("--output is the input; name another file", file=target)
    kind, rows = _kind_and_rows(source, column_map(columns))
    from pipeline.models.precision import accelerator_type
    from pipeline.rollout.rewards import TextScorer

    scorer = TextScorer(reward, accelerator_type())
    done = _resume(target, {"file_sha256": sha256_file(source), "reward": scorer.identity})
    records = itertools.islice(_records(source, kind, column_map(columns)), done, None)
    batches = iter(lambda: list(itertools.islice(records, ROWS)), [])
    steps = -(-(rows - done) // ROWS)
    with target.open("a", encoding="utf-8") as out:
        for batch in track(batches, "scoring", total=steps, console=Console(stderr=True), disable=not os.isatty(2)):
            out.writelines(_scored(scorer, kind, batch))
            out.flush()
            os.fsync(out.fileno())
    again = f", {done:,} of them before" if done else ""
    print(f"score: {rows:,} rows in {target}{again}")
    return 0


def _records(source: Path, kind: str, columns: dict[str, str] | None) -> Iterator[Record]:
    parse = renaming(PARSERS[kind], columns)
    return iter_records(source, lambda row: {**parse(row), "row": row})  # the row as the file has it


def _kind_and_rows(source: Path, columns: dict[str, str] | None) -> tuple[str, int]:
    """The kind of the file's first row, and the number of rows: all are checked before the model is loaded."""
    first = next(iter_records(source, lambda row: {"row": row}))["row"]
    try:
        renaming(PARSERS["ranking"], columns)(first)
        kind = "ranking"
    except RecordError:
        kind = "demonstration"
    return kind, sum(1 for _ in _records(source, kind, columns))


def _scored(scorer: Any, kind: str, records: list[Record]) -> Iterator[str]:
    texts: list[tuple[Any, list[str]]] = [
        (r["prompt"], r["responses"]) if kind == "ranking" else (r["messages"][:-1], [r["messages"][-1]["content"]])
        for r in records
    ]
    flat = iter(
        scorer([prompt for prompt, answers in texts for _ in answers], [a for _, answers in texts for a in answers])
    )
    for record, (_, answers) in zip(records, texts, strict=True):
        scores = [next(flat) for _ in answers]
        if not all(map(math.isfinite, scores)):
            raise UserError(
                f"line {record['line']}: the reward model gave {scores}; scores must be finite, so its weights or that row "
                "are broken. Rows before it were written"
            )
        added: dict[str, Any] = {"scores": scores} if kind == "ranking" else {"score": scores[0]}
        yield json.dumps({**record["row"], **added}, ensure_ascii=False) + "\n"


def _resume(target: Path, identity: dict[str, Any]) -> int:
    """Rows that are there already; a half-written last line is cut off.

    Raises:
        UserError: the file is not ours, or holds scores of other rows or of another model.
    """
    state = target.with_name(target.name + ".state.json")
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        write_json(state, identity)
        return 0
    try:
        known = json.loads(state.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = None
    if known != identity:
        what = "was not written by rlhf score" if known is None else "holds scores of other rows or of another model"
        raise UserError(f"{what}; name another --output or remove it", file=target)
    done = end = 0
    with target.open("rb") as lines:
        for line in lines:
            if not line.endswith(b"\n"):
                break
            done += 1
            end += len(line)
    os.truncate(target, end)
    return done

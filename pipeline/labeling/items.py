"""Rows of a labeling folder as items: a prompt, and the responses that labelers compare."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.data.files import SUFFIXES, FileRow, RecordError, iter_rows
from pipeline.data.layouts import column_names
from pipeline.data.problems import Problems
from pipeline.data.records import Record, parse_prompt, parse_ranking
from pipeline.errors import UserError

logger = logging.getLogger(__name__)
CALIBRATION = "calibration"  # files whose names begin so hold items with known ranks
MAX_RESPONSES = 26  # letters name them
MAX_ITEM_BYTES = 8 << 20
_PLAIN = {"prompt", "responses", "sources", "sampling"}
_ANSWERED = {"response", "completion", "messages", "conversations", "output"}


@dataclass(frozen=True)
class Item:
    """One row to label.

    Attributes:
        key: hash of prompt and responses.
        row: the file's row with `prompt` and `responses`; without ranks.
        known: of a calibration item, the right ranks.
    """

    key: str
    line: int
    row: dict[str, Any]
    known: list[int | None] | None

    @property
    def responses(self) -> list[str]:
        return list(self.row["responses"])


def item_files(folder: Path) -> list[Path]:
    """The files of a labeling folder that hold rows.

    Raises:
        UserError: there is no such folder, or no such file in it.
    """
    if not folder.is_dir():
        raise UserError(
            "is no folder; make it and put a file of answers into it (.jsonl with prompt, responses)", file=folder
        )
    files = sorted(filter(is_item_file, folder.iterdir()))
    if not any(not is_calibration(path) for path in files):
        raise UserError(
            "holds no file of rows to label; put a .jsonl with `prompt` and `responses` into it", file=folder
        )
    return files


def is_item_file(path: Path) -> bool:
    return path.is_file() and path.name.lower().endswith(SUFFIXES)


def is_calibration(path: Path) -> bool:
    return path.name.lower().startswith(CALIBRATION)


def read_items(path: Path) -> Iterator[Item]:
    """The items of one file; rows that nobody could compare are left out and counted.

    Raises:
        UserError: with file:line of every row that is none of ours.
    """
    problems, left_out = Problems(str(path)), Problems(str(path))
    seen: dict[str, int] = {}
    ranked = 0
    calibration = is_calibration(path)
    for file_row in iter_rows(path):
        try:
            item = _plain(file_row, calibration) or _parse(file_row, calibration)
        except RecordError as error:
            problems.add(file_row.line, str(error))
            continue
        if reason := _not_comparable(item, seen):
            left_out.add(file_row.line, reason)
            continue
        seen[item.key] = file_row.line
        ranked += not calibration and item.known is not None
        yield item
    problems.refuse()
    for reason, lines in left_out.lines.items():
        logger.warning("%s: rows left out: %s (lines %s)", path, reason, ", ".join(map(str, lines)))
    if left_out.count:
        logger.warning("%s: %d rows left out in all", path, left_out.count)
    if ranked:
        logger.warning(
            "%s: ranks of %d rows are not shown to anyone; known answers go into calibration.jsonl", path, ranked
        )
    if not seen:
        raise UserError("no row of it can be labeled; see the lines above" if left_out.count else "is empty", file=path)


def _not_comparable(item: Item, seen: dict[str, int]) -> str | None:
    responses = item.row["responses"]
    if item.key in seen:
        return "the same prompt and responses as an earlier row"
    if any(not text.strip() for text in responses):
        return "a response is empty"
    if len(set(responses)) < len(responses):
        return "the same response twice"
    return None


def _parse(file_row: FileRow, calibration: bool) -> Item:
    columns = file_row.columns
    if columns is None:
        raise RecordError(file_row.error or "no row")
    record = _record(columns)
    responses = record.get("responses", [])
    if len(responses) == 1 or len(responses) > MAX_RESPONSES:
        raise RecordError(
            f"{len(responses)} responses; give 2 to {MAX_RESPONSES}, or none where labelers write the answer"
        )
    known = _known_ranks(columns, record)
    if calibration and known is None:
        raise RecordError("a calibration row needs `ranks`, the known answer (or `chosen` and `rejected`)")
    prompt = (
        columns["prompt"] if isinstance(columns.get("prompt"), str) and "system" not in columns else record["prompt"]
    )
    pair = {"chosen", "rejected", "winner", "loser", "winning_response", "losing_response"}
    judged = {"ranks", "labeler", "margin", "confidence"}  # what an earlier judgement said is not part of the item
    others = {name: value for name, value in columns.items() if name not in judged | pair}
    row = {**others, "prompt": prompt, "responses": responses}
    if sum(map(len, responses)) > MAX_ITEM_BYTES:
        raise RecordError(f"its responses are longer than {MAX_ITEM_BYTES >> 20} MiB; nobody can read them")
    return Item(key=_key(prompt, responses), line=file_row.line, row=row, known=known)


def item_key(row: dict[str, Any]) -> str:
    """The key of an item's row."""
    return _key(row["prompt"], row["responses"])


def _key(prompt: Any, responses: list[str]) -> str:
    """A hash of prompt and responses. No file holds NUL, so it separates them."""
    text = prompt if isinstance(prompt, str) else json.dumps(prompt)
    return hashlib.sha256("\0".join((text, *responses)).encode()).hexdigest()


def _plain(file_row: FileRow, calibration: bool) -> Item | None:
    """The item of a row that needs no rewriting, as most do; None for any other, right or wrong."""
    row = file_row.columns
    if row is None or calibration or not _PLAIN.issuperset(row) or len(row) < 2:
        return None
    prompt, responses = row.get("prompt"), row.get("responses")
    if type(prompt) is not str or type(responses) is not list or not 2 <= len(responses) <= MAX_RESPONSES:
        return None
    if not prompt.strip() or prompt.startswith("\n\nHuman:") or not all(type(text) is str for text in responses):
        return None
    if sum(map(len, responses)) > MAX_ITEM_BYTES:
        return None
    return Item(key=_key(prompt, responses), line=file_row.line, row=row, known=None)


def _record(columns: dict[str, Any]) -> Record:
    """The row as a ranking; a prompt alone is a ranking without responses."""
    responses = columns.get("responses")
    if responses is not None:
        ranks = [1] * len(responses) if isinstance(responses, list) else None
        if not responses and isinstance(responses, list):
            return parse_prompt({"prompt": columns.get("prompt")})
        return parse_ranking({**columns, "ranks": ranks})
    for verdict in ({}, {"winner": "tie"}):  # two answers may stand in columns of their own, with no verdict yet
        try:
            return parse_ranking({**columns, **verdict})
        except RecordError:
            continue
    if "prompt" not in columns or _ANSWERED & columns.keys():
        raise RecordError(
            "needs `prompt` and `responses` (a list of texts), or a prompt alone where labelers write the answer; "
            f"columns are: {column_names(columns)}"
        )
    return parse_prompt(columns)


def _known_ranks(columns: dict[str, Any], record: Record) -> list[int | None] | None:
    if "responses" not in columns:
        return list(record["ranks"]) if len(set(record.get("ranks", []))) > 1 else None
    if columns.get("ranks") is None or all(rank is None for rank in columns["ranks"]):
        return None
    parse_ranking(columns)  # its errors
    return [None if rank is None else int(rank) for rank in columns["ranks"]]

"""The record kinds and their readers: every row is checked, and every complaint names file and line.

A parsed record is plain data in one canonical form, whatever the file called its columns (see `Record`):

    document       text
    demonstration  messages, trained
    ranking        prompt, responses, ranks             a comparison is a ranking of two
    prompt         prompt
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypedDict, TypeVar, cast

from pipeline.data.files import FileRow, RecordError, UnusableRecord, iter_rows
from pipeline.data.layouts import (
    MissingColumn,
    TrackedRow,
    WrongColumnMap,
    column_names,
    comparison_columns,
    demonstration_columns,
    expand_row,
    joined_columns,
    prompt_columns,
    rename_columns,
)
from pipeline.data.messages import (
    Message,
    parse_hh_turns,
    parse_messages,
    parse_prompt_text,
    refuse_written_list,
    trained_turns,
    unread_message_keys,
)
from pipeline.data.problems import Problems
from pipeline.data.splits import split_side
from pipeline.errors import UserError, shorten

logger = logging.getLogger(__name__)
OPTIONAL = ("labeler", "split", "id", "confidence", "margin")


class Record(TypedDict, total=False):
    """A row in canonical form; which keys it has depends on its kind."""

    text: str  # documents
    messages: list[Message]  # demonstrations: a dialogue that ends with an answer
    trained: list[bool]  # demonstrations: which of the messages are learnt
    prompt: list[Message]  # rankings and prompts
    responses: list[str]  # rankings: those that were ranked
    ranks: list[int]  # rankings: of each response; 1 is best, equal ranks tie
    ids: list[int]  # prompts: token ids, where a stage has encoded them
    problem: str  # rankings: why it cannot be trained on, where the parser saw it
    labeler: str
    split: str
    id: str | int
    confidence: float
    margin: float
    file: str
    line: int
    row: dict[str, Any]  # the row under our names, for reward functions and judges; documents have none


Parser = Callable[[dict[str, Any]], Record]
Result = TypeVar("Result")


class RowReader:
    """Reads the rows of one source as records, and says once what it left out and what it did not read.

    Args:
        source: its name in errors.
        problems: "drop" leaves broken rows out, "error" refuses rows that hold nothing to learn from too; None refuses
            broken rows and leaves those others out.
        name_unread: say which columns were not read (other readers of the row may have them).
    """

    def __init__(self, source: str, parse: Parser, *, problems: str | None = None, name_unread: bool = True):
        self.source, self.parse, self.problems, self.name_unread = source, parse, problems, name_unread
        self.rows = 0
        self.refused = Problems(source)
        self.dropped: list[tuple[int, str]] = []
        self.unread: Counter[str] = Counter()
        self.unread_keys: Counter[str] = Counter()
        self.joined: set[str] = set()

    def read(
        self, rows: Iterable[FileRow], columns: dict[str, str] | None = None, max_rows: int | None = None
    ) -> Iterator[Record]:
        """The records of a file's rows.

        Raises:
            UserError: after the last row, with file:line of every bad one (20 listed, the rest counted).
        """
        count = 0
        for row in rows:
            if max_rows is not None and count >= max_rows:
                break
            for record in self.records_of(row, columns):
                count += 1
                yield record
            self.rows += 1
        self.refused.refuse()
        self.say_what_was_left()
        if not count:
            if self.dropped:
                line, reason = self.dropped[0]
                raise UserError(f"{reason}; no row of the file can be used", file=self.source, line=line)
            raise UserError("no records; expected one JSON object a line", file=self.source)

    def records_of(self, row: FileRow, columns: dict[str, str] | None) -> Iterator[Record]:
        """The records of one row; what is wrong with it is added to `refused` or `dropped`."""
        try:
            if row.columns is None:
                raise RecordError(row.error or "no row")
            for given in expand_row(row.columns):
                record = self._record(rename_columns(given, columns), row.line)
                self.joined |= joined_columns(given, record.get("messages") or record.get("prompt") or [])
                yield record
        except RecordError as error:
            if isinstance(error, WrongColumnMap) or (isinstance(error, MissingColumn) and not self.rows):
                raise UserError(str(error), file=self.source, line=row.line) from None
            drop = self.problems != "error" if isinstance(error, UnusableRecord) else self.problems == "drop"
            if drop:
                self.dropped.append((row.line, str(error)))
            else:
                self.refused.add(row.line, str(error))

    def _record(self, columns: dict[str, Any], line: int) -> Record:
        tracked = TrackedRow(columns)
        record = self.parse(tracked)
        self.unread.update(tracked.unread)
        self.unread_keys.update(unread_message_keys(columns))
        return {**record, "file": self.source, "line": line}

    def say_what_was_left(self) -> None:
        """Log which rows were left out and which columns were not read, among the rows so far."""
        if self.dropped:
            reasons = Counter(reason for _, reason in self.dropped)
            why = "; ".join(f"{count} × {reason}" for reason, count in reasons.most_common(3)) + (
                "; …" if len(reasons) > 3 else ""
            )
            lines = ", ".join(str(line) for line, _ in self.dropped[:5]) + (", …" if len(self.dropped) > 5 else "")
            logger.warning("%s: %d rows left out (%s; lines %s)", self.source, len(self.dropped), why, lines)
        if self.joined:
            logger.info("%s: read as part of the prompt: columns %s", self.source, column_names(self.joined))
        if self.unread and self.name_unread:
            logger.warning("%s: columns that are not read: %s", self.source, column_names(self.unread))
        if self.unread_keys:
            keys = ", ".join(f"{key} ({count}×)" for key, count in sorted(self.unread_keys.items()))
            logger.warning("%s: keys of messages that are not read: %s", self.source, keys)


def iter_records(path: Path, parse: Parser, max_rows: int | None = None) -> Iterator[Record]:
    """Parse a file row by row; `line` is added to each record."""
    return RowReader(str(path), parse, name_unread=False).read(iter_rows(path), max_rows=max_rows)


def read_records(path: Path, parse: Parser, max_rows: int | None = None) -> list[Record]:
    """All of `iter_records`."""
    return list(iter_records(path, parse, max_rows))


def renaming(parse: Parser, columns: dict[str, str] | None) -> Parser:
    """`parse` after renaming the file's columns to ours (`columns`: ours → the file's)."""
    return lambda row: parse(rename_columns(row, columns))


current_row: ContextVar[str | None] = ContextVar("current_row", default=None)  # "file:line", for what is said once


@contextlib.contextmanager
def at_row(record: Record) -> Iterator[None]:
    """Add a record's file and line to an error that its text meets further on (a template that refuses a role)."""
    before = current_row.set(f"{record.get('file')}:{record.get('line')}" if record.get("file") else None)
    try:
        yield
    except UserError as error:
        raise UserError(str(error), file=record.get("file"), line=record.get("line")) from error
    finally:
        current_row.reset(before)


def at_each(function: Callable[..., Result], records: Iterable[Record], *values: Iterable[Any]) -> list[Result]:
    """`function` of each record and of its value in each of `values`, within `at_row`."""
    results = []
    for record, *own in zip(records, *values, strict=True):
        with at_row(record):
            results.append(function(record, *own))
    return results


# ---------------------------------------------------------------------------------------------- parsers, one per kind


def parse_document(row: dict[str, Any]) -> Record:
    return {"text": _text(row, "text"), **_optional(row)}


def parse_prompt(row: dict[str, Any]) -> Record:
    """A prompt from any kind of record; its other columns are dropped."""
    row = prompt_columns(row)
    if "prompt" in row:
        prompt = _prompt(row["prompt"])
    elif "messages" in row:
        messages = parse_messages(row["messages"], "messages")
        prompt = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    elif "chosen" in row and "rejected" in row:
        prompt = _hh_pair(row)[0]
    else:
        raise RecordError(f"no column `prompt`; columns are: {column_names(row)}")
    if not prompt or prompt[-1]["role"] == "assistant":
        raise RecordError("the prompt must end with a user's turn")
    return {"prompt": prompt, **_optional(row)}


def parse_demonstration(row: dict[str, Any]) -> Record:
    row = demonstration_columns(row)
    if "messages" in row:
        messages = parse_messages(row["messages"], "messages")
        if messages[-1]["role"] != "assistant":
            raise RecordError("messages must end with an assistant's turn, the response that is learnt")
        trained = trained_turns(row["messages"], messages, "messages")
        if not any(trained):
            raise UnusableRecord("every answer of the dialogue says `train: false` or `weight: 0`")
        return {"messages": messages, "trained": trained, **_optional(row)}
    name = next((name for name in ("response", "completion") if name in row), None)
    if name is None or "prompt" not in row:
        raise RecordError(
            f"needs `prompt` and `response` (or `completion`), or `messages`; columns are: {column_names(row)}"
        )
    if any(name == "label" and isinstance(value, bool) for name, value in row.items()) and not row["label"]:
        raise RecordError(
            "`label` is false, so the answer is not to be learnt; remove such rows, or say `problems: drop`"
        )
    prompt = _prompt(row["prompt"])
    response = {"role": "assistant", "content": _response(row, name, prompt)}
    return {"messages": [*prompt, response], "trained": [False] * len(prompt) + [True], **_optional(row)}


def parse_ranking(row: dict[str, Any]) -> Record:
    row = comparison_columns(row)
    if "responses" in row or "ranks" in row:
        return _parse_ranks(row)
    for chosen, rejected in (("chosen", "rejected"), ("winner", "loser"), ("winning_response", "losing_response")):
        if chosen in row and rejected in row:
            break
    else:
        one_answer = {"response", "completion"} & row.keys() and {"label", "score", "rating"} & row.keys()
        raise RecordError(
            "needs `prompt`, `chosen`, `rejected` (or `prompt`, `responses`, `ranks`); columns are: "
            + column_names(row)
            + ("; rows that judge one answer each must be joined to pairs of a prompt first" if one_answer else "")
        )
    problem: Record = {}
    if "prompt" in row:
        prompt = _prompt(row["prompt"])
        pair = [_response(row, name, prompt, may_be_empty=True) for name in (chosen, rejected)]
    else:
        prompt, pair, comparable = _hh_pair({"chosen": row[chosen], "rejected": row[rejected]})
        if not comparable:  # a defect of published data, for `problems:` to decide
            problem = {"problem": "the dialogues differ before their last answer"}
    return {"prompt": prompt, "responses": pair, "ranks": [1, 2], **problem, **_optional(row)}


def _parse_ranks(row: dict[str, Any]) -> Record:
    for name in ("prompt", "responses", "ranks"):
        if name not in row:
            raise RecordError(f"a ranking needs `{name}`; columns are: {column_names(row)}")
    responses, ranks = row["responses"], row["ranks"]
    if not isinstance(responses, list) or not all(isinstance(item, str) for item in responses):
        raise RecordError(f"`responses` must be a list of texts, got {shorten(responses)}")
    if not isinstance(ranks, list) or not all(rank is None or _is_rank(rank) for rank in ranks):
        raise RecordError(
            f"`ranks` must be a list of whole numbers from 1 (best), null where a response was not ranked, got {shorten(ranks)}"
        )
    if len(ranks) != len(responses):
        raise RecordError(f"{len(responses)} responses but {len(ranks)} ranks; give one rank a response")
    ranked = [(text, int(rank)) for text, rank in zip(responses, ranks, strict=True) if rank is not None]
    if not ranked:
        raise UnusableRecord("no response is ranked")
    prompt = _prompt(row["prompt"])
    return {"prompt": prompt, "responses": [t for t, _ in ranked], "ranks": [r for _, r in ranked], **_optional(row)}


def _is_rank(value: Any) -> bool:
    """A whole number from 1; tables with nulls hold whole numbers as 1.0."""
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return whole and not isinstance(value, bool) and value >= 1


def _hh_pair(row: dict[str, Any]) -> tuple[list[Message], list[str], bool]:
    """HH style: `chosen` and `rejected` hold whole dialogues; the last says whether only their last answers differ."""
    dialogues = []
    for name in ("chosen", "rejected"):
        value = row[name]
        turns = parse_messages(value, name, True) if isinstance(value, list) else parse_hh_turns(_text(row, name), name)
        if turns[-1]["role"] != "assistant":
            raise RecordError(f"`{name}` must end with an answer (`Assistant:` turn); or give `prompt` apart")
        dialogues.append(turns)
    chosen, rejected = dialogues
    if len(chosen) == 1:
        raise RecordError("no column `prompt`, and `chosen` is no dialogue; add the prompt")
    return chosen[:-1], [chosen[-1]["content"], rejected[-1]["content"]], chosen[:-1] == rejected[:-1]


def _text(row: dict[str, Any], name: str) -> str:
    if name not in row:
        raise RecordError(f"no column `{name}`; columns are: {column_names(row)}")
    value = row[name]
    if not isinstance(value, str):
        raise RecordError(f"`{name}` must be text, got {shorten(value)}")
    if not value.strip():
        raise RecordError(f"`{name}` is empty; fill it or remove the row")
    return value


def _response(row: dict[str, Any], name: str, prompt: list[Message], may_be_empty: bool = False) -> str:
    """A response as text, or as messages whose last is the assistant's and whose others repeat the prompt."""
    value = row[name]
    if may_be_empty and isinstance(value, str) and not value.strip():
        return value
    if not isinstance(value, list):
        text = _text(row, name)
        refuse_written_list(text, name)
        return text
    messages = parse_messages(value, name, may_be_empty)
    without_system = prompt[1:] if prompt[0]["role"] == "system" else prompt
    if messages[-1]["role"] != "assistant" or messages[:-1] not in ([], prompt, without_system):
        raise RecordError(
            f"`{name}` must be text or messages that end with the assistant's after the prompt's, got {shorten(value)}"
        )
    return messages[-1]["content"]


def _prompt(value: Any) -> list[Message]:
    if isinstance(value, str):
        if not value.strip():
            raise RecordError("`prompt` is empty; fill it or remove the row")
        refuse_written_list(value, "prompt")
        messages = parse_prompt_text(value)
    else:
        try:
            messages = parse_messages(value, "prompt")
        except UnusableRecord as error:
            raise RecordError(str(error)) from None
    if messages[-1]["role"] in ("assistant", "system"):
        raise RecordError(f"`prompt` must end with a user's turn, it ends with {messages[-1]['role']!r}")
    return messages


def _optional(row: dict[str, Any]) -> Record:
    optional: dict[str, Any] = {}
    for name in ("confidence", "margin"):
        if (value := row.get(name)) is not None:
            optional[name] = _finite_number(value, name)
    for name in ("labeler", "split", "id"):
        if (value := row.get(name)) is not None:
            optional[name] = _name(value, name)
    if "split" in optional:
        split_side(optional["split"])
    return cast(Record, optional)


def _finite_number(value: Any, name: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise RecordError(f"`{name}` must be a finite number, got {shorten(value)}")
    if abs(value) > 1e300 or value != value:
        raise RecordError(f"`{name}` must be a finite number, got {shorten(value)}")
    return value


def _name(value: Any, name: str) -> Any:
    """Text; a labeler may be a number (tables with nulls hold whole numbers as 3.0), an id stays one."""
    if name == "labeler" and isinstance(value, int | float) and not isinstance(value, bool):
        return str(int(value) if value == value // 1 else value)
    if not isinstance(value, str) and (name != "id" or not isinstance(value, int)):
        raise RecordError(f"`{name}` must be text, got {shorten(value)}")
    return value


def _keeping_row(parse: Parser) -> Parser:
    return lambda row: {**parse(row), "row": dict(row)}


PARSERS: dict[str, Parser] = {
    "document": parse_document,
    "demonstration": _keeping_row(parse_demonstration),
    "ranking": _keeping_row(parse_ranking),
    "prompt": _keeping_row(parse_prompt),
}

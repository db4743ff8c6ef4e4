"""Layouts of published files and of labeling tools' exports, rewritten in our columns before a row is parsed.

Label Studio and Argilla exports (one row per judgement), Alpaca's and Dolly's instructions, ShareGPT's conversations, a `system` column,
two answers with a column that says which won.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from pipeline.data.files import RecordError, UnusableRecord
from pipeline.data.messages import parse_prompt_text
from pipeline.errors import shorten

Row = dict[str, Any]
VERDICT_COLUMNS = ("winner", "preference", "preferred", "choice", "verdict", "selected", "better", "label")
_FIRST = {"a", "first", "left", "model_a", "response_a", "answer_a"}
_SECOND = {"b", "second", "right", "model_b", "response_b", "answer_b"}
_TIES = {"tie", "tied", "equal", "same", "both", "neither", "draw", "tie (bothbad)", "both_bad"}
_NUMBERED = re.compile(r"(.+?)([_-]?)(a|b|1|2)")


class TrackedRow(dict[str, Any]):
    """A row that remembers which of its columns were read, so that the others can be named."""

    def __init__(self, columns: Row):
        super().__init__(columns)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        return super().get(name, default)

    @property
    def unread(self) -> set[str]:
        """Columns that hold something and were not read."""
        return {name for name, value in self.items() if name not in self.read and value not in (None, "", [], {})}


def rename_columns(row: Row, columns: dict[str, str] | None) -> Row:
    """A row with the file's columns renamed to ours (`columns`: ours → the file's)."""
    if not columns:
        return row
    for ours, theirs in columns.items():
        if theirs not in row:
            raise MissingColumn(f"no column `{theirs}` (columns: {ours} ← {theirs}); columns are: {column_names(row)}")
    mapped = {ours: row[theirs] for ours, theirs in columns.items()}
    _check_verdict(row, columns)
    renamed = {**{name: value for name, value in row.items() if name not in columns.values()}, **mapped}
    if columns.get("prompt") == "instruction":  # Alpaca's and Dolly's, whose second column belongs to the prompt
        renamed["prompt"] = _with_input(renamed.get("prompt"), renamed)
        renamed = {name: value for name, value in renamed.items() if name not in ("input", "context")}
    return renamed


class MissingColumn(RecordError):
    """A row lacks a column that the recipe maps. Where the first row does, the map is wrong, and told once."""


class WrongColumnMap(RecordError):
    """The recipe maps columns to the wrong names of ours: told once, at the first row that shows it."""


def column_names(names: Iterable[str], most: int = 20) -> str:
    """Names of columns for a message, on one line."""
    shown = [name if name.isprintable() and len(name) < 60 else shorten(name, 60) for name in sorted(map(str, names))]
    return (", ".join(shown[:most]) or "none") + (", …" if len(shown) > most else "")


def _check_verdict(row: Row, columns: dict[str, str]) -> None:
    """Refuse a map that calls one column chosen where another column says that it lost."""
    chosen, rejected = columns.get("chosen"), columns.get("rejected")
    if chosen is None or rejected is None:
        return
    for name in VERDICT_COLUMNS:
        if name in row and name not in columns.values() and _side(row[name], chosen, rejected) not in (None, 1):
            raise WrongColumnMap(
                f"`{name}` is {shorten(row[name])}, so `{chosen}` is not always the chosen response; map the two as "
                f"`columns: {{response_a: {chosen}, response_b: {rejected}, winner: {name}}}`"
            )


def _side(value: Any, first: str, second: str) -> int | None:
    """Which of two responses a verdict names: 1, 2, 0 for a tie, or None where it is no verdict."""
    if not isinstance(value, str | int) or isinstance(value, bool):
        return None
    text = str(value).strip().lower()
    if text in _TIES:
        return 0
    endings = {first[-1:]: 1, second[-1:]: 2} if (first[-1:], second[-1:]) in (("1", "2"), ("a", "b")) else {}
    if text in endings or text in (first.lower(), second.lower()):
        return endings.get(text) or (1 if text == first.lower() else 2)
    return 1 if text in _FIRST else 2 if text in _SECOND else None


# ------------------------------------------------------------------------------------------------ exports of labeling tools


def expand_row(row: Row) -> Iterator[Row]:
    """A labeling tool's task as one row per judgement; any other row as it is."""
    if isinstance(row.get("data"), dict) and isinstance(row.get("annotations"), list):
        yield from _label_studio(row)
    elif isinstance(row.get("fields"), dict) and isinstance(row.get("responses"), dict):
        yield from _argilla(row)
    else:
        yield row


def _label_studio(row: Row) -> Iterator[Row]:
    annotations = [a for a in row["annotations"] if isinstance(a, dict) and not a.get("was_cancelled")]
    if not annotations:
        raise UnusableRecord("a task without annotations")
    for annotation in annotations:
        judged = {**row["data"]}
        if annotation.get("completed_by") is not None:
            by = annotation["completed_by"]
            judged["labeler"] = by.get("email", by.get("id")) if isinstance(by, dict) else by
        results = annotation.get("result")
        for result in results if isinstance(results, list) else ():
            value = result.get("value") if isinstance(result, dict) else None
            if isinstance(value, dict):
                judged |= _label_studio_answer(str(result.get("from_name")), value)
        yield judged


def _label_studio_answer(name: str, value: Row) -> Row:
    if "selected" in value:
        return {"winner": value["selected"]}
    for key in ("text", "choices", "rating"):
        if key in value:
            answer = value[key]
            return {name: answer[0] if isinstance(answer, list) and len(answer) == 1 else answer}
    return {}


def _argilla(row: Row) -> Iterator[Row]:
    """One row per user; a ranking of fields becomes `responses` and `ranks`, any other answer a column."""
    users: dict[str, Row] = {}
    for question, answers in row["responses"].items():
        for answer in answers if isinstance(answers, list) else ():
            if isinstance(answer, dict) and answer.get("status", "submitted") == "submitted":
                users.setdefault(str(answer.get("user_id")), {})[question] = answer.get("value")
    if not users:
        raise UnusableRecord("a record without submitted responses")
    for user, answers in users.items():
        judged = {**row["fields"], "labeler": user}
        for question, value in answers.items():
            judged |= _ranked_fields(value, row["fields"]) or {question: value}
        yield judged


def _ranked_fields(value: Any, fields: Row) -> Row | None:
    """`responses` and `ranks` of a ranking question: names of fields, best first, or {value, rank} of each."""
    if not isinstance(value, list) or len(value) < 2:
        return None
    ranks: dict[str, Any] = {}
    for place, item in enumerate(value, 1):
        name, rank = (item.get("value"), item.get("rank")) if isinstance(item, dict) else (item, place)
        if not isinstance(name, str) or name not in fields:
            return None
        ranks[name] = rank
    return {"responses": [fields[name] for name in ranks], "ranks": list(ranks.values())}


# ------------------------------------------------------------------------------------------------ columns


def demonstration_columns(row: Row) -> Row:
    """`prompt` and `response`, or `messages`, of Alpaca's and ShareGPT's columns and beside a `system` column."""
    if "messages" not in row and isinstance(row.get("conversations"), list):
        row = _replace(row, {"messages": row["conversations"]}, ("conversations",))
    if "prompt" not in row and "instruction" in row and ("output" in row or "response" in row):
        answer = "response" if "response" in row else "output"
        prompt = _with_input(row["instruction"], row)
        row = _replace(row, {"prompt": prompt, "response": row[answer]}, ("instruction", "output", "input", "context"))
    return _with_system(row)


def prompt_columns(row: Row) -> Row:
    """The columns of a prompt, of whatever record it is part."""
    if "prompt" not in row and "instruction" in row:
        row = _replace(row, {"prompt": _with_input(row["instruction"], row)}, ("instruction", "input", "context"))
    if "prompt" not in row and "messages" not in row and isinstance(row.get("conversations"), list):
        row = _replace(row, {"messages": row["conversations"]}, ("conversations",))
    return _with_system(row)


def comparison_columns(row: Row) -> Row:
    """`responses` and `ranks` of two answers beside a column that says which won; and a `system` column."""
    pair = None if {"responses", "ranks", "chosen", "rejected", "loser"} & row.keys() else _answer_pair(row)
    verdict = next((name for name in VERDICT_COLUMNS if name in row), None)
    if pair and verdict:
        first, second = pair
        side = _side(row[verdict], first, second)
        if side is None:
            raise RecordError(
                f"`{verdict}` must say which of `{first}` and `{second}` won (a or b, left or right, a column's name, tie), "
                f"got {shorten(row[verdict])}"
            )
        ranks = [1, 1] if side == 0 else [1, 2] if side == 1 else [2, 1]
        row = _replace(row, {"responses": [row[first], row[second]], "ranks": ranks}, (first, second, verdict))
        row = prompt_columns(row) if "prompt" not in row and "instruction" in row else row
    return _with_system(row)


def _answer_pair(row: Row) -> tuple[str, str] | None:
    """Two columns of text called alike but for a last a and b, or 1 and 2."""
    if "response_a" in row and "response_b" in row:
        return "response_a", "response_b"
    stems: dict[str, dict[str, str]] = {}
    for name, value in row.items():
        if isinstance(value, str) and (match := _NUMBERED.fullmatch(name)) and not name.startswith("model"):
            stems.setdefault(match[1] + match[2], {})[match[3]] = name
    pairs = [
        (found[x], found[y]) for found in stems.values() for x, y in (("a", "b"), ("1", "2")) if {x, y} <= found.keys()
    ]
    return pairs[0] if len(pairs) == 1 else None


def _with_input(instruction: Any, row: Row) -> Any:
    """Alpaca's `input` (Dolly's `context`) belongs to the prompt: it follows the instruction."""
    extra = row.get("input") or row.get("context")
    if not isinstance(extra, str) or not extra.strip() or not isinstance(instruction, str):
        return instruction
    return f"{instruction}\n\n{extra}"


def _with_system(row: Row) -> Row:
    """A `system` column as the first message of the prompt or dialogue."""
    column = next((name for name in ("messages", "prompt") if name in row), None)
    system = row["system"] if column and "system" in row else None
    if system is None or column is None or (isinstance(system, str) and not system.strip()):
        return row
    if not isinstance(system, str):
        raise RecordError(f"`system` must be text, got {shorten(system)}")
    dialogue = row[column]
    if isinstance(dialogue, str):
        dialogue = parse_prompt_text(dialogue)
    if not isinstance(dialogue, list):
        return row
    if dialogue and isinstance(dialogue[0], dict) and "system" in (dialogue[0].get("role"), dialogue[0].get("from")):
        raise RecordError(f"a `system` column and a system message in `{column}`; keep one of them")
    return _replace(row, {column: [{"role": "system", "content": system}, *dialogue]}, ("system",))


def joined_columns(row: Row, messages: list[dict[str, str]]) -> set[str]:
    """Columns beside the prompt's own whose text became part of it."""
    values = ((name, row[name]) for name in ("input", "context", "system") if isinstance(row.get(name), str))
    return {name for name, text in values if text.strip() and any(text in m["content"] for m in messages[:2])}


def _replace(row: Row, new: Row, old: tuple[str, ...]) -> Row:
    """A row with some columns instead of others, which count as read."""
    replaced = TrackedRow({**{name: value for name, value in row.items() if name not in old}, **new})
    if isinstance(row, TrackedRow):
        row.read |= set(old)
        replaced.read = row.read
    return replaced

"""The record kinds and their readers: every row is checked, and every complaint names file and line.

A parsed record is plain data in one canonical form, whatever the file called its columns:

    document       {"text"}
    demonstration  {"messages", "first_trained"}        messages from index first_trained on are trained (assistant turns)
    ranking        {"prompt", "responses", "ranks"}     a comparison is a ranking of two
    prompt         {"prompt"}

`prompt` is a list of {"role", "content"}; each record also keeps the optional columns below, `line`, and but for
documents the file's own `row`, which is what reward functions and judges are given.
"""

from __future__ import annotations

import gzip
import json
import math
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from pipeline.errors import UserError, shorten

Record = dict[str, Any]
OPTIONAL = ("labeler", "split", "id", "confidence", "margin")
ROLES = ("system", "user", "assistant", "tool")
MAX_LISTED = 20
MAX_LINE_BYTES = 64 << 20
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")


class RecordError(ValueError):
    """One row is wrong; the reader adds file and line."""


class Problems:
    """Collects what is wrong in a source, and refuses it with up to 20 lines at once."""

    def __init__(self, source: str):
        self.source = source
        self.lines: dict[str, list[int]] = {}  # message → lines, the first MAX_LISTED in all
        self.count = 0

    def add(self, line: int, message: str) -> None:
        self.count += 1
        if self.count <= MAX_LISTED:
            self.lines.setdefault(message, []).append(line)

    def refuse(self) -> None:
        """
        Raises:
            UserError: one line per fault, with the lines of the file that have it.
        """
        if not self.count:
            return
        faults = [
            f"{self.source}:{lines[0]}: {message}"
            + (f" (also lines {', '.join(map(str, lines[1:]))})" if lines[1:] else "")
            for message, lines in self.lines.items()
        ]
        if self.count > MAX_LISTED:
            faults.append(f"… and {self.count - MAX_LISTED} more in {self.source}")
        raise UserError("\n".join(faults))


def iter_jsonl(path: Path, parse: Callable[[dict[str, Any]], Record], max_rows: int | None = None) -> Iterator[Record]:
    """Parse a JSONL file (also gzipped) line by line; `line` is added to each record. Holds one line in memory.

    Raises:
        UserError: after the last line, with file:line of every bad row (20 listed, the rest counted).
    """
    problems = Problems(str(path))
    count = 0
    for number, raw in _lines(path):
        if max_rows is not None and count >= max_rows:
            break
        try:
            row = _json_object(raw, first=number == 1)
            if row is not None:
                record = {**parse(row), "line": number}
                count += 1
                yield record
        except RecordError as error:
            problems.add(number, str(error))
    problems.refuse()
    if not count:
        raise UserError("no records; expected one JSON object a line", file=path)


def read_jsonl(path: Path, parse: Callable[[dict[str, Any]], Record], max_rows: int | None = None) -> list[Record]:
    """All of `iter_jsonl`."""
    return list(iter_jsonl(path, parse, max_rows))


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines; of one that is too long only the beginning, which is enough to refuse it."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            number = 0
            while raw := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                yield number, raw
                rest = raw
                while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
                    rest = file.readline(MAX_LINE_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot be read: {error}", file=path) from error


def _json_object(raw: bytes, first: bool) -> dict[str, Any] | None:
    """One line's object; None for an empty line."""
    if len(raw) > MAX_LINE_BYTES:
        raise RecordError(f"is longer than {MAX_LINE_BYTES >> 20} MiB; a record is one JSON object a line")
    if first and raw.startswith(b"\xef\xbb\xbf"):
        raw = raw[3:]  # a byte-order mark says nothing in UTF-8
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecordError(
            f"not UTF-8 (byte {error.start + 1}: {raw[error.start]:#04x}); save the file as UTF-8"
        ) from None
    if "\x00" in text:
        raise RecordError("holds a NUL byte; the file is damaged or UTF-16, save it as UTF-8")
    if not text.strip():
        return None
    try:
        row = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise RecordError(f"not valid JSON ({error.msg}, column {error.colno}): {shorten(text.strip())}") from None
    except RecursionError:
        raise RecordError("nested too deeply to be a record") from None
    if "\\ud" in text.lower():  # an escape may be half a pair, which no file can hold as UTF-8
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise RecordError("holds half of a surrogate pair (\\ud8xx alone); write the character itself") from None
    if not isinstance(row, dict):
        raise RecordError(f"expected a JSON object, got {shorten(row)}")
    return row


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RecordError(f"key {twice!r} stands twice; keep one")
    return row


def _no_constant(name: str) -> NoReturn:
    raise RecordError(f"{name} is no JSON number; leave the key out instead")


# ---------------------------------------------------------------------------------------------- parsers, one a kind


def parse_document(row: dict[str, Any]) -> Record:
    return {"text": _text(row, "text"), **_optional(row)}


def parse_prompt(row: dict[str, Any]) -> Record:
    """A prompt from any kind of record; its other columns are dropped."""
    if "prompt" in row:
        prompt = _prompt(row["prompt"])
    elif "messages" in row:
        messages = _messages(row["messages"], "messages")
        prompt = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    elif "chosen" in row and "rejected" in row:
        prompt = _hh_pair(row)[0]
    else:
        raise RecordError(f"no column `prompt`; columns are: {', '.join(sorted(row)) or 'none'}")
    if not prompt or prompt[-1]["role"] == "assistant":
        raise RecordError("the prompt must end with a user's turn")
    return {"prompt": prompt, **_optional(row)}


def parse_demonstration(row: dict[str, Any]) -> Record:
    if "messages" in row:
        messages = _messages(row["messages"], "messages")
        if messages[-1]["role"] != "assistant":
            raise RecordError("messages must end with an assistant's turn, the response that is learnt")
        return {"messages": messages, "first_trained": 0, **_optional(row)}
    name = next((name for name in ("response", "completion") if name in row), None)
    if name is None or "prompt" not in row:
        raise RecordError(
            f"needs `prompt` and `response` (or `completion`), or `messages`; columns are: {', '.join(sorted(row)) or 'none'}"
        )
    prompt = _prompt(row["prompt"])
    response = {"role": "assistant", "content": _response(row, name)}
    return {"messages": [*prompt, response], "first_trained": len(prompt), **_optional(row)}


def parse_ranking(row: dict[str, Any]) -> Record:
    if "responses" in row or "ranks" in row:
        return _parse_ranks(row)
    for chosen, rejected in (("chosen", "rejected"), ("winner", "loser"), ("winning_response", "losing_response")):
        if chosen in row and rejected in row:
            break
    else:
        raise RecordError(
            "needs `prompt`, `chosen`, `rejected` (or `prompt`, `responses`, `ranks`); columns are: "
            + (", ".join(sorted(row)) or "none")
        )
    if "prompt" in row:
        prompt = _prompt(row["prompt"])
        pair = [_response(row, name, may_be_empty=True) for name in (chosen, rejected)]
    else:
        prompt, pair, comparable = _hh_pair({"chosen": row[chosen], "rejected": row[rejected]})
        if not comparable:  # a defect of published data, for `problems:` to decide
            problem = {"problem": "the dialogues differ before their last answer"}
            return {"prompt": prompt, "responses": pair, "ranks": [1, 2], **problem, **_optional(row)}
    return {"prompt": prompt, "responses": pair, "ranks": [1, 2], **_optional(row)}


def _parse_ranks(row: dict[str, Any]) -> Record:
    for name in ("prompt", "responses", "ranks"):
        if name not in row:
            raise RecordError(f"a ranking needs `{name}`; columns are: {', '.join(sorted(row))}")
    responses, ranks = row["responses"], row["ranks"]
    if not isinstance(responses, list) or not all(isinstance(item, str) for item in responses):
        raise RecordError(f"`responses` must be a list of texts, got {shorten(responses)}")
    if not isinstance(ranks, list) or not all(isinstance(r, int) and not isinstance(r, bool) and r >= 1 for r in ranks):
        raise RecordError(f"`ranks` must be a list of whole numbers from 1 (best), got {shorten(ranks)}")
    if len(ranks) != len(responses):
        raise RecordError(f"{len(responses)} responses but {len(ranks)} ranks; give one rank a response")
    return {"prompt": _prompt(row["prompt"]), "responses": responses, "ranks": ranks, **_optional(row)}


def _hh_pair(row: dict[str, Any]) -> tuple[list[dict[str, str]], list[str], bool]:
    """HH style: `chosen` and `rejected` hold whole dialogues; the last says whether only their last answers differ."""
    dialogues = []
    for name in ("chosen", "rejected"):
        turns = _messages(row[name], name) if isinstance(row[name], list) else _hh_turns(_text(row, name), name)
        if turns[-1]["role"] != "assistant":
            raise RecordError(f"`{name}` must end with an answer (`Assistant:` turn); or give `prompt` apart")
        dialogues.append(turns)
    chosen, rejected = dialogues
    if len(chosen) == 1:
        raise RecordError("no column `prompt`, and `chosen` is no dialogue; add the prompt")
    return chosen[:-1], [chosen[-1]["content"], rejected[-1]["content"]], chosen[:-1] == rejected[:-1]


def _hh_turns(text: str, name: str) -> list[dict[str, str]]:
    parts = _HH_TURN.split(text if text.startswith("\n\n") else "\n\n" + text)
    if parts[0].strip() or len(parts) < 3:
        raise RecordError(f"no column `prompt`, and `{name}` is no `Human:`/`Assistant:` dialogue: {shorten(text)}")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[1::2], parts[2::2], strict=True)]


def _text(row: dict[str, Any], name: str) -> str:
    if name not in row:
        raise RecordError(f"no column `{name}`; columns are: {', '.join(sorted(row)) or 'none'}")
    value = row[name]
    if not isinstance(value, str):
        raise RecordError(f"`{name}` must be text, got {shorten(value)}")
    if not value.strip():
        raise RecordError(f"`{name}` is empty; fill it or remove the row")
    return value


def _response(row: dict[str, Any], name: str, may_be_empty: bool = False) -> str:
    """A response as text, or as messages whose last is the assistant's and whose others repeat the prompt."""
    value = row[name]
    if may_be_empty and isinstance(value, str) and not value.strip():
        return value
    if isinstance(value, list):
        messages = _messages(value, name)
        if messages[-1]["role"] != "assistant" or (len(messages) > 1 and messages[:-1] != _prompt(row["prompt"])):
            raise RecordError(
                f"`{name}` must be text or messages that end with the assistant's after the prompt's, got {shorten(value)}"
            )
        return messages[-1]["content"]
    return _text(row, name)


def _prompt(value: Any) -> list[dict[str, str]]:
    if isinstance(value, str):
        if not value.strip():
            raise RecordError("`prompt` is empty; fill it or remove the row")
        return [{"role": "user", "content": value}]
    messages = _messages(value, "prompt")
    if messages[-1]["role"] in ("assistant", "system"):
        raise RecordError(f"`prompt` must end with a user's turn, it ends with {messages[-1]['role']!r}")
    return messages


def _messages(value: Any, name: str) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise RecordError(f"`{name}` must be text or a list of {{role, content}}, got {shorten(value)}")
    for position, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str) or "role" not in message:
            raise RecordError(f"`{name}`[{position}] must be {{role, content}} with text, got {shorten(message)}")
        if message["role"] not in ROLES:
            raise RecordError(
                f"`{name}`[{position}]: unknown role {shorten(message['role'])}; use one of {', '.join(ROLES)}"
            )
        if not message["content"].strip():
            raise RecordError(f"`{name}`[{position}]: content is empty; fill it or remove the row")
        if message["role"] == "system" and position > 0:
            raise RecordError(f"`{name}`[{position}]: a system message stands first or not at all")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _optional(row: dict[str, Any]) -> Record:
    kept: Record = {}
    for name in OPTIONAL:
        value = row.get(name)
        if value is None:
            continue
        if name in ("confidence", "margin"):
            if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
                raise RecordError(f"`{name}` must be a finite number, got {shorten(value)}")
        elif not isinstance(value, str) and (name != "id" or not isinstance(value, int)):
            raise RecordError(f"`{name}` must be text, got {shorten(value)}")
        kept[name] = value
    return kept


def _keeping_row(parse: Callable[[dict[str, Any]], Record]) -> Callable[[dict[str, Any]], Record]:
    return lambda row: {**parse(row), "row": row}


PARSERS: dict[str, Callable[[dict[str, Any]], Record]] = {
    "document": parse_document,
    "demonstration": _keeping_row(parse_demonstration),
    "ranking": _keeping_row(parse_ranking),
    "prompt": _keeping_row(parse_prompt),
}

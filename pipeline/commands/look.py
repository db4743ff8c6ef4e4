"""`rlhf init`'s look at data: which of our columns a file's columns are, how many rows it has, how long they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.data.cards import card_columns, split_files
from pipeline.data.encoding import ChatEncoder
from pipeline.data.entries import DatasetEntry
from pipeline.data.files import SUFFIXES, RecordError, iter_rows
from pipeline.data.layouts import expand_row, rename_columns
from pipeline.data.records import PARSERS, Record, at_row
from pipeline.data.sources import Source, read_source
from pipeline.errors import UserError
from pipeline.training.parent_names import is_hub_id

SAMPLE = 2000  # rows whose lengths are counted
CHARACTERS_PER_TOKEN = 2.0  # where no tokenizer is there yet; few, so that lengths are not taken for too short
NEEDED = {"document": ("text",), "demonstration": ("prompt", "response"), "ranking": ("prompt", "chosen", "rejected"), "prompt": ("prompt",)}  # fmt: skip
# Names that published files have for our columns. Only what stands alone in a row is taken, and it is said.
OTHER_NAMES = {
    "text": ("content", "document", "body", "passage", "article"),
    "prompt": ("question", "query", "instruction", "input", "request", "user", "context"),
    "response": ("answer", "output", "reply", "completion", "target", "assistant"),
    "chosen": ("preferred", "better", "best", "accepted", "good", "positive"),
    "rejected": ("dispreferred", "worse", "worst", "refused", "bad", "negative"),
}


@dataclass(frozen=True)
class Lengths:
    """Tokens of a sample of rows: of prompts, of the longest response of each, of both together."""

    prompts: list[int] = field(default_factory=list)
    responses: list[int] = field(default_factory=list)
    together: list[int] = field(default_factory=list)

    def __add__(self, other: Lengths) -> Lengths:
        return Lengths(*(getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)))


@dataclass(frozen=True)
class Dataset:
    """A dataset that was read: its entry in the recipe, and what it holds."""

    kind: str
    entry: DatasetEntry
    source: Source
    guessed: bool = False  # its columns, by their names

    @property
    def rows(self) -> int:
        return len(self.source.records)

    @property
    def name(self) -> str:
        return str(self.entry.path or self.entry.hub)

    def describe(self) -> str:
        """One line: rows, kind, and the columns that are read under other names."""
        mapped = ", ".join(f"{ours} ← {theirs}" for ours, theirs in (self.entry.columns or {}).items())
        why = " (guessed from their names; correct `columns:` where that is wrong)" if self.guessed else ""
        return f"{self.name}: {self.rows:,} {self.kind}s" + (f", {mapped}{why}" if mapped else "")


def look(name: str, kind: str, columns: dict[str, str], ask: Callable[[str], str] | None) -> Dataset:
    """Read a dataset whole, as the stages will.

    Args:
        name: a file, a folder with a card, or a Hub id. columns: the user's map, for the files that have such columns.
        ask: a question to the user about a column that is not known; None: nobody is there.

    Raises:
        UserError: it cannot be read as records of `kind`.
    """
    path = Path(name)
    if not path.exists():
        if path.suffix in (".txt", *SUFFIXES) or not is_hub_id(name):
            raise UserError("does not exist; correct the name", file=path)
        entry = DatasetEntry(hub=name, columns=columns or None)
        return Dataset(kind, entry, read_source(entry, kind, Path()))
    entry = DatasetEntry(path=name)
    mapped, guessed = (None, False) if path.suffix == ".txt" else _columns(path, kind, columns, ask)
    entry = dataclasses.replace(entry, columns=mapped)
    return Dataset(kind, entry, read_source(entry, kind, Path()), guessed)


def _columns(
    path: Path, kind: str, given: dict[str, str], ask: Callable[[str], str] | None
) -> tuple[dict[str, str] | None, bool]:
    """The column map that a file needs, and whether it was guessed."""
    own = card_columns(path) if path.is_dir() else None
    file = split_files(path, "train")[0] if path.is_dir() else path
    first = next((row for row in iter_rows(file) if row.columns), None)
    if first is None or first.columns is None:
        return None, False  # the reader says what is wrong
    row = first.columns
    chosen = {ours: theirs for ours, theirs in given.items() if theirs in row}
    if chosen or own:
        return chosen or None, False
    if _can_be_read(row, kind, None):
        return None, False
    guess = _guess(row, kind)
    if guess and _can_be_read(row, kind, guess):
        return guess, True
    if ask is not None:
        asked = {ours: ask(f"{path}: which column is `{ours}`? ({', '.join(map(str, row))})") for ours in NEEDED[kind]}
        return {ours: theirs for ours, theirs in asked.items() if theirs != ours} or None, False
    needed = ", ".join(NEEDED[kind])
    raise UserError(
        f"no {kind} ({needed}); its columns are: {', '.join(map(str, row))}; say --column OURS=THEIRS, e.g. "
        f"--column {NEEDED[kind][0]}={next(iter(row), 'name')}",
        file=file,
        line=first.line,
    )


def _can_be_read(row: dict[str, Any], kind: str, columns: dict[str, str] | None) -> bool:
    try:
        for expanded in expand_row(row):
            PARSERS[kind](rename_columns(expanded, columns))
    except RecordError:
        return False
    return True


def _guess(row: dict[str, Any], kind: str) -> dict[str, str] | None:
    """Our columns by the one other name of each that the row has; None where one has none, or several."""
    guess = {}
    for ours in NEEDED[kind]:
        if ours in row:
            continue
        there = [name for name in row if str(name).lower() in OTHER_NAMES[ours]]
        if len(there) != 1:
            return None
        guess[ours] = there[0]
    return guess or None


# ------------------------------------------------------------------------------------------------ lengths


def lengths(dataset: Dataset, encoder: ChatEncoder | None) -> Lengths:
    """Tokens of the first rows; estimated from characters where no tokenizer is there yet."""
    found = Lengths()
    records = dataset.source.records
    for index in range(min(SAMPLE, len(records))):
        record = records[index]
        with at_row(record):
            prompt, responses = _texts(record)
            before = _prompt_tokens(prompt, encoder)
            longest = max((_response_tokens(text, encoder) for text in responses), default=0)
        found.prompts.append(before)
        found.responses.append(longest)
        found.together.append(before + longest)
    return found


def _texts(record: Record) -> tuple[list[dict[str, str]], list[str]]:
    """The prompt and the responses of a record."""
    if "messages" in record:
        return record["messages"][:-1], [record["messages"][-1]["content"]]
    return record["prompt"], record.get("responses", [])


def _prompt_tokens(prompt: Sequence[dict[str, str]], encoder: ChatEncoder | None) -> int:
    if encoder is not None:
        return len(encoder.prompt_ids(prompt))
    return round(sum(len(message["content"]) + 8 for message in prompt) / CHARACTERS_PER_TOKEN)


def _response_tokens(text: str, encoder: ChatEncoder | None) -> int:
    return len(encoder.response_ids(text)) if encoder is not None else round(len(text) / CHARACTERS_PER_TOKEN) + 1

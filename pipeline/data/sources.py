"""From a recipe's `datasets:` to checked records, with what lineage needs to name them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.data.cards import card_columns, split_files
from pipeline.data.entries import DatasetEntry
from pipeline.data.files import FileRow, iter_rows, plain_row, read_text
from pipeline.data.hashing import sha256_file
from pipeline.data.mixing import all_weighted
from pipeline.data.records import PARSERS, Record, RowReader
from pipeline.data.splits import split_records
from pipeline.errors import UserError

logger = logging.getLogger(__name__)
SINGLE_DOCUMENT_HELD_OUT = 0.05


@dataclass(frozen=True)
class Source:
    """One dataset, read: its canonical records and its provenance."""

    name: str
    records: Sequence[Record]
    sha256: str
    weight: float | None = None
    location: str = ""
    revision: str | None = None
    single_document: bool = False
    problems: str | None = None  # of its entry

    def provenance(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "location": self.location,
            "revision": self.revision,
            "rows": len(self.records),
            "sha256": self.sha256,
        }


def read_sources(entries: Sequence[DatasetEntry], kind: str, data_root: str, on_disk: bool = False) -> list[Source]:
    """Read and check all entries as records of `kind` (a key of `records.PARSERS`).

    With `on_disk` the records wait in a file (see `arrow_storage.store_records`), so that a dataset may be larger than memory.
    """
    all_weighted([entry.weight for entry in entries])
    return [read_source(entry, kind, Path(data_root), on_disk) for entry in entries]


def read_source(entry: DatasetEntry, kind: str, data_root: Path, on_disk: bool = False) -> Source:
    if (entry.path is None) == (entry.hub is None):
        raise UserError("datasets: each entry names exactly one of `path:` and `hub:`")
    if entry.hub is not None:
        return _read_hub(entry, kind, on_disk)
    assert entry.path is not None
    path = data_root / entry.path
    if not path.exists():
        raise UserError(f"dataset {str(path)!r} does not exist; correct `path:` or say --data-root")
    files = files_of(entry, path)
    columns = entry.columns or (card_columns(path) if path.is_dir() else None)
    own_split = entry.split if path.is_file() and entry.split != "train" else None
    stream = _iter_files(files, kind, columns, entry, own_split)
    records = _gather(_strip_responses(stream, entry, str(path)), on_disk)
    return Source(
        name=entry.name or path.name.split(".")[0],
        records=records,
        sha256=digest_of(files),
        weight=entry.weight,
        location=entry.path,
        single_document=len(records) == 1 and all(file.suffix == ".txt" for file in files),
        problems=entry.problems,
    )


def files_of(entry: DatasetEntry, path: Path) -> list[Path]:
    """The files of an entry's split: of a card's folder, or the one that it names."""
    return split_files(path, entry.split, entry.subset) if path.is_dir() else [path]


def digest_of(files: Sequence[Path]) -> str:
    """What a source's `sha256` is: of its files' own."""
    return hashlib.sha256("".join(map(sha256_file, files)).encode()).hexdigest()


def _gather(records: Iterator[Record], on_disk: bool) -> Sequence[Record]:
    if not on_disk:
        return list(records)
    from pipeline.data.arrow_storage import store_records

    return store_records(records)


def _iter_files(
    files: Sequence[Path], kind: str, columns: dict[str, str] | None, entry: DatasetEntry, own_split: str | None
) -> Iterator[Record]:
    """The records of an entry's files, one at a time, at most `max_rows` in all.

    Args:
        own_split: only rows whose own `split` is this one.
    """
    left, unlimited = entry.max_rows, dataclasses.replace(entry, max_rows=None)
    for file in files:
        if left == 0:
            return
        if own_split is None:
            records = iter_file(file, kind, columns, dataclasses.replace(entry, max_rows=left))
        else:
            records = iter(list(_of_split(iter_file(file, kind, columns, unlimited), own_split, str(file)))[:left])
        for record in records:
            left = None if left is None else left - 1
            yield record


def iter_file(
    file: Path, kind: str, columns: dict[str, str] | None = None, entry: DatasetEntry | None = None
) -> Iterator[Record]:
    """The records of one file, one at a time."""
    entry = entry or DatasetEntry()
    if file.suffix == ".txt":
        if kind != "document":
            raise UserError(f"a .txt file holds documents, this stage needs {kind}s as JSONL", file=file)
        return _text_documents(file, entry.document_separator, entry.max_rows)
    reader = RowReader(str(file), PARSERS[kind], problems=entry.problems, name_unread=kind != "prompt")
    return reader.read(iter_rows(file), columns, entry.max_rows)


def _of_split(records: Iterator[Record], split: str, where: str) -> Iterator[Record]:
    """The rows of a plain file whose own `split` is the one that the recipe names."""
    others: Counter[str] = Counter()
    kept = 0
    for record in records:
        if record.get("split", "").strip().lower() == split.lower():
            kept += 1
            yield record
        else:
            others[record.get("split", "none")] += 1
    if not kept:
        names = ", ".join(f"{name} ({count})" for name, count in others.most_common(5))
        raise UserError(
            f"no row's own `split` is {split!r} (rows name: {names}); drop `split:` or name another", file=where
        )


def _text_documents(file: Path, separator: str | None, max_rows: int | None) -> Iterator[Record]:
    text = read_text(file)
    documents = text.split(separator) if separator else [text]
    numbered = [(number, document) for number, document in enumerate(documents, 1) if document.strip()]
    if not numbered:
        raise UserError("is empty", file=file)
    for number, document in numbered[:max_rows]:
        yield {"text": document, "file": str(file), "line": number}


def _read_hub(entry: DatasetEntry, kind: str, on_disk: bool) -> Source:
    assert entry.hub is not None
    table = _load_hub(entry)
    if entry.max_rows is not None:
        table = table.select(range(min(entry.max_rows, len(table))))
    reader = RowReader(entry.hub, PARSERS[kind], problems=entry.problems, name_unread=kind != "prompt")
    rows = (FileRow(number, plain_row(row)) for number, row in enumerate(table, 1))
    records = _gather(_strip_responses(reader.read(rows, entry.columns), entry, entry.hub), on_disk)
    digest = hashlib.sha256()
    for row in table:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return Source(
        name=entry.name or entry.hub.split("/")[-1],
        records=records,
        sha256=digest.hexdigest(),
        weight=entry.weight,
        location=entry.hub,
        revision=entry.revision,
        problems=entry.problems,
    )


def _load_hub(entry: DatasetEntry) -> Any:
    """The table of a Hub dataset's split.

    Raises:
        UserError: not found, offline, no such split; made by a script; files with different columns.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        return load_dataset(entry.hub, entry.subset, split=entry.split, revision=entry.revision)
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, DatasetsError) as error:
        cause = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ is not None else error
        reason = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
        remedy = ""
        if "script" in reason.lower():
            remedy = (
                "; download its data files, or name a revision that holds Parquet (`revision: refs/convert/parquet`)"
            )
        elif "cast" in reason.lower() or "column" in reason.lower():
            remedy = "; its files differ in their columns: name one configuration with `subset:`, or download the files"
        raise UserError(f"dataset {entry.hub!r} cannot be had from the Hub: {reason}{remedy}") from error


def _strip_responses(records: Iterator[Record], entry: DatasetEntry, where: str) -> Iterator[Record]:
    """Take `response_suffix` off the last answers: a published file's own end mark is text to us, and would be learnt.

    An answer that is nothing else is left out, counted and named.
    """
    suffix = entry.response_suffix
    if not suffix:
        yield from records
        return
    stripped_count = total = 0
    empty: list[int] = []
    for record in records:
        answers = _answers(record)
        total += len(answers)
        stripped_count += sum(text.endswith(suffix) for text in answers)
        stripped = [text.removesuffix(suffix).rstrip() if text.endswith(suffix) else text for text in answers]
        if "messages" in record:
            record["messages"][-1]["content"] = stripped[0]
            if not stripped[0].strip():
                empty.append(record["line"])
                continue
        elif "responses" in record:
            record["responses"] = stripped  # one that is empty now is a defect for `problems:`
        yield record
    if not stripped_count and total:
        raise UserError(f"response_suffix: no response ends in {suffix!r}; drop the key", file=where)
    logger.info("%s: response_suffix %r taken off %d of %d responses", where, suffix, stripped_count, total)
    if empty:
        lines = ", ".join(map(str, empty[:5])) + (", …" if len(empty) > 5 else "")
        logger.warning(
            "%s: %d responses are empty without their response_suffix and left out (lines %s)", where, len(empty), lines
        )


def _answers(record: Record) -> list[str]:
    if "messages" in record:
        return [record["messages"][-1]["content"]]
    return list(record.get("responses", []))


def column_map(columns: Sequence[str]) -> dict[str, str] | None:
    """A column map from flags, `ours=theirs` each."""
    pairs = [text.partition("=") for text in columns]
    for ours, equals, theirs in pairs:
        if not ours or not equals or not theirs:
            raise UserError(f"--column {ours + equals + theirs!r}: write OURS=THEIRS, e.g. prompt=instruction")
    return {ours: theirs for ours, _, theirs in pairs} or None


def fingerprint(sources: Sequence[Source]) -> list[dict[str, Any]]:
    """What identifies the data of a run: content, order and weights."""
    return [{"sha256": s.sha256, "rows": len(s.records), "weight": s.weight} for s in sources]


def replace_records(source: Source, records: Sequence[Record]) -> Source:
    return dataclasses.replace(source, records=records)


def split_texts(source: Source, fraction: float) -> tuple[list[str], list[str]]:
    """(train, held-out) texts: by hash of the document; of a single document, its last part, cut at a line's end."""
    if not source.single_document:
        train, held_out = split_records(source.records, fraction)
        if not train:
            raise UserError(f"{source.name}: no document is left to train on; lower held_out_fraction")
        return [r["text"] for r in train], [r["text"] for r in held_out]
    text = source.records[0]["text"]
    cut = text.find("\n", math.floor(len(text) * (1 - SINGLE_DOCUMENT_HELD_OUT))) + 1
    return ([text[:cut]], [text[cut:]]) if 0 < cut < len(text) else ([text], [])

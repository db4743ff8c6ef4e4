"""From a recipe's `datasets:` to checked records, with what lineage needs to name them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pipeline.checkpoints import sha256_file
from pipeline.data.cards import split_files
from pipeline.data.records import PARSERS, Problems, Record, RecordError, read_jsonl
from pipeline.errors import UserError

logger = logging.getLogger(__name__)


class Entry(Protocol):
    """What a dataset's line in a recipe says (see `arguments.DatasetEntry`)."""

    @property
    def path(self) -> str | None: ...
    @property
    def hub(self) -> str | None: ...
    @property
    def name(self) -> str | None: ...
    @property
    def subset(self) -> str | None: ...
    @property
    def split(self) -> str: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def columns(self) -> dict[str, str] | None: ...
    @property
    def weight(self) -> float | None: ...
    @property
    def max_rows(self) -> int | None: ...
    @property
    def document_separator(self) -> str | None: ...
    @property
    def response_suffix(self) -> str | None: ...


@dataclass(frozen=True)
class Source:
    """One dataset, read: its canonical records and its provenance."""

    name: str
    records: list[Record]
    sha256: str
    weight: float | None = None
    location: str = ""
    revision: str | None = None
    single_document: bool = False

    def provenance(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "location": self.location,
            "revision": self.revision,
            "rows": len(self.records),
            "sha256": self.sha256,
        }


def read_sources(entries: Sequence[Entry], kind: str, data_root: str) -> list[Source]:
    """Read and check all entries as records of `kind` (a key of `records.PARSERS`)."""
    return [read_source(entry, kind, Path(data_root)) for entry in entries]


def read_source(entry: Entry, kind: str, data_root: Path) -> Source:
    if (entry.path is None) == (entry.hub is None):
        raise UserError("datasets: each entry names exactly one of `path:` and `hub:`")
    if entry.hub is not None:
        return _read_hub(entry, kind)
    assert entry.path is not None
    path = data_root / entry.path
    if not path.exists():
        raise UserError(f"dataset {str(path)!r} does not exist; correct `path:` or say --data-root")
    files = split_files(path, entry.split, entry.subset) if path.is_dir() else [path]
    name = entry.name or path.name.split(".")[0]
    records = [record for file in files for record in _read_file(file, entry, kind)]
    records = _strip_responses(records, entry, str(path))
    if entry.max_rows is not None:
        records = records[: entry.max_rows]
    digest = hashlib.sha256("".join(sha256_file(file) for file in files).encode()).hexdigest()
    single = len(records) == 1 and all(file.suffix == ".txt" for file in files)
    return Source(name, records, digest, entry.weight, entry.path, single_document=single)


def _read_file(file: Path, entry: Entry, kind: str) -> list[Record]:
    parse = _with_columns(PARSERS[kind], entry.columns)
    if file.suffix == ".txt":
        if kind != "document":
            raise UserError(f"a .txt file holds documents, this stage needs {kind}s as JSONL", file=file)
        return _read_text(file, entry.document_separator)
    if file.name.endswith((".jsonl", ".jsonl.gz", ".json")):
        return read_jsonl(file, parse, entry.max_rows)
    if file.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.read_table(file)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"is no readable parquet file: {error}", file=file) from error
        return _parse_rows(str(file), iter(table.to_pylist()), parse, entry.max_rows)
    raise UserError("unknown file type; use .jsonl, .jsonl.gz, .parquet or .txt", file=file)


def _read_text(file: Path, separator: str | None) -> list[Record]:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 (byte {error.start + 1}); save the file as UTF-8", file=file) from None
    documents = text.split(separator) if separator else [text]
    records = [{"text": document, "line": number} for number, document in enumerate(documents, 1) if document.strip()]
    if not records:
        raise UserError("is empty", file=file)
    return records


def _read_hub(entry: Entry, kind: str) -> Source:
    from datasets import load_dataset

    assert entry.hub is not None
    try:
        table = load_dataset(entry.hub, entry.subset, split=entry.split, revision=entry.revision)
    except (OSError, ValueError) as error:  # not found, offline, no such split: datasets raises these
        raise UserError(f"dataset {entry.hub!r} cannot be had from the Hub: {str(error).splitlines()[0]}") from error
    if entry.max_rows is not None:
        table = table.select(range(min(entry.max_rows, len(table))))
    records = _parse_rows(entry.hub, iter(table), _with_columns(PARSERS[kind], entry.columns), None)
    records = _strip_responses(records, entry, entry.hub)
    digest = hashlib.sha256()
    for row in table:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    name = entry.name or entry.hub.split("/")[-1]
    return Source(name, records, digest.hexdigest(), entry.weight, entry.hub, revision=entry.revision)


def _parse_rows(source: str, rows: Iterator[dict[str, Any]], parse: Any, max_rows: int | None) -> list[Record]:
    problems, records = Problems(source), []
    for number, row in enumerate(rows, 1):
        if max_rows is not None and number > max_rows:
            break
        try:
            records.append({**parse({k: v for k, v in row.items() if v is not None}), "line": number})
        except RecordError as error:
            problems.add(number, str(error))
    problems.refuse()
    if not records:
        raise UserError(f"{source} has no rows")
    return records


def _strip_responses(records: list[Record], entry: Entry, where: str) -> list[Record]:
    """Take `response_suffix` off the last answers: a published file's own end mark is text to us, and would be learnt.

    An answer that is nothing else is left out, counted and named.
    """
    suffix = entry.response_suffix
    if not suffix:
        return records
    found, empty, kept = 0, [], []
    for record in records:
        if "messages" in record and record["messages"][-1]["content"].endswith(suffix):
            message = record["messages"][-1]
            message["content"] = message["content"].removesuffix(suffix).rstrip()
            found += 1
            if not message["content"].strip():
                empty.append(record["line"])
                continue
        kept.append(record)
    if not found and any("messages" in record for record in records):
        raise UserError(f"response_suffix: no response ends in {suffix!r}; drop the key", file=where)
    logger.info("%s: response_suffix %r taken off %d of %d responses", where, suffix, found, len(records))
    if empty:
        lines = ", ".join(map(str, empty[:5])) + (", …" if len(empty) > 5 else "")
        logger.warning(
            "%s: %d responses are empty without their response_suffix and left out (lines %s)", where, len(empty), lines
        )
    return kept


def _with_columns(parse: Any, columns: dict[str, str] | None) -> Any:
    """`parse` after renaming the file's columns to ours (`columns`: ours → the file's)."""
    if not columns:
        return parse

    def renamed(row: dict[str, Any]) -> Record:
        for ours, theirs in columns.items():
            if theirs not in row:
                raise RecordError(
                    f"no column `{theirs}` (columns: {ours} ← {theirs}); columns are: {', '.join(sorted(row))}"
                )
        mapped = {ours: row[theirs] for ours, theirs in columns.items()}
        return parse({**{k: v for k, v in row.items() if k not in columns.values()}, **mapped})

    return renamed


def fingerprint(sources: Sequence[Source]) -> list[dict[str, Any]]:
    """What identifies the data of a run: content, order and weights."""
    return [{"sha256": s.sha256, "rows": len(s.records), "weight": s.weight} for s in sources]


def replace_records(source: Source, records: list[Record]) -> Source:
    return dataclasses.replace(source, records=records)

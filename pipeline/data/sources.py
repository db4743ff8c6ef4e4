"""From a recipe's `datasets:` to checked records, with what lineage needs to name them."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.data.cards import card_columns, split_files
from pipeline.data.entries import DatasetEntry
from pipeline.data.hashing import sha256_file
from pipeline.data.records import PARSERS, Problems, Record, RecordError, iter_jsonl
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

    def provenance(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "location": self.location,
            "revision": self.revision,
            "rows": len(self.records),
            "sha256": self.sha256,
        }


def read_sources(entries: Sequence[DatasetEntry], kind: str, data_root: str, spool: bool = False) -> list[Source]:
    """Read and check all entries as records of `kind` (a key of `records.PARSERS`).

    With `spool` the records wait on disk (see `spool.spooled`), so that a file may be larger than memory.
    """
    return [read_source(entry, kind, Path(data_root), spool) for entry in entries]


def read_source(entry: DatasetEntry, kind: str, data_root: Path, spool: bool = False) -> Source:
    if (entry.path is None) == (entry.hub is None):
        raise UserError("datasets: each entry names exactly one of `path:` and `hub:`")
    if entry.hub is not None:
        return _read_hub(entry, kind, spool)
    assert entry.path is not None
    path = data_root / entry.path
    if not path.exists():
        raise UserError(f"dataset {str(path)!r} does not exist; correct `path:` or say --data-root")
    files = files_of(entry, path)
    columns = entry.columns or (card_columns(path) if path.is_dir() else None)
    name = entry.name or path.name.split(".")[0]
    stream = (record for file in files for record in iter_file(file, kind, columns, entry))
    records = _gather(itertools.islice(_strip_responses(stream, entry, str(path)), entry.max_rows), spool)
    single = len(records) == 1 and all(file.suffix == ".txt" for file in files)
    return Source(name, records, digest_of(files), entry.weight, entry.path, single_document=single)


def files_of(entry: DatasetEntry, path: Path) -> list[Path]:
    """The files of an entry's split: of a card's folder, or the one that it names."""
    return split_files(path, entry.split, entry.subset) if path.is_dir() else [path]


def digest_of(files: Sequence[Path]) -> str:
    """What a source's `sha256` is: of its files' own."""
    return hashlib.sha256("".join(map(sha256_file, files)).encode()).hexdigest()


def _gather(records: Iterator[Record], spool: bool) -> Sequence[Record]:
    if not spool:
        return list(records)
    from pipeline.data.arrow_storage import spooled

    return spooled(records)


def iter_file(
    file: Path, kind: str, columns: dict[str, str] | None = None, entry: DatasetEntry | None = None
) -> Iterator[Record]:
    """The records of one file, one at a time."""
    parse = renaming(PARSERS[kind], columns)
    max_rows = entry.max_rows if entry else None
    if file.suffix == ".txt":
        if kind != "document":
            raise UserError(f"a .txt file holds documents, this stage needs {kind}s as JSONL", file=file)
        return iter(_read_text(file, entry.document_separator if entry else None))
    if file.name.endswith((".jsonl", ".jsonl.gz", ".json")):
        return iter_jsonl(file, parse, max_rows)
    if file.suffix == ".parquet":
        return _parse_rows(str(file), _parquet_rows(file), parse, max_rows)
    raise UserError("unknown file type; use .jsonl, .jsonl.gz, .parquet or .txt", file=file)


def _parquet_rows(file: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(1024):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"is no readable parquet file: {error}", file=file) from error


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


def _read_hub(entry: DatasetEntry, kind: str, spool: bool) -> Source:
    from datasets import load_dataset

    assert entry.hub is not None
    try:
        table = load_dataset(entry.hub, entry.subset, split=entry.split, revision=entry.revision)
    except (OSError, ValueError) as error:  # not found, offline, no such split: datasets raises these
        raise UserError(f"dataset {entry.hub!r} cannot be had from the Hub: {str(error).splitlines()[0]}") from error
    if entry.max_rows is not None:
        table = table.select(range(min(entry.max_rows, len(table))))
    rows = _parse_rows(entry.hub, iter(table), renaming(PARSERS[kind], entry.columns), None)
    records = _gather(_strip_responses(rows, entry, entry.hub), spool)
    digest = hashlib.sha256()
    for row in table:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    name = entry.name or entry.hub.split("/")[-1]
    return Source(name, records, digest.hexdigest(), entry.weight, entry.hub, revision=entry.revision)


def _parse_rows(source: str, rows: Iterator[dict[str, Any]], parse: Any, max_rows: int | None) -> Iterator[Record]:
    problems, count = Problems(source), 0
    for number, row in enumerate(rows, 1):
        if max_rows is not None and number > max_rows:
            break
        try:
            record = {**parse({k: v for k, v in row.items() if v is not None}), "line": number}
        except RecordError as error:
            problems.add(number, str(error))
            continue
        count += 1
        yield record
    problems.refuse()
    if not count:
        raise UserError(f"{source} has no rows")


def _strip_responses(records: Iterator[Record], entry: DatasetEntry, where: str) -> Iterator[Record]:
    """Take `response_suffix` off the last answers: a published file's own end mark is text to us, and would be learnt.

    An answer that is nothing else is left out, counted and named.
    """
    suffix = entry.response_suffix
    if not suffix:
        yield from records
        return
    found = total = 0
    empty: list[int] = []
    for record in records:
        answers = _answers(record)
        total += len(answers)
        found += sum(text.endswith(suffix) for text in answers)
        stripped = [text.removesuffix(suffix).rstrip() if text.endswith(suffix) else text for text in answers]
        if "messages" in record:
            record["messages"][-1]["content"] = stripped[0]
            if not stripped[0].strip():
                empty.append(record["line"])
                continue
        elif "responses" in record:
            record["responses"] = stripped  # one that is empty now is a defect for `problems:`
        yield record
    if not found and total:
        raise UserError(f"response_suffix: no response ends in {suffix!r}; drop the key", file=where)
    logger.info("%s: response_suffix %r taken off %d of %d responses", where, suffix, found, total)
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


def renaming(parse: Any, columns: dict[str, str] | None) -> Any:
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


def replace_records(source: Source, records: Sequence[Record]) -> Source:
    return dataclasses.replace(source, records=records)


def split_texts(source: Source, fraction: float) -> tuple[list[str], list[str]]:
    """(train, held-out) texts: by hash of the document; of a single document, its last part, cut at a line's end."""
    if not source.single_document:
        kept, held_out = split_records(source.records, fraction)
        if not kept:
            raise UserError(f"{source.name}: no document is left to train on; lower held_out_fraction")
        return [r["text"] for r in kept], [r["text"] for r in held_out]
    text = source.records[0]["text"]
    cut = text.find("\n", math.floor(len(text) * (1 - SINGLE_DOCUMENT_HELD_OUT))) + 1
    return ([text[:cut]], [text[cut:]]) if 0 < cut < len(text) else ([text], [])

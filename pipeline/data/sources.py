"""From a recipe's `datasets:` to checked records, with what lineage needs to name them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.data.cache import DataCache
from pipeline.data.cards import card_columns, split_files
from pipeline.data.entries import DatasetEntry
from pipeline.data.files import FileRow, iter_rows, plain_row, read_text, text_blocks
from pipeline.data.hashing import sha256_file
from pipeline.data.mixing import all_weighted
from pipeline.data.records import PARSERS, Record, RowReader
from pipeline.data.stored_records import StoredFile, StoredRecords, store_file
from pipeline.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """One dataset, read: its canonical records and its provenance."""

    name: str
    records: StoredRecords
    sha256: str
    weight: float | None = None
    location: str = ""
    revision: str | None = None
    single_document: bool = False
    problems: str | None = None  # of its entry
    streamed: bool = False  # its records are the held-out ones alone

    def provenance(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "location": self.location,
            "revision": self.revision,
            "rows": len(self.records),
            "sha256": self.sha256,
        }


def read_sources(entries: Sequence[DatasetEntry], kind: str, data_root: str, cache: str | None = None) -> list[Source]:
    """Read and check all entries as records of `kind` (a key of `records.PARSERS`), through the data cache.

    Args:
        cache: folder of the data cache; default: see `cache.DataCache`.

    Raises:
        UserError: a file is broken; the records of those before it stay in the cache.
    """
    all_weighted([entry.weight for entry in entries])
    return [read_source(entry, kind, Path(data_root), cache) for entry in entries]


def read_source(entry: DatasetEntry, kind: str, data_root: Path, cache: str | None = None) -> Source:
    if (entry.path is None) == (entry.hub is None):
        raise UserError("datasets: each entry names exactly one of `path:` and `hub:`")
    if entry.streaming:
        raise UserError(
            f"dataset {entry.hub or entry.path!r}: `streaming: true` works for the `datasets:` of pretrain alone; drop it"
        )
    if entry.hub is not None:
        return _read_hub(entry, kind, DataCache(cache))
    assert entry.path is not None
    path = data_root / entry.path
    if not path.exists():
        raise UserError(f"dataset {str(path)!r} does not exist; correct `path:` or say --data-root")
    files = files_of(entry, path)
    columns = entry.columns or (card_columns(path) if path.is_dir() else None)
    own_split = entry.split if path.is_file() and entry.split != "train" else None
    hashes: list[str] = []
    stored = list(_read_files(files, FileReader(kind, columns, entry, own_split, DataCache(cache)), hashes))
    _check_suffix(stored, entry, str(path))
    records = StoredRecords(stored)
    return Source(
        name=entry.name or path.name.split(".")[0],
        records=records,
        sha256=_joined_digest(hashes + [sha256_file(file) for file in files[len(hashes) :]]),
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
    return _joined_digest([sha256_file(file) for file in files])


def _joined_digest(hashes: Sequence[str]) -> str:
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


@dataclass(frozen=True)
class FileReader:
    """How the files of an entry are read. own_split: only rows whose own `split` is this one."""

    kind: str
    columns: dict[str, str] | None
    entry: DatasetEntry
    own_split: str | None
    cache: DataCache

    def store(self, file: Path, sha256: str, max_rows: int | None) -> StoredFile:
        """The records of one file, at most `max_rows`, in the cache.

        Raises:
            UserError: the file is broken, or changed while it was read.
        """
        entry = self.entry
        identity = {
            "sha256": sha256,
            "suffix": "".join(file.suffixes[-2:]),
            "columns": self.columns,
            "own_split": self.own_split,
            "max_rows": max_rows,
            "problems": entry.problems,
            "response_suffix": entry.response_suffix,
            "document_separator": entry.document_separator,
        }

        def read(facts: dict[str, Any]) -> Iterator[Record]:
            yield from strip_responses(self._records(file, max_rows), entry.response_suffix, facts)
            if sha256_file(file) != sha256:
                raise UserError("changed while it was read; start again when nothing writes to it", file=file)

        return store_file(self.cache, str(file), identity, self.kind, read)

    def _records(self, file: Path, max_rows: int | None) -> Iterator[Record]:
        if self.own_split is None:
            return iter_file(file, self.kind, self.columns, dataclasses.replace(self.entry, max_rows=max_rows))
        unlimited = iter_file(file, self.kind, self.columns, dataclasses.replace(self.entry, max_rows=None))
        return _first(_of_split(unlimited, self.own_split, str(file)), max_rows)


def _first(records: Iterator[Record], number: int | None) -> Iterator[Record]:
    """The first records; the others are read and checked too."""
    for index, record in enumerate(records):
        if number is None or index < number:
            yield record


def _read_files(files: Sequence[Path], reader: FileReader, hashes: list[str]) -> Iterator[StoredFile]:
    """The stored records of an entry's files, at most `max_rows` in all; adds the hash of each file that was read."""
    left = reader.entry.max_rows
    for file in files:
        if left == 0:
            return
        if file.exists() and not file.is_file():
            raise UserError("is no regular file; name a file, or a folder with a dataset card", file=file)
        try:
            hashes.append(sha256_file(file))
        except OSError as error:
            raise UserError(f"cannot be read: {error}", file=file) from error
        stored = reader.store(file, hashes[-1], left)
        left = None if left is None else left - int(stored.entry.facts["rows"])
        yield stored


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
    documents = _split_blocks(text_blocks(file), separator) if separator else iter([read_text(file)])
    count = 0
    for number, document in enumerate(documents, 1):
        if document.strip() and (max_rows is None or count < max_rows):
            count += 1
            yield {"text": document, "file": str(file), "line": number}
    if not count:
        raise UserError("is empty", file=file)


def _split_blocks(blocks: Iterator[str], separator: str) -> Iterator[str]:
    """`str.split` of a text that comes in blocks."""
    rest = ""
    for block in blocks:
        *whole, rest = (rest + block).split(separator)
        yield from whole
    yield rest


def _read_hub(entry: DatasetEntry, kind: str, cache: DataCache) -> Source:
    from pipeline.data.hub import load_table

    assert entry.hub is not None
    table = load_table(entry)
    if entry.max_rows is not None:
        table = table.select(range(min(entry.max_rows, len(table))))
    digest = _hash_rows(entry, table, cache)

    def read(facts: dict[str, Any]) -> Iterator[Record]:
        reader = RowReader(str(entry.hub), PARSERS[kind], problems=entry.problems, name_unread=kind != "prompt")
        rows = (FileRow(number, plain_row(row)) for number, row in enumerate(table, 1))
        return strip_responses(reader.read(rows, entry.columns), entry.response_suffix, facts)

    identity = {
        "sha256": digest,
        "columns": entry.columns,
        "problems": entry.problems,
        "response_suffix": entry.response_suffix,
    }
    stored = store_file(cache, entry.hub, identity, kind, read)
    _check_suffix([stored], entry, entry.hub)
    return Source(
        name=entry.name or entry.hub.split("/")[-1],
        records=StoredRecords([stored]),
        sha256=digest,
        weight=entry.weight,
        location=entry.hub,
        revision=entry.revision,
        problems=entry.problems,
    )


def _hash_rows(entry: DatasetEntry, table: Any, cache: DataCache) -> str:
    """Hash of a table's rows; the data cache keeps it by the bytes of the files in which `datasets` has the table."""

    def build(_: Path) -> dict[str, Any]:
        digest = hashlib.sha256()
        for row in table:
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
        return {"sha256": digest.hexdigest()}

    files = [sha256_file(Path(file["filename"])) for file in table.cache_files]
    if not files:  # a table in memory
        return str(build(cache.root)["sha256"])
    identity = {"what": "hash of rows", "files": files, "split": entry.split, "max_rows": entry.max_rows}
    return str(cache.entry(f"hash of the rows of {entry.hub}", identity, build).facts["sha256"])


def strip_responses(records: Iterator[Record], suffix: str | None, facts: dict[str, Any]) -> Iterator[Record]:
    """Take `response_suffix` off the last answers: a published file's own end mark is text to us, and would be learnt.

    An answer that is nothing else is left out; `_check_suffix` says how many, of what is counted in `facts`.
    """
    if not suffix:
        yield from records
        return
    facts |= {"answers": 0, "stripped": 0, "empty": []}
    for record in records:
        answers = _answers(record)
        facts["answers"] += len(answers)
        facts["stripped"] += sum(text.endswith(suffix) for text in answers)
        stripped = [text.removesuffix(suffix).rstrip() if text.endswith(suffix) else text for text in answers]
        if "messages" in record:
            record["messages"][-1]["content"] = stripped[0]
            if not stripped[0].strip():
                facts["empty"].append(record["line"])
                continue
        elif "responses" in record:
            record["responses"] = stripped  # one that is empty now is a defect for `problems:`
        yield record


def _check_suffix(stored: Sequence[StoredFile], entry: DatasetEntry, where: str) -> None:
    """Say what `response_suffix` took off the answers of all files of an entry.

    Raises:
        UserError: no answer ends in it.
    """
    if not entry.response_suffix:
        return
    facts = [file.entry.facts for file in stored]
    answers, stripped = (sum(fact[name] for fact in facts) for name in ("answers", "stripped"))
    empty = [line for fact in facts for line in fact["empty"]]
    if not stripped and answers:
        raise UserError(f"response_suffix: no response ends in {entry.response_suffix!r}; drop the key", file=where)
    logger.info("%s: response_suffix %r taken off %d of %d responses", where, entry.response_suffix, stripped, answers)
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


def replace_records(source: Source, records: StoredRecords) -> Source:
    return dataclasses.replace(source, records=records)

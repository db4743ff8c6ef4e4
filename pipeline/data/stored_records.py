"""Checked records in the data cache: read one by one, or from start to end, with what splits need as columns."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.data.cache import DataCache, Entry
from pipeline.data.comparisons import RANKING_COLUMNS, ranking_columns
from pipeline.data.hashing import write_json
from pipeline.data.progress import DataProgress
from pipeline.data.records import Record
from pipeline.data.splits import HELD_OUT, prompt_hash, side_of
from pipeline.data.tables import IntegerRows, list_array, locate, map_table, numbers, read_batches, write_table

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

BATCH_CHARACTERS = 2**22
BATCH_ROWS = 4096
# hash: first 8 bytes of the SHA-256 of what decides the row's split; side: what its own `split` says (see `splits`).
COLUMNS = {"record": pa.large_string(), "hash": pa.uint64(), "side": pa.int8(), "bytes": pa.int64()}


@dataclass(frozen=True)
class StoredFile:
    """The records of one file. name: of the file, as errors name it; key: what identifies them and their order."""

    entry: Entry
    name: str

    @property
    def key(self) -> str:
        return self.entry.folder.name

    @functools.cached_property
    def table(self) -> pa.Table:
        return map_table(self.entry.folder)

    def record(self, text: str) -> Record:
        return _decode((self.name, text))


StoredText = tuple[str, str]  # name of the file, the record as JSON


def decode(batch: Iterable[StoredText]) -> list[Record]:
    """The records of a batch of `StoredRecords.in_batches`."""
    return [_decode(stored) for stored in batch]


def _decode(stored: StoredText) -> Record:
    record: Record = json.loads(stored[1])
    record["file"] = stored[0]
    return record


def store_file(
    cache: DataCache, name: str, identity: dict[str, Any], kind: str, read: Callable[[dict[str, Any]], Iterable[Record]]
) -> StoredFile:
    """The records of a file from the cache, or read into it.

    Args:
        identity: what decides the records, as plain data: the content, how it is read.
        read: gives the records; what it writes into its argument is kept beside them.
    """

    def build(folder: Path) -> dict[str, Any]:
        facts: dict[str, Any] = {}
        records = DataProgress(f"reading {Path(name).name}").each(read(facts))
        facts["rows"] = write_table(folder, _schema(kind), _batches(records, kind))
        return facts

    return StoredFile(cache.entry(f"{kind}s of {name}", {"kind": kind, **identity}, build, file=name), name)


def _schema(kind: str) -> pa.Schema:
    return pa.schema({**COLUMNS, **(RANKING_COLUMNS if kind == "ranking" else {})})


def _batches(records: Iterable[Record], kind: str) -> Iterator[pa.RecordBatch]:
    waiting: list[tuple[str, Record]] = []
    characters = 0
    for record in records:
        text = write_json({name: value for name, value in record.items() if name != "file"})
        waiting.append((text, record))
        characters += len(text)
        if characters >= BATCH_CHARACTERS or len(waiting) >= BATCH_ROWS:
            yield _batch(waiting, kind)
            waiting, characters = [], 0
    if waiting:
        yield _batch(waiting, kind)


def _batch(rows: Sequence[tuple[str, Record]], kind: str) -> pa.RecordBatch:
    records = [record for _, record in rows]
    columns: dict[str, Any] = {
        "record": [text for text, _ in rows],
        "hash": [prompt_hash(record) for record in records],
        "side": [side_of(record) for record in records],
        "bytes": [len(record["text"].encode()) if "text" in record else 0 for record in records],
    }
    if kind == "ranking":
        derived = [ranking_columns(record) for record in records]
        columns |= {name: [getattr(row, name) for row in derived] for name in RANKING_COLUMNS}
    schema = _schema(kind)
    arrays = [
        list_array(columns[field.name], field.type.value_type)
        if pa.types.is_large_list(field.type)
        else pa.array(columns[field.name], field.type)
        for field in schema
    ]
    return pa.record_batch(arrays, schema=schema)


class StoredRecords(Sequence[Record]):
    """The records of several files as one sequence, or some of them.

    Attributes:
        files: whose records these are.
        positions: of these records among those of the files; None where they are all of them.
    """

    def __init__(self, files: Sequence[StoredFile], positions: np.ndarray | None = None):
        self.files, self.positions = list(files), positions
        self._ends = np.cumsum([file.entry.facts["rows"] for file in self.files], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.positions) if self.positions is not None else int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.select(range(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        position = int(index if self.positions is None else self.positions[index])
        number, row = locate(self._ends, position)
        file = self.files[number]
        return file.record(file.table.column("record")[row].as_py())

    def __iter__(self) -> Iterator[Record]:
        return map(_decode, self._texts())

    def _texts(self) -> Iterator[StoredText]:
        if self.positions is not None and (np.diff(self.positions) <= 0).any():
            for position in self.positions.tolist():
                number, row = locate(self._ends, position)
                yield self.files[number].name, self.files[number].table.column("record")[row].as_py()
            return
        start = 0  # in the order of the files: read from start to end, so that no page of the map stays in memory
        for file in self.files:
            for batch in read_batches(file.entry.folder):
                texts, end = batch.column("record"), start + batch.num_rows
                if self.positions is not None:
                    first, last = np.searchsorted(self.positions, [start, end])
                    texts = texts.take(pa.array(self.positions[first:last] - start))
                start = end
                yield from zip(itertools.repeat(file.name), texts.to_pylist())

    def select(self, indices: Iterable[int] | np.ndarray) -> StoredRecords:
        chosen = np.fromiter(indices, np.int64) if not isinstance(indices, np.ndarray) else indices
        return StoredRecords(self.files, chosen if self.positions is None else self.positions[chosen])

    @property
    def keys(self) -> list[str]:
        """What identifies all records of the files and their order."""
        return [file.key for file in self.files]

    @property
    def tables(self) -> list[pa.Table]:
        return [file.table for file in self.files]

    def numbers(self, column: str, kind: type[np.generic]) -> np.ndarray:
        """A column of numbers, (records,)."""
        values = numbers(self.tables, column, kind)
        return values if self.positions is None else values[self.positions]

    def values(self, column: str) -> list[np.ndarray]:
        """The joined lists of a column of lists, by chunk. Of all records of the files."""
        assert self.positions is None
        return [chunk.values.to_numpy() for table in self.tables for chunk in table.column(column).chunks]

    def lengths(self, column: str) -> np.ndarray:
        assert self.positions is None
        return IntegerRows(self.tables, column).lengths

    def distinct(self, column: str) -> set[str]:
        """The different texts of a column that may hold none."""
        whole = pa.chunked_array([chunk for t in self.tables for chunk in t.column(column).chunks], pa.string())
        chosen = whole if self.positions is None else whole.take(pa.array(self.positions))
        return {name for name in chosen.unique().to_pylist() if name is not None}

    def is_in(self, column: str, names: Sequence[str]) -> np.ndarray:
        """(records,) bool: whether a column of text holds one of the names."""
        found = [pc.is_in(table.column(column), pa.array(names, pa.string())).to_numpy() for table in self.tables]
        values = np.concatenate([np.zeros(0, bool), *found]).astype(bool)
        return values if self.positions is None else values[self.positions]

    def held_out(self, fraction: float) -> np.ndarray:
        """(records,) bool: `splits.is_held_out` of each."""
        side = self.numbers("side", np.int8)
        by_hash = self.numbers("hash", np.uint64) < np.uint64(-int(-fraction * 2**64 // 1))
        return (side == HELD_OUT) | ((side < 0) & by_hash)

    def in_batches(self, rows: int = 256, characters: int = 2**21) -> Iterator[list[StoredText]]:
        """These records in order, in batches for several processes, where `decode` reads them."""
        batch: list[StoredText] = []
        size = 0
        for stored in self._texts():
            batch.append(stored)
            size += len(stored[1])
            if len(batch) >= rows or size >= characters:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

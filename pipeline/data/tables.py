"""Arrow tables on disk: written in batches, memory-mapped for single rows, read from start to end without a map."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

FILE = "rows.arrow"


def write_table(folder: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> int:
    """Write batches as `rows.arrow` in a folder, as they come; returns the rows."""
    rows = 0
    with (folder / FILE).open("wb") as file, pa.ipc.new_file(file, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
            rows += batch.num_rows
    return rows


def read_batches(folder: Path) -> Iterator[pa.RecordBatch]:
    """The batches of a table one after the other; none stays in memory."""
    with pa.OSFile(os.fspath(folder / FILE)) as file:
        reader = pa.ipc.open_file(file)
        for index in range(reader.num_record_batches):
            yield reader.get_batch(index)


def map_table(folder: Path) -> pa.Table:
    """A table whose rows lie in the file until they are asked for."""
    return pa.ipc.open_file(pa.memory_map(os.fspath(folder / FILE))).read_all()


def list_array(rows: Sequence[Sequence[int] | np.ndarray], kind: pa.DataType) -> pa.LargeListArray:
    """Rows of integers as one Arrow column."""
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    values = np.empty(offsets[-1], kind.to_pandas_dtype())
    for row, start, length in zip(rows, offsets, lengths, strict=False):
        values[start : start + length] = row
    return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(values, kind))


def shift_column(batch: pa.RecordBatch, name: str, by: int) -> pa.RecordBatch:
    """A batch with a number added to a column."""
    place = batch.schema.get_field_index(name)
    return batch.set_column(place, batch.schema.field(place), pc.add(batch.column(place), by))


def locate(ends: np.ndarray, index: int) -> tuple[int, int]:
    """(part, row in it) of a position among parts that stand one after the other.

    Args:
        ends: (parts,) rows up to the end of each part.
    """
    part = int(np.searchsorted(ends, index, "right"))
    return part, index - (int(ends[part - 1]) if part else 0)


class IntegerRows(Sequence[np.ndarray]):
    """Rows of integers of one column of several tables, each a view of its file.

    Attributes:
        lengths: of each row.
    """

    def __init__(self, tables: Sequence[pa.Table], column: str):
        chunks = [chunk for table in tables for chunk in table.column(column).chunks]
        self._offsets = [chunk.offsets.to_numpy() for chunk in chunks]
        self._values = [chunk.values.to_numpy() for chunk in chunks]
        self._ends = np.cumsum([len(offsets) - 1 for offsets in self._offsets], dtype=np.int64)
        self.lengths = np.concatenate([np.zeros(0, np.int64), *map(np.diff, self._offsets)]).astype(np.int32)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        chunk, row = locate(self._ends, index)
        offsets = self._offsets[chunk]
        return self._values[chunk][offsets[row] : offsets[row + 1]]


def numbers(tables: Sequence[pa.Table], column: str, kind: type[np.generic]) -> np.ndarray:
    """A column of numbers of several tables, in memory."""
    parts = [chunk.to_numpy(zero_copy_only=False) for table in tables for chunk in table.column(column).chunks]
    return np.concatenate([np.zeros(0, kind), *parts]).astype(kind, copy=False)

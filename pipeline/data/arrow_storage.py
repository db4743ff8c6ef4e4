"""Records that wait on disk: read once, checked, then served from a memory-mapped Arrow file."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from pipeline.data.records import Record

import datasets
from datasets.arrow_writer import ArrowWriter


def arrow_rows(rows: Iterable[dict[str, Any]], features: datasets.Features) -> datasets.Dataset:
    """Rows in a memory-mapped Arrow file under the temporary folder ($TMPDIR), which ends with the process."""
    folder = Path(tempfile.mkdtemp(prefix="rlhf-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = str(folder / "rows.arrow")
    writer = ArrowWriter(path=path, features=features)
    for row in rows:
        writer.write(row)
    writer.finalize()
    return datasets.Dataset.from_file(path)


class SpooledRecords(Sequence[Record]):
    """A sequence of records on disk; `select` gives a view of some of them."""

    def __init__(self, table: datasets.Dataset):
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> SpooledRecords: ...
    def __getitem__(self, index: int | slice) -> Record | SpooledRecords:
        if isinstance(index, slice):
            return self.select(range(*index.indices(len(self))))
        return json.loads(self._table[index]["record"])  # type: ignore[no-any-return]

    def __iter__(self) -> Iterator[Record]:
        for row in self._table:
            yield json.loads(row["record"])

    def select(self, indices: Iterable[int]) -> SpooledRecords:
        return SpooledRecords(self._table.select(indices, keep_in_memory=True))


def spooled(records: Iterable[Record]) -> SpooledRecords:
    """Write records to disk as they come."""
    features = datasets.Features({"record": datasets.Value("large_string")})
    return SpooledRecords(
        arrow_rows(({"record": json.dumps(record, ensure_ascii=False)} for record in records), features)
    )

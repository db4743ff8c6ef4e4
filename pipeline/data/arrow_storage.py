"""Arrow storage: rows are written to disk once and read from a memory-mapped file, so that they may be larger than memory."""

from __future__ import annotations

import errno
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from pipeline.data.records import Record
from pipeline.errors import UserError

import datasets
from datasets.arrow_writer import ArrowWriter

_OPEN_FILES: list[Any] = []  # files without a name live as long as they are open


def write_arrow(rows: Iterable[dict[str, Any]], features: datasets.Features) -> datasets.Dataset:
    """Rows in a memory-mapped Arrow file in the temporary folder ($TMPDIR).

    On Linux the file has no name, so that nothing is left behind however the process ends; elsewhere it loses its name
    when it is written.
    """
    file: Any = tempfile.TemporaryFile(prefix="rlhf-")  # noqa: SIM115 - open while it is mapped
    path = Path(f"/proc/self/fd/{file.fileno()}")
    if not path.exists():
        file = tempfile.NamedTemporaryFile(prefix="rlhf-", suffix=".arrow", delete=False)  # noqa: SIM115
        path = Path(file.name)
    _OPEN_FILES.append(file)
    try:
        writer = ArrowWriter(path=str(path), features=features)
        for row in rows:
            writer.write(row)
        writer.finalize()
        return datasets.Dataset.from_file(str(path))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise UserError(
            f"the temporary folder {tempfile.gettempdir()!r} is full; free some space or set TMPDIR to a larger disk"
        ) from error
    finally:
        if not path.is_relative_to("/proc"):
            path.unlink(missing_ok=True)


class StoredRecords(Sequence[Record]):
    """A sequence of records on disk; `select` gives a view of some of them."""

    def __init__(self, table: datasets.Dataset):
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> StoredRecords: ...
    def __getitem__(self, index: int | slice) -> Record | StoredRecords:
        if isinstance(index, slice):
            return self.select(range(*index.indices(len(self))))
        return json.loads(self._table[index]["record"])  # type: ignore[no-any-return]

    def __iter__(self) -> Iterator[Record]:
        for row in self._table:
            yield json.loads(row["record"])

    def select(self, indices: Iterable[int]) -> StoredRecords:
        return StoredRecords(self._table.select(indices, keep_in_memory=True))


def store_records(records: Iterable[Record]) -> StoredRecords:
    """Write records to disk as they come."""
    features = datasets.Features({"record": datasets.Value("large_string")})
    return StoredRecords(
        write_arrow(({"record": json.dumps(record, ensure_ascii=False)} for record in records), features)
    )

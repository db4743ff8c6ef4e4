"""Files of rows, whatever their format: numbered dicts, one at a time, and a reason for each row that is none.

JSON Lines (also gzipped), one JSON array, CSV and TSV, Parquet. All are read row by row but for a JSON array, which is read whole.
"""

from __future__ import annotations

import csv
import datetime
import decimal
import functools
import gzip
import io
import json
import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TextIO

from pipeline.errors import UserError, shorten

MAX_LINE_BYTES = 64 << 20
MAX_DEPTH = 64
BLOCK_CHARACTERS = 1 << 20
# Cells of these columns hold JSON in a CSV; those of the last two are numbers.
_CSV_JSON = ("messages", "conversations", "responses", "ranks")
_CSV_NUMBERS = ("confidence", "margin")
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", ".csv", ".csv.gz", ".tsv")


class RecordError(ValueError):
    """One row is wrong; the reader adds file and line."""


class UnusableRecord(RecordError):
    """A row that is well formed but holds nothing to learn from: left out and counted, unless `problems: error`."""


@dataclass(frozen=True)
class FileRow:
    """One row of a file: its columns, or what is wrong with it.

    `line` is where it begins; of a table or of an array on one line, its number, from 1.
    """

    line: int
    columns: dict[str, Any] | None
    error: str | None = None


def iter_rows(path: Path) -> Iterator[FileRow]:
    """The rows of one file.

    Raises:
        UserError: the file cannot be read as what its name says.
    """
    name = path.name.lower()
    if path.exists() and not path.is_file():
        raise UserError("is no regular file; name a file, or a folder with a dataset card", file=path)
    if name.endswith((".jsonl", ".jsonl.gz", ".json", ".json.gz")):
        return _json_array_rows(path) if _starts_with_bracket(path) else _json_lines(path)
    if name.endswith(".parquet"):
        return _parquet_rows(path)
    if name.endswith((".csv", ".csv.gz", ".tsv")):
        return _csv_rows(path, "\t" if name.endswith(".tsv") else ",")
    raise UserError("unknown file type; use .jsonl, .jsonl.gz, .json, .parquet, .csv or .txt", file=path)


def _open(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


_UNREADABLE = (OSError, EOFError, zlib.error)


def read_text(path: Path) -> str:
    """A whole UTF-8 file, without its byte-order mark; line ends stay as they are."""
    return "".join(text_blocks(path))


def text_blocks(path: Path) -> Iterator[str]:
    """`read_text` in blocks."""
    return _stream(path, lambda file: file.read(BLOCK_CHARACTERS))


def _stream(path: Path, read: Callable[[TextIO], str]) -> Iterator[str]:
    try:
        with io.TextIOWrapper(_open(path), encoding="utf-8-sig", newline="") as file:
            while text := read(file):
                if "\x00" in text:
                    raise UserError("holds a NUL byte; the file is damaged or UTF-16, save it as UTF-8", file=path)
                yield text
    except _UNREADABLE as error:
        raise UserError(f"cannot be read: {error}", file=path) from error
    except UnicodeDecodeError:
        _refuse_bytes(path)
        raise


def _refuse_bytes(path: Path) -> None:
    """Name the first byte of a file that is no UTF-8."""
    before = 0
    for number, raw in _lines(path):
        try:
            raw.decode()
        except UnicodeDecodeError as error:
            place = before + error.start + 1
            raise UserError(f"not UTF-8 (byte {place}); save the file as UTF-8", file=path, line=number) from None
        before += len(raw)


# ------------------------------------------------------------------------------------------------ JSON


def _json_lines(path: Path) -> Iterator[FileRow]:
    for number, raw in _lines(path):
        try:
            columns = _json_object(raw, first=number == 1)
        except RecordError as error:
            if number == 1 and path.suffix == ".json" and raw.lstrip(b"\xef\xbb\xbf \t").startswith(b"{"):
                error = RecordError(f"{error}; a .json file holds one JSON object a line, or one array of objects")
            yield FileRow(number, None, str(error))
            continue
        if columns is not None:
            yield FileRow(number, columns)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines; of one that is too long only the beginning, which is enough to refuse it."""
    try:
        with _open(path) as file:
            number = 0
            while raw := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                yield number, raw
                rest = raw
                while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
                    rest = file.readline(MAX_LINE_BYTES + 1)
    except _UNREADABLE as error:
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
        row = _decode(text, _DECODER.decode)
    except json.JSONDecodeError as error:
        raise RecordError(f"not valid JSON ({error.msg}, column {error.colno}): {shorten(text.strip())}") from None
    return check_object(row, text)


def _decode(text: str, decode: Callable[[str], Any]) -> Any:
    """JSON, with the ways in which Python's decoder gives up as RecordErrors."""
    try:
        return decode(text)
    except RecursionError:
        raise RecordError("nested too deeply to be a record") from None
    except json.JSONDecodeError:
        raise
    except ValueError as error:  # Python refuses to read integers of more than 4,300 digits
        if isinstance(error, RecordError):
            raise
        raise RecordError("holds a number of thousands of digits; write it as text, or leave it out") from None


def check_object(row: Any, text: str) -> dict[str, Any]:
    """A decoded value, if it is an object that can be a record; `text` is its JSON."""
    if text.count("[") + text.count("{") > MAX_DEPTH and _depth(row) > MAX_DEPTH:
        raise RecordError("nested too deeply to be a record")
    if "\\ud" in text.lower():  # an escape may be half a pair, which no file can hold as UTF-8
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise RecordError("holds half of a surrogate pair (\\ud8xx alone); write the character itself") from None
    if not isinstance(row, dict):
        raise RecordError(f"expected a JSON object, got {shorten(row)}")
    return row


def _depth(value: Any) -> int:
    """How deep lists and objects stand in each other, level by level: recursion would end where the nesting does harm."""
    level, depth = [value], 0
    while level := [v for v in level if isinstance(v, list | dict)]:
        depth += 1
        level = [inner for v in level for inner in (v.values() if isinstance(v, dict) else v)]
    return depth


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise RecordError(f"key {shorten(_repeated(name for name, _ in pairs))} stands twice; keep one")
    return row


def _repeated(names: Iterable[str]) -> str | None:
    """The first name that stands twice, if one does."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _no_constant(name: str) -> NoReturn:
    raise RecordError(f"{name} is no JSON number; leave the key out instead")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


def _starts_with_bracket(path: Path) -> bool:
    """Whether a file's first line that is not blank begins a JSON array."""
    for _, raw in _lines(path):
        text = raw.removeprefix(b"\xef\xbb\xbf").strip()
        if text:
            return text.startswith(b"[")
    return False


def _json_array_rows(path: Path) -> Iterator[FileRow]:
    text = read_text(path)
    items = list(_array_items(path, text))
    starts = [start for start, _, _ in items]
    lines = _line_numbers(text, starts)
    own_lines = len(set(lines)) == len(lines)
    for number, (line, (start, end, item)) in enumerate(zip(lines, items, strict=True), 1):
        place = line if own_lines else number
        try:
            if isinstance(item, RecordError):
                raise item
            yield FileRow(place, check_object(item, text[start:end]))
        except RecordError as error:
            yield FileRow(place, None, f"item {number} of the array: {error}")


def _array_items(path: Path, text: str) -> Iterator[tuple[int, int, Any]]:
    """(start, end, value) of each item of the array that is the file's whole text."""
    position = _skip_space(text, text.index("[") + 1)
    number = 1
    while text[position : position + 1] != "]":
        try:
            value, end = _decode(text, functools.partial(_DECODER.raw_decode, idx=position))
            after = _skip_space(text, end)
            if text[after : after + 1] not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' delimiter", text, after)
        except RecordError as error:
            raise UserError(f"item {number} of the array: {error}", file=path, line=_line(text, position)) from None
        except json.JSONDecodeError as error:
            raise UserError(
                f"not valid JSON ({error.msg}, column {error.colno}) in item {number} of the array: "
                f"{shorten(text[position : position + 80])}",
                file=path,
                line=error.lineno,
            ) from None
        yield position, end, value
        number += 1
        position = _skip_space(text, after + 1) if text[after] == "," else after
    if rest := text[position + 1 :].strip():
        raise UserError(
            f"more text follows the JSON array: {shorten(rest[:80])}; a file holds one array, or one JSON object a line",
            file=path,
            line=_line(text, position),
        )


def _skip_space(text: str, position: int) -> int:
    while text[position : position + 1] in (" ", "\t", "\n", "\r"):
        position += 1
    return position


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def _line_numbers(text: str, starts: Iterable[int]) -> list[int]:
    lines, line, last = [], 1, 0
    for start in starts:
        line += text.count("\n", last, start)
        last = start
        lines.append(line)
    return lines


# ------------------------------------------------------------------------------------------------ tables


def _csv_rows(path: Path, separator: str) -> Iterator[FileRow]:
    csv.field_size_limit(MAX_LINE_BYTES)
    reader = csv.reader(_stream(path, lambda file: file.readline()), delimiter=separator, strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for cells in reader:
            if header is None and cells:
                header = _csv_header(cells, path)
            elif header is not None and cells:
                yield _csv_row(header, cells, line)
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"not valid CSV ({error})", file=path, line=line) from error


def _csv_header(cells: list[str], path: Path) -> list[str]:
    names = [name.strip() for name in cells]
    if (twice := _repeated(names)) is not None:
        raise UserError(f"column {twice!r} stands twice in the header; keep one", file=path, line=1)
    if len(names) == 1 and ";" in names[0]:
        raise UserError("columns are separated by `;`; separate them by commas", file=path, line=1)
    return names


def _csv_row(header: list[str], cells: list[str], line: int) -> FileRow:
    if len(cells) != len(header):
        return FileRow(line, None, f"{len(cells)} cells, but the header names {len(header)} columns")
    try:
        return FileRow(line, {name: _cell(name, cell) for name, cell in zip(header, cells, strict=True) if cell})
    except RecordError as error:
        return FileRow(line, None, str(error))


def _cell(name: str, cell: str) -> Any:
    if name in _CSV_NUMBERS:
        try:
            return float(cell)
        except ValueError:
            return cell
    if name in _CSV_JSON and cell.lstrip().startswith("["):
        try:
            return _decode(cell, _DECODER.decode)
        except json.JSONDecodeError as error:
            raise RecordError(f"column `{name}` of a CSV must hold JSON ({error.msg}): {shorten(cell)}") from None
    return cell


def _parquet_rows(path: Path) -> Iterator[FileRow]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        file = pyarrow.parquet.ParquetFile(path)
        if (twice := _repeated(file.schema_arrow.names)) is not None:
            raise UserError(f"column {shorten(twice)} stands twice; keep one", file=path)
        for batch in file.iter_batches(1024):
            for row in batch.to_pylist():
                number += 1
                yield FileRow(number, plain_row(row))
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, ValueError, OverflowError) as error:
        raise UserError(f"is no readable parquet file: {error}", file=path) from error


def plain_row(row: dict[str, Any]) -> dict[str, Any]:
    """A table's row as JSON could hold it, without its nulls: times as ISO text, decimals as numbers, NaN as null.

    Bytes are text where they are UTF-8, as several programs write it; others are no text, which a stage would train on.
    """
    return {name: plain for name, value in row.items() if (plain := _plain(value)) is not None}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float | decimal.Decimal):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return {"bytes": len(value)}
    return {"type": type(value).__name__}

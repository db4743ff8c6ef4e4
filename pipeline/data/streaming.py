"""A Hub dataset that is read while it is trained on: blocks of its documents, in an order that can be resumed at any block.

Documents are read in windows. Those of a window are tokenised together, packed behind what the window before left
over, and its whole blocks are shuffled among themselves. So the state before a window, and a number of its blocks, say exactly where a
stream stands: unlike a shuffle buffer of `datasets`, which loses its rows at a resume.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pipeline.algorithms.seeds import STRIDE
from pipeline.data.batching import seeded_order
from pipeline.data.cache import DataCache
from pipeline.data.encoding import document_ids
from pipeline.data.entries import DatasetEntry
from pipeline.data.files import FileRow, plain_row
from pipeline.data.hashing import sha256_json
from pipeline.data.hub import HUB_ERRORS, dataset_builder, one_line, remedy_of, unavailable
from pipeline.data.packing import Block, PackedDocuments, pack_documents
from pipeline.data.parallel import map_batches
from pipeline.data.records import PARSERS, Record, RowReader
from pipeline.data.sources import Source
from pipeline.data.splits import is_held_out
from pipeline.data.stored_records import StoredRecords, store_file
from pipeline.errors import UserError

import numpy as np
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
WINDOW_CHARACTERS = 2**21  # of the documents that are packed and shuffled together


@dataclass(frozen=True)
class ReadPosition:
    """Where a reader stands.

    row: rows read of this pass over the dataset; passes: those before it; rows, left_out: read and left out in all passes; state: that
    of `datasets`, None at a pass's beginning.
    """

    row: int = 0
    passes: int = 0
    rows: int = 0
    left_out: int = 0
    state: dict[str, Any] | None = None


@dataclass(frozen=True)
class Window:
    """Documents that are packed together, as texts, and the positions before and after them."""

    begin: ReadPosition
    end: ReadPosition
    texts: list[str]


class HubStream:
    """The documents of a Hub dataset at one commit, read row by row.

    Args:
        held_out_fraction: share of the documents that is not trained on, by hash (see `splits`).
        revision: in place of the entry's: the commit at which an earlier start of the run has pinned it.

    Attributes:
        revision: the commit; None of a folder.
        sha256: of what identifies the rows: dataset and commit, or a folder's files with their sizes and times.
    """

    def __init__(self, entry: DatasetEntry, held_out_fraction: float, revision: str | None = None):
        self.entry, self.held_out_fraction = entry, held_out_fraction
        hub = str(entry.hub)
        builder = dataset_builder(entry, revision or entry.revision)
        self.revision = None if os.path.isdir(hub) else builder.hash
        try:
            self._stream = builder.as_streaming_dataset(split=entry.split)
        except HUB_ERRORS as error:
            raise unavailable(entry, error) from error
        self._start = self._stream.state_dict()
        content = self.revision or [_file_facts(hub, file) for file in builder.config.data_files[entry.split]]
        self.sha256 = sha256_json([self.revision and hub, content, entry.subset, entry.split])
        self.name = entry.name or hub.rstrip("/").split("/")[-1]
        self.source = f"{hub} ({entry.split})"  # in errors, before the row's number

    def held_out(self, documents: int, cache: str | None) -> Source:
        """The first documents that are held out, through the data cache.

        Raises:
            UserError: there is none among twice as many rows as should hold them.
        """
        fraction, entry = self.held_out_fraction, self.entry
        rows = math.ceil(2 * documents / fraction)

        def read(_: dict[str, Any]) -> Iterator[Record]:
            numbered = (FileRow(number, row) for number, row in enumerate(self._rows(0, None), 1))
            records = self._reader().read(itertools.islice(numbered, rows), entry.columns)
            return itertools.islice((record for record in records if is_held_out(record, fraction)), documents)

        identity = {
            "sha256": self.sha256,
            "columns": entry.columns,
            "max_rows": entry.max_rows,
            "problems": entry.problems,
            "held_out": [documents, fraction],
        }
        stored = store_file(DataCache(cache), self.source, identity, "document", read)
        records = StoredRecords([stored])
        if not len(records):
            raise UserError(f"{self.source}: no document was held out; raise held_out_fraction")
        return Source(self.name, records, self.sha256, location=str(entry.hub), revision=self.revision, streamed=True)

    def windows(self, at: ReadPosition) -> Iterator[Window]:
        """The training documents from a position on, pass after pass without an end.

        Raises:
            UserError: the dataset cannot be read, a row is wrong, or no document is left to train on.
        """
        while True:
            trained = at.row > 0  # an earlier start has trained on the first rows of this pass
            for window in self._windows_of_pass(at):
                at, trained = window.end, trained or bool(window.texts)
                yield window
            if not trained:
                raise UserError(f"{self.source}: no document is left to train on; lower held_out_fraction")
            if not at.passes:
                logger.info("%s: ends after %d rows and is read again from its start", self.source, at.row)
            at = dataclasses.replace(at, row=0, passes=at.passes + 1, state=None)

    def _windows_of_pass(self, begin: ReadPosition) -> Iterator[Window]:
        reader = self._reader()
        reader.rows, row, size = begin.row, begin.row, 0
        texts: list[str] = []

        def end() -> ReadPosition:
            if not (begin.passes or begin.row) or (reader.dropped and not begin.left_out):
                reader.say_what_was_left()  # once; later rows are counted
            rows, left_out = begin.rows + row - begin.row, begin.left_out + len(reader.dropped)
            reader.dropped.clear()
            return ReadPosition(row, begin.passes, rows, left_out, self._stream.state_dict())

        for columns in self._rows(begin.row, begin.state):
            row += 1
            for record in reader.records_of(FileRow(row, columns), self.entry.columns):
                if not is_held_out(record, self.held_out_fraction):
                    texts.append(record["text"])
                    size += len(record["text"])
            reader.rows = row
            reader.refused.refuse()
            if size >= WINDOW_CHARACTERS:
                yield (window := Window(begin, end(), texts))
                begin, texts, size = window.end, [], 0
        if row > begin.row:
            yield Window(begin, end(), texts)

    def _reader(self) -> RowReader:
        return RowReader(self.source, PARSERS["document"], problems=self.entry.problems)

    def _rows(self, row: int, state: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
        """The rows behind a position, without their nulls."""
        self._stream.load_state_dict(state or self._start)
        rows = iter(self._stream)
        for number in itertools.count(row + 1):
            if self.entry.max_rows is not None and number > self.entry.max_rows:
                return
            try:
                columns = next(rows)
            except StopIteration:
                return
            except HUB_ERRORS as error:
                remedy = remedy_of(error) or "start the same command again to go on from the last checkpoint"
                raise UserError(
                    f"cannot be read: {one_line(error)}; {remedy}", file=self.source, line=number
                ) from error
            yield plain_row(columns)


def _file_facts(folder: str, file: str) -> list[Any]:
    """What identifies a file of a folder without reading it."""
    facts = os.stat(file) if os.path.exists(file) else None
    return [os.path.relpath(file, folder), facts and [facts.st_size, facts.st_mtime_ns]]


# ---------------------------------------------------------------------------------------------- blocks


@dataclass(frozen=True)
class BlockPosition:
    """Where blocks stand before a window: `blocks` with `tokens` in all went before it, `rest` are the pieces left over."""

    read: ReadPosition = field(default_factory=ReadPosition)
    blocks: int = 0
    tokens: int = 0
    rest: list[list[int]] = field(default_factory=list)


@dataclass(frozen=True)
class Seen:
    """What went into a number of blocks: rows of the windows that hold them, those left out, passes, tokens."""

    rows: int = 0
    left_out: int = 0
    passes: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class _Packed:
    """A window's whole blocks in their shuffled order, and the positions before and after them."""

    begin: BlockPosition
    end: BlockPosition
    blocks: PackedDocuments
    order: list[int]

    def seen(self, blocks: int) -> Seen:
        read, lengths = self.end.read, self.blocks.lengths()[self.order[: blocks - self.begin.blocks]]
        return Seen(read.rows, read.left_out, read.passes, self.begin.tokens + int(lengths.sum()))


class StreamedBlocks(IterableDataset):  # type: ignore[type-arg]
    """Blocks of `block_tokens` (the last of a document that is not isolated may be shorter), as `pack_documents` packs them.

    Args:
        isolated: as in `pack_documents`.
        ahead: blocks that the trainer may have asked for beyond the last that it has trained on.

    Attributes:
        error: a UserError that ended the stream; from then on its last block is repeated, because other processes wait for
            blocks: whoever trains looks here before a step.
    """

    def __init__(
        self,
        stream: HubStream,
        tokenizer: PreTrainedTokenizerBase,
        block_tokens: int,
        *,
        isolated: bool,
        seed: int,
        ahead: int,
    ):
        self.stream, self.tokenizer, self.block_tokens = stream, tokenizer, block_tokens
        self.isolated, self.seed, self.ahead = isolated, seed, ahead
        self.error: UserError | None = None
        self._begin, self._first, self._seen = BlockPosition(), 0, Seen()
        self._recent: deque[_Packed] = deque()
        self._running: Iterator[Block] | None = None

    def position(self, blocks: int) -> dict[str, Any]:
        """Where the stream stands after `blocks` blocks, as plain data."""
        if blocks == self._first:
            return {"begin": dataclasses.asdict(self._begin), "blocks": blocks, "seen": dataclasses.asdict(self._seen)}
        packed = next(packed for packed in reversed(self._recent) if packed.begin.blocks < blocks)
        begin, seen = dataclasses.asdict(packed.begin), dataclasses.asdict(packed.seen(blocks))
        return {"begin": begin, "blocks": blocks, "seen": seen}

    def seen(self, blocks: int) -> Seen:
        """What went into the first `blocks` blocks."""
        return Seen(**self.position(blocks)["seen"])

    def go_to(self, position: dict[str, Any]) -> None:
        """Begin at a `position`."""
        begin = position["begin"]
        self._begin = BlockPosition(**{**begin, "read": ReadPosition(**begin["read"])})
        self._first, self._seen = position["blocks"], Seen(**position["seen"])

    def close(self) -> None:
        """End what reads and tokenises ahead."""
        if self._running is not None:
            self._running.close()  # type: ignore[attr-defined]

    def __iter__(self) -> Iterator[Block]:
        self._running = self._until_error()
        return self._running

    def _until_error(self) -> Iterator[Block]:
        block: Block = {name: np.zeros(2, np.int64) for name in ("input_ids", "position_ids", "labels")}
        try:
            for packed in self._packed():
                self._recent.append(packed)
                for number, index in enumerate(packed.order, packed.begin.blocks):
                    if number < self._first:
                        continue
                    while self._recent[0].end.blocks <= number - self.ahead:
                        self._recent.popleft()
                    block = packed.blocks[index]
                    yield block
        except UserError as error:
            self.error = error
        while True:
            yield block

    def _packed(self) -> Iterator[_Packed]:
        begin = self._begin
        for window, documents in map_batches(self._encode, self.stream.windows(begin.read)):
            begin = dataclasses.replace(begin, read=window.begin)
            rest = [np.array(ids, np.int64) for ids in begin.rest]
            packed = pack_documents([*rest, *documents], self.block_tokens, isolated=self.isolated)
            whole = len(packed) - 1  # the last one takes more of the next window's
            order = seeded_order(self.seed * STRIDE + begin.blocks, max(whole, 0))
            lengths = packed.lengths()
            end = BlockPosition(
                read=window.end,
                blocks=begin.blocks + len(order),
                tokens=begin.tokens + int(lengths[: len(order)].sum()),
                rest=_pieces(packed, whole) if whole >= 0 else [],
            )
            yield _Packed(begin, end, packed, order)
            begin = end

    def _encode(self, window: Window) -> tuple[Window, list[np.ndarray]]:
        """Token ids of a window's documents; its texts are not needed any more."""
        ids = document_ids(self.tokenizer, window.texts) if window.texts else []
        return dataclasses.replace(window, texts=[]), [np.array(row, np.int32) for row in ids]


def _pieces(packed: PackedDocuments, block: int) -> list[list[int]]:
    """Token ids of the pieces of a block; packed again as documents, they give the same block."""
    pieces = range(int(packed.first[block]), int(packed.first[block + 1]))
    where = [(int(packed.document[i]), int(packed.start[i]), int(packed.length[i])) for i in pieces]
    return [[int(i) for i in packed.documents[document][start : start + length]] for document, start, length in where]

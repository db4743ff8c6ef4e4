"""Documents and examples into full rows, kept apart by position ids that restart at 0: tables of what stands where.

With `use_cache=False` and no attention mask, transformers isolates such documents exactly (tested: packed logits equal
separate ones). A document that does not fit goes on in the next block, which repeats its last token as context, so
that every token is predicted exactly once. Tokens are not copied: a row is put together when it is asked for.
"""

from __future__ import annotations

import bisect
import itertools
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.data.encoding import IGNORE
from pipeline.data.progress import DataProgress
from pipeline.data.tables import locate

import datasets
import numpy as np

Block = dict[str, Any]  # input_ids, position_ids, labels: of one length
Tokens = Sequence[int] | np.ndarray


class PackedRows(Sequence[Block]):
    """Rows of entries of a table, each put together when it is asked for.

    Attributes:
        first: (rows + 1,) where each row begins in the table.
    """

    first: np.ndarray

    def row(self, begin: int, end: int) -> Block:
        """The row of the entries from `begin` to `end`."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.first) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        return self.row(int(self.first[index]), int(self.first[index + 1]))


@dataclass(frozen=True)
class PackedDocuments(PackedRows):
    """Blocks of pieces of documents.

    Args:
        documents: token ids.
        document, start, length: (pieces,) of which document each piece is, and which of its tokens.
        first: (blocks + 1,) the first piece of each block.
    """

    documents: Sequence[Tokens]
    document: np.ndarray
    start: np.ndarray
    length: np.ndarray
    first: np.ndarray

    def row(self, begin: int, end: int) -> Block:
        pieces = []
        for piece in range(begin, end):
            start = int(self.start[piece])
            ids = self.documents[int(self.document[piece])][start : start + int(self.length[piece])]
            pieces.append(np.asarray(ids, np.int64))
        labels = [label for ids in pieces for label in (np.array([IGNORE]), ids[1:])]
        return {
            "input_ids": np.concatenate(pieces),
            "position_ids": np.concatenate([np.arange(len(ids)) for ids in pieces]),
            "labels": np.concatenate(labels),
        }

    @property
    def tokens(self) -> int:
        return int(self.length.sum())

    def lengths(self) -> np.ndarray:
        """(blocks,) tokens of each."""
        sums = np.concatenate([[0], np.cumsum(self.length)])
        return np.diff(sums[self.first])


def pack_documents(
    documents: Sequence[Tokens],
    block_tokens: int,
    *,
    positions: np.ndarray | None = None,
    isolated: bool = True,
) -> PackedDocuments:
    """Pack documents into blocks of `block_tokens`; the last block may be shorter.

    A document's first token has label IGNORE, every other token stands once as a label.

    Args:
        positions: of the documents to pack, in their order; default: all.
        isolated: whether the model keeps documents of one block apart; where not, each block holds one.
    """
    lengths = getattr(documents, "lengths", None)
    if lengths is None:
        lengths = np.array([len(ids) for ids in documents], np.int64)
    if positions is None:
        positions = np.arange(len(lengths))
    document, start, length, first = array("q"), array("q"), array("q"), array("q", [0])
    room = block_tokens
    progress = DataProgress("packing documents", total=len(positions), unit="document")
    for position, tokens in progress.each(zip(positions.tolist(), lengths[positions].tolist(), strict=True)):
        done = 0
        while done < tokens - 1:
            if room < 2:  # a lone token would neither be predicted nor predict
                first.append(len(document))
                room = block_tokens
            size = min(room, tokens - done)
            document.append(position)
            start.append(done)
            length.append(size)
            room -= size
            done += size - 1
        if not isolated and room < block_tokens:
            first.append(len(document))
            room = block_tokens
    if first[-1] < len(document):
        first.append(len(document))
    return PackedDocuments(documents, *(np.array(column, np.int64) for column in (document, start, length, first)))


# ---------------------------------------------------------------------------------------------- examples


@dataclass(frozen=True)
class PackedExamples(PackedRows):
    """Rows of whole examples.

    Args:
        examples: (ids, labels) each.
        order: positions of the examples, row after row.
        first: (rows + 1,) where each row begins in `order`.
    """

    examples: Sequence[tuple[list[int], list[int]]]
    order: np.ndarray
    first: np.ndarray

    def row(self, begin: int, end: int) -> Block:
        return join_examples([self.examples[i] for i in self.order[begin:end].tolist()])


def best_fit(lengths: np.ndarray, row_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Whole examples into rows of at most `row_tokens`, best fit decreasing.

    trl.pack_dataset("bfd") packs each thousand examples apart, cuts longer ones without a word and gives no position ids.

    Returns:
        order, first: as in `PackedExamples`.

    Raises:
        ValueError: an example is longer than a row.
    """
    row_of = np.empty(len(lengths), np.int64)
    rooms: list[int] = []  # of the rows that are open, each once, sorted
    by_room: dict[int, deque[int]] = {}
    rows = 0
    order = np.lexsort((np.arange(len(lengths)), -lengths.astype(np.int64)))
    progress = DataProgress("packing examples", total=len(lengths), unit="example")
    for index, length in progress.each(zip(order.tolist(), lengths[order].tolist(), strict=True)):
        if length > row_tokens:
            raise ValueError(f"example {index} has {length} tokens, a row holds {row_tokens}")
        place = bisect.bisect_left(rooms, length)
        if place == len(rooms):
            row, room = rows, row_tokens
            rows += 1
        else:
            room = rooms[place]
            row = by_room[room].popleft()
            if not by_room[room]:
                del by_room[room], rooms[place]
        row_of[index] = row
        if room - length not in by_room:
            by_room[room - length] = deque()
            bisect.insort(rooms, room - length)
        by_room[room - length].append(row)
    return order[np.argsort(row_of[order], kind="stable")], np.searchsorted(np.sort(row_of), np.arange(rows + 1))


def pack_examples(
    examples: Sequence[tuple[list[int], list[int]]], row_tokens: int, lengths: np.ndarray | None = None
) -> PackedExamples:
    """`best_fit` of examples (ids, labels); none is cut.

    Raises:
        ValueError: an example is longer than a row.
    """
    if lengths is None:
        lengths = np.array([len(ids) for ids, _ in examples], np.int64)
    return PackedExamples(examples, *best_fit(lengths, row_tokens))


def one_per_row(examples: Sequence[tuple[list[int], list[int]]]) -> PackedExamples:
    return PackedExamples(examples, np.arange(len(examples)), np.arange(len(examples) + 1))


def join_examples(examples: list[tuple[list[int], list[int]]]) -> Block:
    """Examples side by side in one row; the first token of each is no label of the one before."""
    block: Block = {"input_ids": [], "position_ids": [], "labels": []}
    for ids, labels in examples:
        block["input_ids"] += ids
        block["position_ids"] += range(len(ids))
        block["labels"] += [IGNORE, *labels[1:]]
    return block


# ---------------------------------------------------------------------------------------------- as a dataset


class Chosen(Sequence[Any]):
    """Some rows of a sequence, in an order of their own: one epoch of a mixture, say."""

    def __init__(self, rows: Sequence[Any], positions: np.ndarray):
        self.rows, self.positions = rows, positions

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Chosen(self.rows, self.positions[index])
        return self.rows[int(self.positions[index])]


class Joined(Sequence[Any]):
    """Several sequences one after the other."""

    def __init__(self, parts: Sequence[Sequence[Any]]):
        self.parts = parts
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __iter__(self) -> Iterator[Any]:
        return itertools.chain.from_iterable(self.parts)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        number, row = locate(self._ends, index)
        return self.parts[number][row]


class _Rows:
    """The transform of `lazy_dataset`. Its state is not pickled, since `datasets` hashes transforms by their pickles."""

    def __init__(self, rows: Sequence[dict[str, Any]]):
        self.rows = rows

    def __call__(self, batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        rows = [self.rows[i] for i in batch["row"]]
        return {name: [row[name] for row in rows] for name in rows[0]} if rows else {}

    def __getstate__(self) -> dict[str, Any]:
        return {"rows": len(self.rows)}


def lazy_dataset(rows: Sequence[dict[str, Any]]) -> datasets.Dataset:
    """Rows as a `datasets.Dataset`, the only kind that TRL's trainers take, put together when they are asked for."""
    table = datasets.Dataset.from_dict({"row": np.arange(len(rows))})
    return table.with_transform(_Rows(rows))

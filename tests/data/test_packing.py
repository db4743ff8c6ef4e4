"""Tables of what stands where give the rows that copies of the tokens would give."""

from __future__ import annotations

import re
from typing import Any

from pipeline.data.encoding import IGNORE
from pipeline.data.packing import Chosen, Joined, join_examples, lazy_dataset, pack_documents, pack_examples
from pipeline.data.progress import DataProgress

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

Block = dict[str, list[int]]


def copied_documents(documents: list[list[int]], block_tokens: int) -> list[Block]:
    """Blocks by copying tokens, piece by piece."""
    blocks: list[Block] = []
    block: Block = {"input_ids": [], "position_ids": [], "labels": []}
    for ids in documents:
        start = 0
        while start < len(ids) - 1:
            room = block_tokens - len(block["input_ids"])
            if room < 2:
                blocks.append(block)
                block = {"input_ids": [], "position_ids": [], "labels": []}
                room = block_tokens
            piece = ids[start : start + room]
            block["input_ids"] += piece
            block["position_ids"] += range(len(piece))
            block["labels"] += [IGNORE, *piece[1:]]
            start += len(piece) - 1
    return [*blocks, block] if block["input_ids"] else blocks


def copied_examples(examples: list[tuple[list[int], list[int]]], row_tokens: int) -> list[Block]:
    """Best fit decreasing by looking at every open row."""
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}
    for index in sorted(range(len(examples)), key=lambda i: (-len(examples[i][0]), i)):
        length = len(examples[index][0])
        room = min((room for room, open_rows in by_room.items() if room >= length and open_rows), default=None)
        if room is None:
            rows.append([index])
            by_room.setdefault(row_tokens - length, []).append(len(rows) - 1)
        else:
            row = by_room[room].pop(0)
            rows[row].append(index)
            by_room.setdefault(room - length, []).append(row)
    return [join_examples([examples[i] for i in row]) for row in rows]


def plain(block: dict[str, Any]) -> Block:
    return {name: np.asarray(values).tolist() for name, values in block.items()}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=20), st.integers(2, 16), st.booleans())
def test_blocks_are_those_of_copied_documents(lengths: list[int], block: int, isolated: bool) -> None:
    documents = [[1000 * d + i for i in range(n)] for d, n in enumerate(lengths)]
    groups = [documents] if isolated else [[document] for document in documents]
    expected = [row for group in groups for row in copied_documents(group, block)]
    packed = pack_documents(documents, block, isolated=isolated)
    assert [plain(row) for row in packed] == expected
    assert packed.lengths().tolist() == [len(row["input_ids"]) for row in expected]
    assert packed.tokens == sum(len(row["input_ids"]) for row in expected)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 16), max_size=60))
def test_rows_are_those_of_copied_examples(lengths: list[int]) -> None:
    examples = [([100 * e + i for i in range(n)], [IGNORE] * (n - 1) + [7]) for e, n in enumerate(lengths)]
    assert [plain(row) for row in pack_examples(examples, 16)] == copied_examples(examples, 16)


def test_packing_chosen_documents_is_packing_them_alone() -> None:
    documents = [[10 * d + i for i in range(5)] for d in range(6)]
    chosen = np.array([4, 1, 5])
    packed = pack_documents(documents, 7, positions=chosen)
    assert [plain(row) for row in packed] == copied_documents([documents[i] for i in chosen], 7)


def test_a_lazy_dataset_gives_rows_in_the_order_of_the_epoch() -> None:
    parts = [pack_documents([[n, n + 1, n + 2]] * 4, 3) for n in (0, 100)]
    rows = lazy_dataset(Chosen(Joined(parts), np.array([7, 0, 7])))
    assert len(rows) == 3
    assert [row["input_ids"].tolist() for row in rows] == [[100, 101, 102], [0, 1, 2], [100, 101, 102]]
    assert [row["labels"].tolist() for row in rows.__getitems__([1, 2])] == [[IGNORE, 1, 2], [IGNORE, 101, 102]]


def test_progress_says_rows_speed_and_time_left() -> None:
    progress = DataProgress("encoding a.jsonl", total=1000)
    list(progress.each(range(250)))
    progress._started -= 5.0
    assert re.fullmatch(r"encoding a\.jsonl: 250/1,000 rows, \d+ rows/s, 1\d s left", progress.line())

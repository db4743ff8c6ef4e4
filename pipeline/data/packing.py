"""Documents into full blocks, kept apart by position ids that restart at 0.

With `use_cache=False` and no attention mask, transformers isolates such documents exactly (tested: packed logits equal
separate ones). A document that does not fit goes on in the next block, which repeats its last token as context, so
that every token is predicted exactly once.
"""

from __future__ import annotations

from collections.abc import Iterable

from pipeline.data.encoding import IGNORE

Block = dict[str, list[int]]


def pack_documents(documents: Iterable[list[int]], block_tokens: int) -> list[Block]:
    """Pack token lists into rows of `block_tokens`; the last row may be shorter.

    Returns:
        blocks: {"input_ids", "position_ids", "labels"}, each of at most `block_tokens`; a document's first token has
        label IGNORE, every other token stands once as a label.
    """
    blocks: list[Block] = []
    block: Block = {"input_ids": [], "position_ids": [], "labels": []}
    for ids in documents:
        start = 0
        while start < len(ids) - 1:
            room = block_tokens - len(block["input_ids"])
            if room < 2:  # a lone token would neither be predicted nor predict
                blocks.append(block)
                block = {"input_ids": [], "position_ids": [], "labels": []}
                room = block_tokens
            piece = ids[start : start + room]
            block["input_ids"] += piece
            block["position_ids"] += range(len(piece))
            block["labels"] += [IGNORE, *piece[1:]]
            start += len(piece) - 1
    if block["input_ids"]:
        blocks.append(block)
    return blocks


def pack_examples(examples: list[tuple[list[int], list[int]]], row_tokens: int) -> list[Block]:
    """Whole examples (ids, labels) into rows of at most `row_tokens`, best fit decreasing; none is cut.

    trl.pack_dataset("bfd") packs each thousand examples apart, cuts longer ones without a word and gives no position ids.

    Raises:
        ValueError: an example is longer than a row.
    """
    order = sorted(range(len(examples)), key=lambda i: (-len(examples[i][0]), i))
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # room left → rows with that room
    for index in order:
        length = len(examples[index][0])
        if length > row_tokens:
            raise ValueError(f"example {index} has {length} tokens, a row holds {row_tokens}")
        room = min((room for room, open_rows in by_room.items() if room >= length and open_rows), default=None)
        if room is None:
            rows.append([index])
            by_room.setdefault(row_tokens - length, []).append(len(rows) - 1)
        else:
            row = by_room[room].pop(0)
            rows[row].append(index)
            by_room.setdefault(room - length, []).append(row)
    return [join_examples([examples[i] for i in row]) for row in rows]


def join_examples(examples: list[tuple[list[int], list[int]]]) -> Block:
    """Examples side by side in one row; the first token of each is no label of the one before."""
    block: Block = {"input_ids": [], "position_ids": [], "labels": []}
    for ids, labels in examples:
        block["input_ids"] += ids
        block["position_ids"] += range(len(ids))
        block["labels"] += [IGNORE, *labels[1:]]
    return block

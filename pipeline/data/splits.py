"""Held-out splits: by the record's own `split`, else by a hash of its prompt, so that a prompt never sits on both sides."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from pipeline.data.files import RecordError
from pipeline.data.hashing import write_json
from pipeline.errors import UserError, shorten

if TYPE_CHECKING:
    from pipeline.data.records import Record

TRAINING_NAMES = ("train", "training")
TRAINING, HELD_OUT, BY_HASH = 0, 1, -1  # sides of a row, as stored beside it
HELD_OUT_NAMES = ("test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation", "held_out")


def split_side(name: str) -> Literal["training", "held out"]:
    """Which side a row's own `split` puts it on.

    Raises:
        RecordError: the name is of neither side.
    """
    plain = name.strip().lower().replace("-", "_")
    if plain in TRAINING_NAMES:
        return "training"
    if plain in HELD_OUT_NAMES:
        return "held out"
    raise RecordError(
        f"`split` {shorten(name)} is of neither side; write {' or '.join(TRAINING_NAMES)}, or one of {', '.join(HELD_OUT_NAMES)}"
    )


def split_key(record: Record) -> str:
    """The text whose hash decides: a prompt's messages, or a document's text."""
    if "text" in record:
        return str(record["text"])
    messages = record["prompt"] if "prompt" in record else record["messages"]
    # Up to the first answer: dialogues that begin alike stay together, however long they go on.
    first_answer = next((i for i, m in enumerate(messages) if m["role"] == "assistant"), len(messages))
    opening = messages[:first_answer] or messages
    return write_json([[m["role"], m["content"]] for m in opening])


def side_of(record: Record) -> int:
    """The side that the row's own `split` puts it on, or BY_HASH."""
    if "split" not in record:
        return BY_HASH
    return HELD_OUT if split_side(record["split"]) == "held out" else TRAINING


def prompt_hash(record: Record) -> int:
    """64 bits that decide on which side a row without a `split` is: held out below `fraction` × 2^64."""
    return int.from_bytes(hashlib.sha256(split_key(record).encode()).digest()[:8], "big")


def is_held_out(record: Record, fraction: float) -> bool:
    side = side_of(record)
    return side == HELD_OUT or (side == BY_HASH and prompt_hash(record) < fraction * 2**64)


def shuffle_by_hash(records: Iterable[Record]) -> list[Record]:
    """Records in the order of their prompts' hashes, so that the first few are drawn from all sources alike."""
    return sorted(records, key=lambda record: hashlib.sha256(split_key(record).encode()).digest())


def split_records(records: Iterable[Record], fraction: float) -> tuple[list[Record], list[Record]]:
    """(train, held out)."""
    train: list[Record] = []
    held_out: list[Record] = []
    for record in records:
        (held_out if is_held_out(record, fraction) else train).append(record)
    return train, held_out


def labeler_folds(labelers: Sequence[str], folds: int) -> list[list[str]]:
    """Labelers in groups of nearly equal size, by the hash of their names: the same whatever the order of the file."""
    if len(labelers) < folds:
        raise UserError(f"labeler_folds: {folds} groups of {len(labelers)} labelers; take fewer")
    mixed = sorted(labelers, key=lambda name: hashlib.sha256(name.encode()).digest())
    return [sorted(mixed[fold::folds]) for fold in range(folds)]

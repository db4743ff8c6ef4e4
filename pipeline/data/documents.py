"""The documents of a source: which are held out, their texts one by one, their token ids from the data cache."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.data.encoded import encode_documents
from pipeline.data.packing import PackedDocuments, pack_documents
from pipeline.data.sources import Source
from pipeline.data.stored_records import StoredRecords
from pipeline.data.tables import IntegerRows
from pipeline.errors import UserError

import numpy as np
from transformers import PreTrainedTokenizerBase

SINGLE_DOCUMENT_HELD_OUT = 0.05


@dataclass(frozen=True)
class Texts:
    """Some documents' texts, read one by one. part: of the single document that is cut in two, which of its parts."""

    records: StoredRecords
    part: int | None = None

    def __iter__(self) -> Iterator[str]:
        for record in self.records:
            yield from (
                [record["text"]] if self.part is None else cut_document(record["text"])[self.part : self.part + 1]
            )

    @property
    def bytes(self) -> int:
        """Length of all of them in UTF-8."""
        if self.part is not None:
            return sum(len(text.encode()) for text in self)
        return int(self.records.numbers("bytes", np.int64).sum())


def cut_document(text: str) -> list[str]:
    """A single document's training part and its last part, cut at a line's end; one part where it has no such line."""
    cut = text.find("\n", math.floor(len(text) * (1 - SINGLE_DOCUMENT_HELD_OUT))) + 1
    return [text[:cut], text[cut:]] if 0 < cut < len(text) else [text]


@dataclass(frozen=True)
class Documents:
    """One source's documents. training, held_out: positions among them (of a single document: among its two parts)."""

    source: Source
    training: np.ndarray
    held_out: np.ndarray

    def texts(self, positions: np.ndarray) -> Texts:
        if self.source.single_document:
            return Texts(
                self.source.records if len(positions) else self.source.records.select([]), int(positions.sum())
            )
        return Texts(self.source.records.select(positions))

    def encode(self, tokenizer: PreTrainedTokenizerBase) -> IntegerRows:
        """Token ids of all of them."""
        return encode_documents(self.source.records, tokenizer, cut_document if self.source.single_document else None)


def split_documents(source: Source, fraction: float) -> Documents:
    """By hash of the document; of a single document, its last part is held out; of a stream, whose rows are not here, all.

    Raises:
        UserError: no document is left to train on.
    """
    if source.single_document:
        parts = np.arange(len(cut_document(source.records[0]["text"])))
        return Documents(source, parts[:1], parts[1:])
    if source.streamed:
        return Documents(source, np.arange(0), np.arange(len(source.records)))
    held_out = source.records.held_out(fraction)
    if held_out.all():
        raise UserError(f"{source.name}: no document is left to train on; lower held_out_fraction")
    return Documents(source, np.flatnonzero(~held_out), np.flatnonzero(held_out))


def split_texts(source: Source, fraction: float) -> tuple[Texts, Texts]:
    """(training, held-out) texts of `split_documents`."""
    documents = split_documents(source, fraction)
    return documents.texts(documents.training), documents.texts(documents.held_out)


@dataclass(frozen=True)
class Blocks:
    """training: the packed blocks of each source; held_out: those of all of them; held_out_bytes: of their text, UTF-8."""

    training: list[PackedDocuments]
    held_out: list[PackedDocuments]
    held_out_bytes: int


def encode_blocks(
    documents: Sequence[Documents], tokenizer: PreTrainedTokenizerBase, block_tokens: int, isolated: bool
) -> Blocks:
    """Tokenise and pack the training and the held-out documents of each source.

    Args:
        isolated: whether the model keeps documents of one block apart; where not, each block holds one.

    Raises:
        UserError: nothing to train on, or nothing held out.
    """
    training: list[PackedDocuments] = []
    held_out: list[PackedDocuments] = []
    for part in documents:
        ids = part.encode(tokenizer)
        for positions, packed in ((part.training, training), (part.held_out, held_out)):
            packed.append(pack_documents(ids, block_tokens, positions=positions, isolated=isolated))
    if not any(map(len, training)) or not any(map(len, held_out)):
        what = "was held out; raise held_out_fraction" if any(map(len, training)) else "is left to train on; lower it"
        raise UserError(f"no document {what} or give more documents")
    return Blocks(training, held_out, sum(part.texts(part.held_out).bytes for part in documents))

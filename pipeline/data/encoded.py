"""Records to token ids in the data cache, an entry per file, by all cores."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.data.cache import DataCache
from pipeline.data.encoding import IGNORE, ChatEncoder, document_ids, tokenizer_identity
from pipeline.data.parallel import map_batches
from pipeline.data.progress import DataProgress
from pipeline.data.records import Record, at_each
from pipeline.data.stored_records import StoredFile, StoredRecords, StoredText, decode
from pipeline.data.tables import IntegerRows, list_array, map_table, numbers, shift_column, write_table

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

IDS = pa.large_list(pa.int32())
Encode = Callable[[list[Record]], pa.RecordBatch]  # a row's `record` counts from its batch's first one


def encode_files(
    records: StoredRecords, what: str, identity: dict[str, Any], schema: pa.Schema, encode: Encode
) -> list[pa.Table]:
    """A table per file of all its records, from the cache of the records, or encoded into it.

    Args:
        what: name of what is made, for the cache.
        identity: what decides the encoding, as plain data.
        encode: of a batch of records, in any process.
    """

    def table(file: StoredFile) -> pa.Table:
        def build(folder: Path) -> dict[str, Any]:
            return {"rows": write_table(folder, schema, _encoded(StoredRecords([file]), encode, file.name))}

        cache = DataCache(file.entry.folder.parent)
        return map_table(
            cache.entry(
                f"{what} of {file.name}", {"what": what, "records": file.key, **identity}, build, file=file.name
            ).folder
        )

    return [table(file) for file in records.files]


def _encoded(records: StoredRecords, encode: Encode, name: str) -> Iterator[pa.RecordBatch]:
    progress = DataProgress(f"encoding {Path(name).name}", total=len(records))
    try:
        for count, batch in map_batches(functools.partial(_counted, encode), records.in_batches()):
            if "record" in batch.schema.names:
                batch = shift_column(batch, "record", progress.done)
            yield batch
            progress.update(count)
    finally:
        progress.close()


def _counted(encode: Encode, batch: list[StoredText]) -> tuple[int, pa.RecordBatch]:
    return len(batch), encode(decode(batch))


# ---------------------------------------------------------------------------------------------- documents


def encode_documents(
    records: StoredRecords, tokenizer: PreTrainedTokenizerBase, parts: Callable[[str], list[str]] | None = None
) -> IntegerRows:
    """`document_ids` of each record's text, or of each of the `parts` that a single document is cut into."""
    identity = {"tokenizer": tokenizer_identity(tokenizer), "parts": parts is not None}

    def encode(batch: list[Record]) -> pa.RecordBatch:
        texts = [record["text"] for record in batch]
        if parts is not None:
            texts = [part for text in texts for part in parts(text)]
        return pa.record_batch([list_array(document_ids(tokenizer, texts), pa.int32())], ["ids"])

    tables = encode_files(records, "tokens of documents", identity, pa.schema({"ids": IDS}), encode)
    return IntegerRows(tables, "ids")


# ---------------------------------------------------------------------------------------------- demonstrations


class Examples(Sequence[tuple[list[int], list[int]]]):
    """Token ids and labels of demonstrations.

    Attributes:
        lengths: tokens of each.
        record: position of the record that each comes from.
        learnt: whether a token of it is learnt.
    """

    def __init__(self, tables: Sequence[pa.Table], records: StoredRecords):
        self.ids, self.labels = IntegerRows(tables, "ids"), IntegerRows(tables, "labels")
        self.lengths, self.learnt = self.ids.lengths, numbers(tables, "learnt", np.bool_)
        starts = np.cumsum([0] + [file.entry.facts["rows"] for file in records.files])
        own = [numbers([table], "record", np.int64) + start for table, start in zip(tables, starts, strict=False)]
        self.record = np.concatenate([np.zeros(0, np.int64), *own])

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: Any) -> Any:
        return self.ids[index].tolist(), self.labels[index].tolist()


def encode_examples(records: StoredRecords, encoder: ChatEncoder, loss_on: str) -> Examples:
    """`ChatEncoder.examples` of each record."""
    schema = pa.schema({"ids": IDS, "labels": IDS, "record": pa.int64(), "learnt": pa.bool_()})

    def encode(batch: list[Record]) -> pa.RecordBatch:
        parts = at_each(lambda row: encoder.dialogues(row["messages"], row["trained"], loss_on), batch)
        encoded = encoder.encode_dialogues([dialogue for dialogues in parts for dialogue in dialogues])
        record = [position for position, dialogues in enumerate(parts) for _ in dialogues]
        examples = at_each(lambda _: next(encoded), [batch[position] for position in record])
        arrays = [
            list_array([ids for ids, _ in examples], pa.int32()),
            list_array([labels for _, labels in examples], pa.int32()),
            pa.array(record, pa.int64()),
            pa.array([labels[1:].count(IGNORE) < len(labels) - 1 for _, labels in examples], pa.bool_()),
        ]
        return pa.record_batch(arrays, schema=schema)

    identity = {"tokenizer": tokenizer_identity(encoder.tokenizer), "loss_on": loss_on}
    return Examples(encode_files(records, "examples", identity, schema, encode), records)


# ---------------------------------------------------------------------------------------------- prompts


def encode_prompts(records: StoredRecords, encoder: ChatEncoder) -> IntegerRows:
    """`ChatEncoder.prompt_ids` of each record's prompt."""

    def encode(batch: list[Record]) -> pa.RecordBatch:
        parts = at_each(lambda record: encoder.prompt_parts(record["prompt"]), batch)
        rows = at_each(lambda _, tokenized: tokenized.ids, batch, encoder.text.tokenize(parts))
        return pa.record_batch([list_array(rows, pa.int32())], ["ids"])

    identity = {"tokenizer": tokenizer_identity(encoder.tokenizer)}
    return IntegerRows(encode_files(records, "prompts", identity, pa.schema({"ids": IDS}), encode), "ids")

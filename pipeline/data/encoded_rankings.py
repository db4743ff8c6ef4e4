"""Rankings to rows of token ids: every response once, behind its prompt, with the pairs that they are trained on."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict

from pipeline.data.cache import DataCache
from pipeline.data.comparisons import Pair, digest, pairs_of
from pipeline.data.control_tokens import Part
from pipeline.data.encoding import ChatEncoder, tokenizer_identity
from pipeline.data.parallel import map_batches
from pipeline.data.progress import DataProgress
from pipeline.data.records import Record, at_each
from pipeline.data.stored_records import StoredRecords, StoredText, decode
from pipeline.data.tables import locate, map_table, numbers, shift_column, write_table
from pipeline.errors import UserError

import datasets
import numpy as np
import pyarrow as pa

logger = logging.getLogger(__name__)
# What training reads of a row; `length` and `num_pairs` are for batching and counting.
FEATURES = datasets.Features(
    {
        "ids": datasets.List(datasets.List(datasets.Value("int32"))),
        "pairs": datasets.List(
            {
                "better": datasets.Value("int32"),
                "worse": datasets.Value("int32"),
                "target": datasets.Value("float32"),
                "tie": datasets.Value("bool"),
            }
        ),
        "margin": datasets.Value("float32"),
        "weight": datasets.Value("float32"),
        "length": datasets.Value("int32"),
        "num_pairs": datasets.Value("int32"),
    }
)
# Stored besides: what evaluation reads, and the record's position among those that were encoded.
STORED = FEATURES.arrow_schema.remove_metadata()
for _name, _kind in (("prompt_tokens", pa.int32()), ("prompt_id", pa.string()), ("position", pa.int64())):
    STORED = STORED.append(pa.field(_name, _kind))


class EncodedRanking(TypedDict):
    """One ranking; of the training rows only what `FEATURES` names is kept."""

    ids: list[list[int]]  # of each response, its prompt before it
    pairs: list[Pair]
    margin: float
    weight: float  # of its loss
    length: int  # tokens of the longest
    num_pairs: int
    prompt_tokens: int
    prompt_id: str  # the same for all rankings of a prompt
    position: int  # of its record among those that were encoded
    record: Record


@dataclass(frozen=True, kw_only=True)
class RankingOptions:
    """What a recipe says about the use of rankings (see the keys of the reward stage)."""

    max_tokens: int
    ties: Literal["drop", "half", "margin"] = "drop"
    confidence: Literal["ignore", "target", "weight"] = "ignore"
    label_smoothing: float = 0.0
    labeler_weights: dict[str, float] = field(default_factory=dict)


def for_training(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key in FEATURES}


@dataclass
class EncodedBatch:
    """Rows, with the lines of the rankings that are left out, of `total` rankings."""

    rows: list[EncodedRanking] = field(default_factory=list)
    too_long: list[int] = field(default_factory=list)
    alike: list[int] = field(default_factory=list)
    total: int = 0

    def count(self, other: EncodedBatch) -> None:
        """Add another batch's counts."""
        self.too_long += other.too_long
        self.alike += other.alike
        self.total += other.total

    def say(self, name: str, max_tokens: int) -> None:
        for lines, why in (
            (self.too_long, f"hold a text over max_tokens ({max_tokens})"),
            (self.alike, "hold responses that are the same tokens"),
        ):
            if lines:
                shown = ", ".join(map(str, lines[:5])) + (", …" if len(lines) > 5 else "")
                logger.warning(
                    "reward: %d of %d %s rankings %s and are left out (lines %s)",
                    len(lines),
                    self.total,
                    name,
                    why,
                    shown,
                )


def tokenize_rankings(encoder: ChatEncoder, records: Sequence[Record]) -> list[tuple[list[int], list[list[int]]]]:
    """Ids of the prompt and of each response of each record; the tokenizer is called once."""

    def parts_of(record: Record) -> list[list[Part]]:
        return [encoder.prompt_parts(record["prompt"]), *map(encoder.response_parts, record["responses"])]

    parts = at_each(parts_of, records)
    tokenized = iter(encoder.text.tokenize([part for row in parts for part in row]))

    def ids_of(record: Record) -> tuple[list[int], list[list[int]]]:
        return next(tokenized).ids, [encoder.finish_response(next(tokenized)) for _ in record["responses"]]

    return at_each(ids_of, records)


def encode_batch(encoder: ChatEncoder, options: RankingOptions, records: Sequence[Record]) -> EncodedBatch:
    """Rows of token ids; a row's `position` counts from the first record.

    Raises:
        UserError: a prompt that the template refuses, or a confidence that the recipe's use of it does not allow.
    """
    batch = EncodedBatch()
    for position, (record, (prompt, responses)) in enumerate(
        zip(records, tokenize_rankings(encoder, records), strict=True)
    ):
        batch.total += 1
        ids = [prompt + response for response in responses]
        if max(map(len, ids)) > options.max_tokens:
            batch.too_long.append(record["line"])
            continue
        target, weight = preference_target_and_weight(record, options)
        pairs = [p for p in pairs_of(record["ranks"], options.ties, target) if ids[p["better"]] != ids[p["worse"]]]
        if not pairs:
            batch.alike.append(record["line"])
            continue
        batch.rows.append(
            {
                "ids": ids,
                "pairs": pairs,
                "margin": float(record.get("margin", 0.0)),
                "weight": weight,
                "length": max(map(len, ids)),
                "num_pairs": len(pairs),
                "prompt_tokens": len(prompt),
                "prompt_id": digest(repr(record["prompt"])).hex(),
                "position": position,
                "record": record,
            }
        )
    return batch


def encode_rankings(
    encoder: ChatEncoder, records: Iterable[Record], options: RankingOptions, name: str
) -> list[EncodedRanking]:
    """Rows of token ids. Rankings that are too long, or whose responses are the same to the tokenizer, are counted and left out.

    Args:
        name: of these records, for what is said about them.

    Raises:
        UserError: as `encode_batch`.
    """
    batch = encode_batch(encoder, options, list(records))
    batch.say(name, options.max_tokens)
    return batch.rows


class RankingTable(Sequence[EncodedRanking]):
    """Encoded rankings in the data cache, read when they are asked for.

    Args:
        records: those that were encoded.
    """

    def __init__(self, table: pa.Table, records: StoredRecords):
        self.table, self.records = table, records
        self._batches = table.to_batches()
        self._ends = np.cumsum([batch.num_rows for batch in self._batches], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def _columns(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number, row = locate(self._ends, index)
        return self._batches[number].slice(row, 1).to_pylist()[0]

    def __getitem__(self, index: Any) -> Any:
        row = self._columns(index)
        return {**row, "record": self.records[row["position"]]}

    def training_row(self, index: int) -> dict[str, Any]:
        """Only what `FEATURES` names."""
        return for_training(self._columns(index))

    def numbers(self, column: str) -> np.ndarray:
        return numbers([self.table], column, np.int64)


class TrainingRows(Sequence[dict[str, Any]]):
    """What training reads of encoded rankings."""

    def __init__(self, table: RankingTable):
        self.table = table

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: Any) -> Any:
        return self.table.training_row(index)


def store_rankings(encoder: ChatEncoder, records: StoredRecords, options: RankingOptions, name: str) -> RankingTable:
    """`encode_rankings` of stored records in the data cache, by all cores."""

    def build(folder: Path) -> dict[str, Any]:
        counts, progress = EncodedBatch(), DataProgress(f"encoding {name} rankings", total=len(records))

        def encoded(texts: list[StoredText]) -> tuple[EncodedBatch, pa.RecordBatch]:
            batch = encode_batch(encoder, options, decode(texts))
            rows = [{name: value for name, value in row.items() if name != "record"} for row in batch.rows]
            return dataclasses.replace(batch, rows=[]), pa.RecordBatch.from_pylist(rows, STORED)

        def batches() -> Iterator[pa.RecordBatch]:
            for batch, rows in map_batches(encoded, records.in_batches()):
                yield shift_column(rows, "position", counts.total)
                counts.count(batch)
                progress.update(batch.total)

        rows = write_table(folder, STORED, batches())
        progress.close()
        counts.say(name, options.max_tokens)
        return {"rows": rows}

    identity = {
        "records": records.keys,
        "positions": hashlib.sha256(np.ascontiguousarray(records.positions).tobytes()).hexdigest(),
        "tokenizer": tokenizer_identity(encoder.tokenizer),
        "options": asdict(options),
        "name": name,
    }
    files = records.files[0].name if len(records.files) == 1 else f"{len(records.files)} files"
    cache = DataCache(records.files[0].entry.folder.parent)
    entry = cache.entry(f"{name} rankings of {files}", identity, build)
    return RankingTable(map_table(entry.folder), records)


def preference_target_and_weight(record: Record, options: RankingOptions) -> tuple[float, float]:
    """(target of the record's strict pairs: probability that they are right, weight of its loss)."""
    target, weight = 1.0, options.labeler_weights.get(record.get("labeler", ""), 1.0)
    confidence = record.get("confidence")
    if confidence is not None and options.confidence == "target":
        if not 0.5 <= confidence <= 1:
            raise UserError(
                f"line {record['line']}: confidence {confidence} is no probability of being right (0.5 to 1); "
                "say `confidence: weight` or `ignore`",
                file=record.get("file"),
            )
        target = float(confidence)
    if confidence is not None and options.confidence == "weight":
        if confidence < 0:
            raise UserError(
                f"line {record['line']}: confidence {confidence} cannot weigh a record; it must be 0 or more",
                file=record.get("file"),
            )
        weight *= float(confidence)
    smoothing = options.label_smoothing
    return target * (1 - smoothing) + (1 - target) * smoothing, weight

"""Rankings to rows of token ids: every response once, behind its prompt, with the pairs that they are trained on."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

from pipeline.data.comparisons import Pair, digest, pairs_of
from pipeline.data.encoding import ChatEncoder
from pipeline.data.records import Record, at_row
from pipeline.errors import UserError

import datasets

logger = logging.getLogger("pipeline.reward")
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
    record: Record


@dataclass(frozen=True, kw_only=True)
class RankingOptions:
    """What a recipe says about the use of rankings (see the keys of the reward stage)."""

    max_tokens: int
    ties: Literal["drop", "half", "margin"] = "drop"
    confidence: Literal["ignore", "target", "weight"] = "ignore"
    label_smoothing: float = 0.0
    labeler_weights: dict[str, float] = field(default_factory=dict)


def for_training(row: EncodedRanking) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key in FEATURES}


def encode_rankings(
    encoder: ChatEncoder, records: Iterable[Record], options: RankingOptions, name: str
) -> Iterator[EncodedRanking]:
    """Rows of token ids. Rankings that are too long, or whose responses are the same to the tokenizer, are counted and left out.

    Args:
        name: of these records, for what is said about them.

    Raises:
        UserError: a prompt that the template refuses, or a confidence that the recipe's use of it does not allow.
    """
    too_long: list[int] = []
    alike: list[int] = []
    total = 0
    for record in records:
        total += 1
        with at_row(record):
            prompt = encoder.prompt_ids(record["prompt"])
            ids = [prompt + encoder.response_ids(response) for response in record["responses"]]
        if max(map(len, ids)) > options.max_tokens:
            too_long.append(record["line"])
            continue
        target, weight = preference_target_and_weight(record, options)
        pairs = [p for p in pairs_of(record["ranks"], options.ties, target) if ids[p["better"]] != ids[p["worse"]]]
        if not pairs:
            alike.append(record["line"])
            continue
        yield {
            "ids": ids,
            "pairs": pairs,
            "margin": float(record.get("margin", 0.0)),
            "weight": weight,
            "length": max(map(len, ids)),
            "num_pairs": len(pairs),
            "prompt_tokens": len(prompt),
            "prompt_id": digest(repr(record["prompt"])).hex(),
            "record": record,
        }
    _warn(
        f"%d of %d {name} rankings hold a text over max_tokens ({options.max_tokens}) and are left out", too_long, total
    )
    _warn(f"%d of %d {name} rankings hold responses that are the same tokens and are left out", alike, total)


def _warn(message: str, lines: list[int], total: int) -> None:
    if lines:
        shown = ", ".join(map(str, lines[:5])) + (", …" if len(lines) > 5 else "")
        logger.warning(f"reward: {message} (lines %s)", len(lines), total, shown)


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

"""A round's labels: a reward model's accuracy on them, labelers' agreement, and whose answers they preferred."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from pipeline.data.comparisons import digest, pairs_of
from pipeline.data.hashing import sha256_json
from pipeline.data.labeler_agreement import LabelerAgreement
from pipeline.data.records import PARSERS, Record, read_records
from pipeline.data.splits import is_held_out
from pipeline.evaluation.intervals import PairAccuracy, pair_accuracy
from pipeline.models.precision import accelerator_type
from pipeline.rollout.rewards import TextScorer
from pipeline.rounds.ledger import prompt_key

import numpy as np


@dataclass(frozen=True)
class Labels:
    """The rankings of one round."""

    records: list[Record]

    @classmethod
    def read(cls, path: Path) -> Labels:
        return cls(read_records(path, PARSERS["ranking"]))

    @property
    def labelers(self) -> list[str]:
        return sorted({str(record.get("labeler", "unnamed")) for record in self.records})

    def agreement(self) -> dict[str, Any]:
        """`alpha` (Krippendorff's) and `agreement` over pairs that several labelers judged; None where there is none."""
        together = LabelerAgreement()
        for record in self.records:
            prompt = digest(sha256_json(record["prompt"]))
            together.add(prompt, str(record.get("labeler", "unnamed")), record["responses"], record["ranks"])
        found = together.result() or {}
        return {
            "alpha": found.get("krippendorff_alpha"),
            "agreement": found.get("pairwise"),
            "shared_pairs": found.get("judged_pairs", 0),
        }


@dataclass(frozen=True)
class LabelAccuracy:
    """A reward model's accuracy on all pairs of a round, and on those of prompts that its training held out."""

    all: PairAccuracy
    held_out: PairAccuracy


def accuracy(reward: str, labels: Labels, held_out_fraction: float) -> LabelAccuracy:
    """Share of strict pairs that the reward model orders as the labeler did."""
    scorer = TextScorer(reward, accelerator_type())
    prompts = [record["prompt"] for record in labels.records for _ in record["responses"]]
    flat = iter(scorer(prompts, [text for record in labels.records for text in record["responses"]]))
    better, worse, names, held_out = [], [], [], []
    for record in labels.records:
        scores = [next(flat) for _ in record["responses"]]
        for pair in pairs_of(record["ranks"], "drop"):
            better.append(scores[pair["better"]])
            worse.append(scores[pair["worse"]])
            names.append(prompt_key(record))
            held_out.append(is_held_out(record, held_out_fraction))
    return LabelAccuracy(
        all=pair_accuracy(better, worse, names),
        held_out=pair_accuracy(
            [x for x, out in zip(better, held_out, strict=True) if out],
            [x for x, out in zip(worse, held_out, strict=True) if out],
            [x for x, out in zip(names, held_out, strict=True) if out],
        ),
    )


def wins_of_policies(rounds: Sequence[Labels], policies: Sequence[dict[str, Any]]) -> np.ndarray:
    """(prompts, policies, policies) how often labelers preferred the row's policy; ties are half of either.

    Args:
        policies: each with the `weights_sha256` that `sources` name. Answers of other models count nowhere.
    """
    number = {policy["weights_sha256"]: i for i, policy in enumerate(policies)}
    wins: dict[str, np.ndarray] = {}
    for record in (record for labels in rounds for record in labels.records):
        ranks, sources = record["row"].get("ranks") or [], record["row"].get("sources") or []
        own = wins.setdefault(prompt_key(record), np.zeros((len(policies), len(policies))))
        places = [number.get(source.get("weights_sha256")) for source in sources]
        for i, j in combinations(range(min(len(ranks), len(places))), 2):
            a, b = places[i], places[j]
            if a is None or b is None or a == b or ranks[i] is None or ranks[j] is None:
                continue
            own[a, b] += 1.0 if ranks[i] < ranks[j] else 0.5 if ranks[i] == ranks[j] else 0.0
            own[b, a] += 1.0 if ranks[j] < ranks[i] else 0.5 if ranks[i] == ranks[j] else 0.0
    return np.array(list(wins.values())) if wins else np.zeros((0, len(policies), len(policies)))

"""Rankings to pairs; rankings that cannot be trained on, which are counted and listed; who is held out."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, NamedTuple, TypedDict

from pipeline.data.records import Record

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from pipeline.data.sources import Source
    from pipeline.data.stored_records import StoredRecords

Problem = tuple[int, str]  # line, reason


class Pair(TypedDict):
    """Two responses of a ranking, by position."""

    better: int
    worse: int
    target: float  # probability that `better` is preferred: 0.5 for a tie
    tie: bool


def pairs_of(ranks: Sequence[int], ties: str, target: float = 1.0) -> list[Pair]:
    """All K·(K−1)/2 pairs of a ranking, the better response first.

    Args:
        ranks: 1 is best; equal ranks tie.
        ties: "drop" leaves tied pairs out (InstructGPT), "half" keeps them, with target 0.5, "margin" as an outcome of their
            own, for which the loss has a probability and takes no target.
        target: probability that the labeler's preference is right.
    """
    pairs: list[Pair] = []
    for i, j in combinations(range(len(ranks)), 2):
        if ranks[i] == ranks[j]:
            if ties != "drop":
                pairs.append({"better": i, "worse": j, "target": 0.5, "tie": True})
        else:
            better, worse = (i, j) if ranks[i] < ranks[j] else (j, i)
            pairs.append({"better": better, "worse": worse, "target": target, "tie": False})
    return pairs


class RankingValidator:
    """Says which rankings cannot be trained on, one record at a time, remembering 16 bytes for each.

    Not trainable: dialogues that differ before their last answer, one response only, all tied (with ties dropped),
    every response the same, the same response at two ranks, an empty response, an exact duplicate (same labeler, or
    none named on either), and a pair that its own labeler judged the other way round elsewhere. Two unnamed people
    may disagree; they do not contradict themselves.
    """

    def __init__(self, ties: str):
        self.ties = ties
        self._lines: dict[bytes, int] = {}  # ranking → line
        self._judgements: dict[bytes, int] = {}  # (prompt, better, worse, labeler) → line

    def problem(self, record: Record) -> str | None:
        """Why the record cannot be trained on, or None."""
        if reason := _own_problem(record, self.ties):
            return reason
        prompt = digest(repr(record["prompt"]))
        texts = [digest(response) for response in record["responses"]]
        key = _ranking_key(record, prompt, texts)
        if key in self._lines:
            return f"duplicate of line {self._lines[key]}"
        judgements = _judgements(record, prompt, texts)
        for _, opposite in judgements:
            if opposite in self._judgements:
                return f"contradicts line {self._judgements[opposite]}: the same labeler chose the other response"
        for judgement, _ in judgements:
            self._judgements.setdefault(judgement, record["line"])
        self._lines[key] = record["line"]
        return None


def _ranking_key(record: Record, prompt: bytes, texts: list[bytes]) -> bytes:
    return digest(prompt + b"".join(texts) + repr((record["ranks"], record.get("labeler"))).encode())


def _judgements(record: Record, prompt: bytes, texts: list[bytes]) -> list[tuple[bytes, bytes]]:
    """(judgement, its opposite) of each strict pair of a named labeler."""
    if "labeler" not in record:
        return []
    labeler = record["labeler"].encode()
    ordered = [(texts[p["better"]], texts[p["worse"]]) for p in pairs_of(record["ranks"], "drop")]
    return [(digest(prompt + a + b + labeler), digest(prompt + b + a + labeler)) for a, b in ordered]


class RankingColumns(NamedTuple):
    """What is stored beside a ranking: 64 bits stand for each text, and decide only which records are looked at again."""

    labeler: str | None
    prompt: int
    ranking: int  # with its labeler and ranks
    judgements: list[int]  # of a named labeler, each strict pair
    opposites: list[int]  # of each judgement
    doubtful: bool  # it has a problem of its own, if all problems count


RANKING_COLUMNS = {
    "labeler": pa.string(), "prompt": pa.uint64(), "ranking": pa.uint64(), "judgements": pa.large_list(pa.uint64()),
    "opposites": pa.large_list(pa.uint64()), "doubtful": pa.bool_(),
}  # fmt: skip


def ranking_columns(record: Record) -> RankingColumns:
    prompt = digest(repr(record["prompt"]))
    texts = [digest(response) for response in record["responses"]]
    judgements = _judgements(record, prompt, texts)
    return RankingColumns(
        labeler=record.get("labeler"),
        prompt=_bits(prompt),
        ranking=_bits(_ranking_key(record, prompt, texts)),
        judgements=[_bits(judgement) for judgement, _ in judgements],
        opposites=[_bits(opposite) for _, opposite in judgements],
        doubtful=_own_problem(record, "drop") is not None,
    )


def _bits(key: bytes) -> int:
    return int.from_bytes(key[:8], "big")


def stored_invalid_rankings(records: StoredRecords, ties: str) -> tuple[np.ndarray, list[Problem]]:
    """`find_invalid_rankings` of stored records, of which only those are read whose columns leave a doubt.

    A record without a problem of its own, whose ranking stands once and whose judgements nobody made the other way
    round, is valid, and makes no other invalid.
    """
    rankings = records.numbers("ranking", np.uint64)
    _, group, count = np.unique(rankings, return_inverse=True, return_counts=True)
    doubtful = records.numbers("doubtful", np.bool_) | (count[group] > 1)
    judgements = np.concatenate([np.zeros(0, np.uint64), *records.values("judgements")])
    opposites = np.concatenate([np.zeros(0, np.uint64), *records.values("opposites")])
    opposed = np.isin(opposites, judgements)
    rows = np.repeat(np.arange(len(records)), records.lengths("judgements"))
    doubtful[rows[opposed]] = True
    positions = np.flatnonzero(doubtful)
    valid, problems = find_invalid_rankings(records.select(positions), ties)
    invalid = np.delete(positions, valid)
    return np.delete(np.arange(len(records)), invalid), problems


def find_invalid_rankings(records: Iterable[Record], ties: str) -> tuple[list[int], list[Problem]]:
    """`RankingValidator` over all records.

    Returns:
        valid: positions of the trainable records
        problems: (line, reason) of each other one
    """
    validator = RankingValidator(ties)
    valid: list[int] = []
    problems: list[Problem] = []
    for position, record in enumerate(records):
        reason = validator.problem(record)
        if reason is None:
            valid.append(position)
        else:
            problems.append((record["line"], reason))
    return valid, problems


def digest(data: str | bytes) -> bytes:
    """16 bytes that stand for a text; two texts share them once in 2^64 pairs."""
    return hashlib.blake2b(data.encode() if isinstance(data, str) else data, digest_size=16).digest()


def _own_problem(record: Record, ties: str) -> str | None:
    responses, ranks = record["responses"], record["ranks"]
    if "problem" in record:
        return record["problem"]
    if len(responses) < 2:
        return "a ranking of one response"
    if not all(response.strip() for response in responses):
        return "an empty response"
    distinct = len(set(responses))
    if distinct == 1:
        return "chosen and rejected are identical"
    if ties == "drop" and len(set(ranks)) == 1:
        return "all responses tie"
    if distinct < len(responses) and len(set(zip(responses, ranks, strict=True))) > distinct:
        return "the same response stands at two ranks"
    return None


def reason_kind(reason: str) -> str:
    """A problem without the line that it refers to."""
    return reason.split(" of line")[0].split(" line ")[0]


def summary(problems: list[Problem], source: str, listed: int = 5) -> str:
    """One line on dropped records: how many, why, and where the first ones stand."""
    reasons = Counter(reason_kind(reason) for _, reason in problems)
    why = ", ".join(f"{count} × {reason}" for reason, count in reasons.most_common())
    lines = ", ".join(str(line) for line, _ in problems[:listed]) + (", …" if len(problems) > listed else "")
    return f"{source}: dropped {len(problems)} rankings ({why}; lines {lines})"


# ------------------------------------------------------------------------------------------------ who is held out


@dataclass
class RankingSplit:
    """Where each record goes: positions in each source, in reading order."""

    training: list[np.ndarray] = field(default_factory=list)
    held_out: list[np.ndarray] = field(default_factory=list)  # unseen prompts, labelers of the training data
    held_out_labelers: list[np.ndarray] = field(default_factory=list)  # unseen prompts, labelers kept out of training


def labelers_of(sources: Sequence[Source]) -> list[str]:
    """Names of all labelers, sorted."""
    return sorted({name for source in sources for name in source.records.distinct("labeler")})


def split_rankings(
    sources: Sequence[Source], held_out_fraction: float, held_out_labelers: Sequence[str]
) -> RankingSplit:
    """By labeler, then by the record's own `split` or its prompt's hash.

    Held-out labelers are evaluated only on prompts that do not occur in the training set.
    """
    split = RankingSplit()
    others: list[tuple[np.ndarray, np.ndarray]] = []
    training_prompts = []
    for source in sources:
        records = source.records
        prompts = records.numbers("prompt", np.uint64)
        kept_out = records.is_in("labeler", held_out_labelers)
        held_out = records.held_out(held_out_fraction) & ~kept_out
        training = ~held_out & ~kept_out
        training_prompts.append(prompts[training])
        split.training.append(np.flatnonzero(training))
        split.held_out.append(np.flatnonzero(held_out))
        others.append((np.flatnonzero(kept_out), prompts[kept_out]))
    seen = np.unique(np.concatenate(training_prompts))
    split.held_out_labelers = [positions[~np.isin(prompts, seen)] for positions, prompts in others]
    return split

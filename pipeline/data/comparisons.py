"""Rankings to pairs, and the records that cannot be trained on: found, counted, listed, never silent."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from itertools import combinations
from typing import Any

from pipeline.data.records import Record

Problem = tuple[int, str]


def pairs_of(ranks: list[int], ties: str, target: float = 1.0) -> list[dict[str, Any]]:
    """All K·(K−1)/2 pairs of a ranking, the better response first.

    Args:
        ranks: 1 is best; equal ranks tie.
        ties: "drop" leaves tied pairs out (I22), "half" and "margin" keep them, with target 0.5.
        target: probability that the labeler's preference is right.
    """
    pairs = []
    for i, j in combinations(range(len(ranks)), 2):
        if ranks[i] == ranks[j]:
            if ties != "drop":
                pairs.append({"better": i, "worse": j, "target": 0.5, "tie": True})
        else:
            better, worse = (i, j) if ranks[i] < ranks[j] else (j, i)
            pairs.append({"better": better, "worse": worse, "target": target, "tie": False})
    return pairs


class Sieve:
    """Parts trainable rankings from the others, one record at a time, remembering 16 bytes for each.

    Not trainable: dialogues that differ before their last answer, one response only, all tied (with ties dropped),
    every response the same, the same response at two ranks, an empty response, an exact duplicate (same labeler, or
    none named on either), and a pair that its own labeler judged the other way round elsewhere. Two unnamed people
    may disagree; they do not contradict themselves.
    """

    def __init__(self, ties: str):
        self.ties = ties
        self._seen: dict[bytes, int] = {}
        self._verdicts: dict[bytes, int] = {}

    def problem(self, record: Record) -> str | None:
        """Why the record cannot be trained on, or None."""
        responses, ranks = record["responses"], record["ranks"]
        if reason := _problem(responses, ranks, record, self.ties):
            return reason
        prompt = digest(repr(record["prompt"]))
        labeler = record.get("labeler")
        texts = [digest(response) for response in responses]
        key = digest(prompt + b"".join(texts) + repr((ranks, labeler)).encode())
        if key in self._seen:
            return f"duplicate of line {self._seen[key]}"
        if labeler is not None:
            found = []
            for i, j in combinations(range(len(ranks)), 2):
                if ranks[i] != ranks[j]:
                    better, worse = (texts[i], texts[j]) if ranks[i] < ranks[j] else (texts[j], texts[i])
                    opposite = digest(prompt + worse + better + labeler.encode())
                    if opposite in self._verdicts:
                        return f"contradicts line {self._verdicts[opposite]}: the same labeler chose the other response"
                    found.append(digest(prompt + better + worse + labeler.encode()))
            for verdict in found:
                self._verdicts.setdefault(verdict, record["line"])
        self._seen[key] = record["line"]
        return None


def sift(records: Iterable[Record], ties: str) -> tuple[list[int], list[Problem]]:
    """A whole `Sieve`.

    Returns:
        kept: positions of the trainable records
        problems: (line, reason) of each other one
    """
    sieve = Sieve(ties)
    kept: list[int] = []
    problems: list[Problem] = []
    for position, record in enumerate(records):
        reason = sieve.problem(record)
        if reason is None:
            kept.append(position)
        else:
            problems.append((record["line"], reason))
    return kept, problems


def digest(data: str | bytes) -> bytes:
    """16 bytes that stand for a text; two texts share them once in 2^64 pairs."""
    return hashlib.blake2b(data.encode() if isinstance(data, str) else data, digest_size=16).digest()


def _problem(responses: list[str], ranks: list[int], record: Record, ties: str) -> str | None:
    if "problem" in record:
        return str(record["problem"])
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


def kind(reason: str) -> str:
    """A problem without the line that it refers to."""
    return reason.split(" of line")[0].split(" line ")[0]


def summary(problems: list[Problem], source: str, listed: int = 5) -> str:
    """One line on dropped records: how many, why, and where the first ones stand."""
    reasons = Counter(kind(reason) for _, reason in problems)
    why = ", ".join(f"{count} × {reason}" for reason, count in reasons.most_common())
    lines = ", ".join(str(line) for line, _ in problems[:listed]) + (", …" if len(problems) > listed else "")
    return f"{source}: dropped {len(problems)} rankings ({why}; lines {lines})"

"""Rankings to pairs, and the records that cannot be trained on: found, counted, listed, never silent."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from itertools import combinations
from typing import Any

from pipeline.data.records import Record


def pairs_of(ranks: list[int], ties: str) -> list[dict[str, Any]]:
    """All K·(K−1)/2 pairs of a ranking, the better response first.

    Args:
        ranks: 1 is best; equal ranks tie.
        ties: "drop" leaves tied pairs out (I22), "half" keeps them with target 0.5.
    """
    pairs = []
    for i, j in combinations(range(len(ranks)), 2):
        if ranks[i] == ranks[j]:
            if ties == "half":
                pairs.append({"better": i, "worse": j, "target": 0.5})
        else:
            better, worse = (i, j) if ranks[i] < ranks[j] else (j, i)
            pairs.append({"better": better, "worse": worse, "target": 1.0})
    return pairs


def sift(records: Iterable[Record], ties: str) -> tuple[list[Record], list[tuple[int, str]]]:
    """Part trainable rankings from the others.

    Dropped whole: dialogues that differ before their last answer, one response only, all tied (with ties dropped), every response the same, an empty response, an
    exact duplicate, and a pair that its own labeler judged the other way round elsewhere.

    Returns:
        kept: records
        problems: (line, reason) of each dropped one
    """
    kept: list[Record] = []
    problems: list[tuple[int, str]] = []
    seen: dict[str, int] = {}
    verdicts: dict[tuple[str, str, str, str], int] = {}
    for record in records:
        reason = _problem(record, ties)
        key = json.dumps([record["prompt"], record["responses"], record["ranks"], record.get("labeler")])
        if reason is None and key in seen and "labeler" in record:
            reason = f"duplicate of line {seen[key]}"
        if reason is None and "labeler" in record:  # two unnamed people may agree or differ
            reason = _contradiction(record, verdicts)
        if reason is None:
            seen[key] = record["line"]
            kept.append(record)
        else:
            problems.append((record["line"], reason))
    return kept, problems


def _problem(record: Record, ties: str) -> str | None:
    responses, ranks = record["responses"], record["ranks"]
    if "problem" in record:
        return str(record["problem"])
    if len(responses) < 2:
        return "a ranking of one response"
    if any(not response.strip() for response in responses):
        return "an empty response"
    if len(set(responses)) == 1:
        return "chosen and rejected are identical"
    if ties == "drop" and len(set(ranks)) == 1:
        return "all responses tie"
    by_text: dict[str, set[int]] = {}
    for response, rank in zip(responses, ranks, strict=True):
        by_text.setdefault(response, set()).add(rank)
    if any(len(found) > 1 for found in by_text.values()):
        return "the same response stands at two ranks"
    return None


def _contradiction(record: Record, verdicts: dict[tuple[str, str, str, str], int]) -> str | None:
    prompt, labeler = json.dumps(record["prompt"]), record.get("labeler", "")
    found = []
    for pair in pairs_of(record["ranks"], "drop"):
        better, worse = record["responses"][pair["better"]], record["responses"][pair["worse"]]
        if (prompt, labeler, worse, better) in verdicts:
            return f"contradicts line {verdicts[prompt, labeler, worse, better]}: the same labeler chose the other response"
        found.append((prompt, labeler, better, worse))
    for verdict in found:
        verdicts.setdefault(verdict, record["line"])
    return None


def summary(problems: list[tuple[int, str]], source: str, listed: int = 5) -> str:
    """One line on dropped records: how many, why, and where the first ones stand."""
    reasons = Counter(reason.split(" of line")[0].split(" line ")[0] for _, reason in problems)
    why = ", ".join(f"{count} × {reason}" for reason, count in reasons.most_common())
    lines = ", ".join(str(line) for line, _ in problems[:listed]) + (", …" if len(problems) > listed else "")
    return f"{source}: dropped {len(problems)} rankings ({why}; lines {lines})"

"""What the lead sees: progress, agreement, accuracy on calibration items, bias, disagreement. Computed from the labels alone."""

from __future__ import annotations

import json
import sqlite3
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations

from pipeline.data.labeler_agreement import LabelerAgreement
from pipeline.labeling.conversations import outcomes

RECENT_SECONDS = 3600.0


@dataclass(frozen=True)
class Judged:
    """One ranking by one labeler; lists in the order of the file."""

    item: int
    labeler: str
    ranks: list[int | None]
    shown: list[int]
    lengths: list[int]
    known: list[int | None] | None  # of a calibration item


@dataclass
class Share:
    """So many of so many."""

    count: float = 0.0
    total: int = 0

    def add(self, value: float) -> None:
        self.count += value
        self.total += 1

    @property
    def share(self) -> float | None:
        return self.count / self.total if self.total else None


@dataclass
class LabelerStatistics:
    """What one labeler did.

    Attributes:
        calibration: pairs of known order that they ordered alike; a tie counts half.
        first: strict preferences for what stood earlier on the page.
        longer: strict preferences for the longer response.
        agreement: share of equal judgements with other labelers, and Krippendorff's alpha over the pairs they judged.
    """

    labels: int = 0
    skips: int = 0
    recent: int = 0
    seconds: list[float] = field(default_factory=list)
    calibration: Share = field(default_factory=Share)
    first: Share = field(default_factory=Share)
    longer: Share = field(default_factory=Share)
    agreement: Share = field(default_factory=Share)
    alpha: float | None = None

    @property
    def median_seconds(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None


@dataclass
class Disagreement:
    """An item and the share of its pairs on which two labelers differ."""

    item: int
    file: str
    line: int
    labelers: int
    differing: float
    adjudicated: bool


@dataclass
class ProjectStatistics:
    """The whole of the lead's view."""

    items: int = 0
    complete: int = 0
    begun: int = 0
    labels: int = 0
    recent: int = 0
    skips: Counter[str] = field(default_factory=Counter)
    labelers: dict[str, LabelerStatistics] = field(default_factory=dict)
    agreement: float | None = None
    alpha: float | None = None
    judged_pairs: int = 0
    disagreements: list[Disagreement] = field(default_factory=list)
    chat: Counter[str] = field(default_factory=Counter)  # conversations, and turns by outcome


def project_statistics(connection: sqlite3.Connection, now: float, overlap: int) -> ProjectStatistics:
    """All statistics; labelers who are excluded altogether are left out.

    Args:
        overlap: labels that an item needs to be complete.
    """
    result = ProjectStatistics()
    result.items = connection.execute("SELECT count(*) FROM items WHERE calibration = 0 AND retired = 0").fetchone()[0]
    result.complete = connection.execute(
        "SELECT count(*) FROM (SELECT a.item FROM assignments a JOIN labelers r ON r.id = a.labeler "
        "JOIN items i ON i.id = a.item WHERE a.state = 'done' AND a.adjudication = 0 AND i.calibration = 0 "
        "AND r.excluded IS NOT 'altogether' GROUP BY a.item HAVING count(*) >= ?)",
        (overlap,),
    ).fetchone()[0]
    result.begun = connection.execute(
        "SELECT count(DISTINCT l.item) FROM labels l JOIN items i ON i.id = l.item "
        "WHERE l.current = 1 AND l.kind = 'label' AND i.calibration = 0"
    ).fetchone()[0]
    for row in connection.execute("SELECT name FROM labelers WHERE excluded IS NOT 'altogether' ORDER BY id"):
        result.labelers[row["name"]] = LabelerStatistics()
    judged = list(_count_labels(connection, result, now))
    for label in judged:
        _add_biases(result.labelers[label.labeler], label)
    regular = [label for label in judged if label.known is None]
    adjudicated = {
        row[0] for row in connection.execute("SELECT item FROM assignments WHERE adjudication = 1 AND state = 'done'")
    }
    _add_agreement(connection, result, regular, adjudicated)
    result.chat = outcomes(connection)
    return result


def _count_labels(connection: sqlite3.Connection, result: ProjectStatistics, now: float) -> Iterable[Judged]:
    """Count every label, and yield those that rank."""
    rows = connection.execute(
        "SELECT l.*, r.name, a.shown, a.adjudication, i.lengths, i.known FROM labels l JOIN labelers r ON r.id = l.labeler "
        "JOIN items i ON i.id = l.item JOIN assignments a ON a.item = l.item AND a.labeler = l.labeler "
        "WHERE l.current = 1 AND r.excluded IS NOT 'altogether' ORDER BY l.id"
    )
    for row in rows:
        labeler = result.labelers[row["name"]]
        if row["kind"] == "skip":
            labeler.skips += 1
            result.skips[json.loads(row["answer"])] += 1
            continue
        labeler.labels += 1
        labeler.seconds.append(row["seconds"])
        labeler.recent += row["at"] > now - RECENT_SECONDS
        result.labels += 1
        result.recent += row["at"] > now - RECENT_SECONDS
        ranks = json.loads(row["answer"])["ranks"]
        if ranks and not row["adjudication"]:
            yield Judged(
                item=row["item"],
                labeler=row["name"],
                ranks=ranks,
                shown=json.loads(row["shown"]),
                lengths=json.loads(row["lengths"]),
                known=json.loads(row["known"]) if row["known"] else None,
            )


def _pairs(ranks: Sequence[int | None]) -> dict[tuple[int, int], int]:
    """The judged pairs of a ranking: -1 the first is better, 1 the second, 0 a tie."""
    ranked = [(place, rank) for place, rank in enumerate(ranks) if rank is not None]
    return {(i, j): (a > b) - (a < b) for (i, a), (j, b) in combinations(ranked, 2)}


def _add_biases(labeler: LabelerStatistics, label: Judged) -> None:
    known = _pairs(label.known) if label.known else {}
    place = {response: position for position, response in enumerate(label.shown)}
    for (i, j), verdict in _pairs(label.ranks).items():
        if known.get((i, j)):
            labeler.calibration.add(1.0 if verdict == known[i, j] else 0.5 if verdict == 0 else 0.0)
        if verdict == 0:
            continue
        better, worse = (i, j) if verdict < 0 else (j, i)
        labeler.first.add(place[better] < place[worse])
        if label.lengths[better] != label.lengths[worse]:
            labeler.longer.add(label.lengths[better] > label.lengths[worse])


def _add_agreement(
    connection: sqlite3.Connection, result: ProjectStatistics, labels: Sequence[Judged], adjudicated: set[int]
) -> None:
    by_item: dict[int, list[Judged]] = defaultdict(list)
    for label in labels:
        by_item[label.item].append(label)
    shared = {item: judged for item, judged in by_item.items() if len(judged) > 1}
    overall = LabelerAgreement()
    by_labeler: dict[str, LabelerAgreement] = defaultdict(LabelerAgreement)
    differing: list[tuple[float, int, int]] = []
    for item, judged in shared.items():
        for label in judged:
            for agreement in (overall, *(by_labeler[other.labeler] for other in judged)):
                _add_ranking(agreement, label)
        if (share := _compare(result, judged)).total:
            differing.append((1 - share.count / share.total, item, len(judged)))
    if found := overall.result():
        result.agreement, result.alpha = found["pairwise"], found["krippendorff_alpha"]
        result.judged_pairs = found["judged_pairs"]
    for name, agreement in by_labeler.items():
        if found := agreement.result():
            result.labelers[name].alpha = found["krippendorff_alpha"]
    for share_differing, item, count in sorted(differing, reverse=True)[:30]:
        if share_differing > 0:
            row = connection.execute("SELECT file, line FROM items WHERE id = ?", (item,)).fetchone()
            result.disagreements.append(
                Disagreement(
                    item=item,
                    file=row["file"],
                    line=row["line"],
                    labelers=count,
                    differing=share_differing,
                    adjudicated=item in adjudicated,
                )
            )


def _add_ranking(agreement: LabelerAgreement, label: Judged) -> None:
    """Responses are known by their places in the file, and prompts by their items."""
    ranked = [(str(place), rank) for place, rank in enumerate(label.ranks) if rank is not None]
    agreement.add(
        label.item.to_bytes(16, "little"), label.labeler, [text for text, _ in ranked], [rank for _, rank in ranked]
    )


def _compare(result: ProjectStatistics, judged: Sequence[Judged]) -> Share:
    """Equal judgements among all pairs of an item's labelers, counted for both as well."""
    share = Share()
    for one, other in combinations(judged, 2):
        theirs = _pairs(other.ranks)
        for pair, verdict in _pairs(one.ranks).items():
            if pair in theirs:
                share.add(verdict == theirs[pair])
                result.labelers[one.labeler].agreement.add(verdict == theirs[pair])
                result.labelers[other.labeler].agreement.add(verdict == theirs[pair])
    return share

"""Labels to our records: rankings and demonstrations as JSONL. Lines that were written once are never changed."""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.labeling.answers import Answer
from pipeline.labeling.settings import Settings
from pipeline.labeling.store import Store

FOLDER = "export"
FILES = {"ranking": "rankings.jsonl", "demonstration": "demonstrations.jsonl"}


@dataclass(frozen=True)
class Label:
    """A label that counts, with its item.

    Attributes:
        shown: which response of the file stood at each place.
        at: when it was saved, seconds since 1970.
    """

    id: int
    item_key: str
    row: dict[str, Any]
    labeler: str
    answer: Answer
    shown: list[int]
    seconds: float
    at: float
    adjudication: bool


@dataclass(frozen=True)
class Exported:
    """What one export did; lines of each file before and added."""

    folder: Path
    before: dict[str, int]
    added: dict[str, int]
    excluded: int  # lines of labelers who are excluded altogether by now, which stay


def labels_to_export(connection: sqlite3.Connection) -> Iterator[Label]:
    """Labels in the order in which they came in; without calibration items and labelers who are excluded altogether."""
    rows = connection.execute(
        "SELECT l.id, i.key, i.row, r.name, l.answer, a.shown, l.seconds, l.at, a.adjudication FROM labels l "
        "JOIN items i ON i.id = l.item JOIN labelers r ON r.id = l.labeler "
        "JOIN assignments a ON a.item = l.item AND a.labeler = l.labeler "
        "WHERE l.current = 1 AND l.kind = 'label' AND i.calibration = 0 AND r.excluded IS NOT 'altogether' ORDER BY l.id"
    )
    for row in rows:
        yield Label(
            id=row["id"],
            item_key=row["key"],
            row=json.loads(row["row"]),
            labeler=row["name"],
            answer=Answer.from_json(row["answer"]),
            shown=json.loads(row["shown"]),
            seconds=row["seconds"],
            at=row["at"],
            adjudication=bool(row["adjudication"]),
        )


def export(store: Store, settings: Settings, folder: Path | None = None) -> Exported:
    """Append the labels that the files do not hold yet; from then on these labels cannot be edited.

    Args:
        folder: default is `export/` in the labeling folder. A new folder gets all labels.

    Raises:
        UserError: a file in it is none of ours.
    """
    folder = folder or store.folder / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:  # two exports at a time would write a line twice
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _export(store, settings, folder)


def _export(store: Store, settings: Settings, folder: Path) -> Exported:
    written = {kind: _written_ids(folder / name, store.project) for kind, name in FILES.items()}
    with store.transaction() as connection:  # locked first: a label is never edited after its line was written
        connection.execute(
            "UPDATE labels SET exported = 1 WHERE current = 1 AND exported = 0 AND kind = 'label' "
            "AND labeler NOT IN (SELECT id FROM labelers WHERE excluded = 'altogether')"
        )
    added = dict.fromkeys(FILES, 0)
    with store.reader() as connection, _appending(folder) as files:
        for label in labels_to_export(connection):
            for kind, record in _records(label, settings, store.project):
                if record["id"] not in written[kind]:
                    files[kind].write(json.dumps(record, ensure_ascii=False) + "\n")
                    added[kind] += 1
        excluded = {
            f"{store.project}-{row[0]}"
            for row in connection.execute(
                "SELECT l.id FROM labels l JOIN labelers r ON r.id = l.labeler WHERE r.excluded = 'altogether'"
            )
        }
    return Exported(
        folder=folder,
        before={kind: len(ids) for kind, ids in written.items()},
        added=added,
        excluded=sum(len(ids & excluded) for ids in written.values()),
    )


def ranking_record(label: Label, settings: Settings) -> dict[str, Any]:
    """A label as a row of the ranking format. Lists follow the order of the file; `shown` is the order of the page."""
    answer = label.answer
    record = {**label.row, "ranks": answer.ranks, "labeler": label.labeler}
    if answer.strength is not None:
        record |= {"margin": settings.margins[answer.strength - 1], "strength": answer.strength}
    if answer.both_bad:
        record["both_bad"] = True
    if any(value is not None for value in answer.quality):
        record["quality"] = answer.quality
    if settings.flags:
        record["flags"] = answer.flags
    return {**record, **_about(label)}


def demonstration_record(label: Label) -> dict[str, Any]:
    """The answer that a labeler wrote, as a demonstration."""
    others = {name: value for name, value in label.row.items() if name not in ("responses", "sources", "sampling")}
    return {**others, "response": label.answer.response, "labeler": label.labeler, **_about(label)}


def _about(label: Label) -> dict[str, Any]:
    time = datetime.datetime.fromtimestamp(label.at, datetime.UTC).isoformat(timespec="seconds")
    about: dict[str, Any] = {
        "item": label.row.get("id", label.item_key[:16]),
        "seconds": label.seconds,
        "labeled_at": time,
    }
    if label.shown:
        about["shown"] = label.shown
    return about | ({"adjudication": True} if label.adjudication else {})


def _records(label: Label, settings: Settings, project: str) -> Iterator[tuple[str, dict[str, Any]]]:
    number = {"id": f"{project}-{label.id}"}
    if label.answer.ranks:
        yield "ranking", {**ranking_record(label, settings), **number}
    if label.answer.response:
        yield "demonstration", {**demonstration_record(label), **number}


def _written_ids(path: Path, project: str) -> set[str]:
    """Ids of the lines that a file holds. A last line that a kill left half written is cut off."""
    if not path.exists():
        return set()
    ids: set[str] = set()
    end = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                break
            end += len(line)
            try:
                written = json.loads(line)["id"]
                if not written.startswith(f"{project}-"):
                    raise ValueError
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserError(
                    "is no export of this project; name another folder with --to", file=path, line=number
                ) from None
            ids.add(written)
    if end < path.stat().st_size:
        os.truncate(path, end)
    return ids


class _appending:
    """Open the files of an export for appending; synced to the disk when closed."""

    def __init__(self, folder: Path):
        self._folder = folder

    def __enter__(self) -> dict[str, Any]:
        self._files = {kind: (self._folder / name).open("a", encoding="utf-8") for kind, name in FILES.items()}
        return self._files

    def __exit__(self, *_: object) -> None:
        for kind, file in self._files.items():
            with file:
                file.flush()
                os.fsync(file.fileno())
            if not (self._folder / FILES[kind]).stat().st_size:
                (self._folder / FILES[kind]).unlink()

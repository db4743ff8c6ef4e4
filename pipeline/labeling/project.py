"""A labeling folder as a whole: its settings, its store, and the rows of its files in the store."""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.hashing import sha256_file
from pipeline.errors import UserError
from pipeline.labeling.assignment import recount_slots
from pipeline.labeling.items import Item, is_calibration, is_item_file, item_files, read_items
from pipeline.labeling.settings import Settings, read_settings
from pipeline.labeling.store import DATABASE, Store

logger = logging.getLogger(__name__)
_encode = json.JSONEncoder(ensure_ascii=False).encode
_INSERT = (
    "INSERT INTO items (key, file, line, calibration, known, slots, lengths, row) VALUES (?, ?, ?, ?, ?, ?, ?, ?) "
    "ON CONFLICT (key) DO UPDATE SET file = excluded.file, line = excluded.line, retired = 0, known = excluded.known, "
    "calibration = excluded.calibration, row = excluded.row"
)


@dataclass(frozen=True)
class Project:
    """An open labeling folder."""

    folder: Path
    settings: Settings
    store: Store


def open_project(folder: Path) -> Project:
    """Open a folder and bring its store up to date with its files.

    Raises:
        UserError: no rows, bad rows or settings, a damaged database, or rows that changed under their labels.
    """
    settings = read_settings(folder)
    files = rows_to_label(folder, settings)
    store = Store(folder)
    try:
        _read_files(store, files, settings)
    except BaseException:
        store.close()
        raise
    return Project(folder=folder, settings=settings, store=store)


def rows_to_label(folder: Path, settings: Settings) -> list[Path]:
    """The files of a folder that hold rows; none where labelers chat.

    Raises:
        UserError: none where there must be some, or some where there must be none.
    """
    if settings.mode != "chat":
        return item_files(folder)
    for path in sorted(folder.iterdir()):
        if is_item_file(path):
            raise UserError("with `mode: chat` no rows are labeled; move this file to a folder of its own", file=path)
    return []


def open_existing(folder: Path) -> Project:
    """Open a folder that was served or set up before, for what needs no rows.

    Raises:
        UserError: there is no database.
    """
    if not (folder / DATABASE).is_file():
        raise UserError("is no labeling folder yet; start it with `rlhf label FOLDER`", file=folder)
    return Project(folder=folder, settings=read_settings(folder), store=Store(folder))


def _read_files(store: Store, files: Sequence[Path], settings: Settings) -> None:
    """New and changed files to items, in one transaction; files known by their hash are not read again."""
    hashes = {path.name: sha256_file(path) for path in files}
    known = {row["name"]: row["sha256"] for row in store.connection.execute("SELECT name, sha256 FROM files")}
    changed = [path for path in files if known.get(path.name) != hashes[path.name]]
    gone = known.keys() - hashes.keys()
    overlap = str(settings.overlap)
    if not changed and not gone and store.meta("overlap") == overlap:
        return
    unchanged = hashes.keys() - {path.name for path in changed}
    with store.transaction() as connection:
        first_rows = connection.execute("SELECT NOT EXISTS (SELECT 1 FROM items)").fetchone()[0]
        connection.execute("CREATE TEMP TABLE present (key TEXT PRIMARY KEY) WITHOUT ROWID")
        for path in changed:
            _store_items(store, path, settings.overlap, unchanged)
            connection.execute("INSERT OR REPLACE INTO files VALUES (?, ?)", (path.name, hashes[path.name]))
        for name in [] if first_rows else [path.name for path in changed] + sorted(gone):
            _retire_missing(store, name)
        connection.executemany("DELETE FROM files WHERE name = ?", [(name,) for name in gone])
        connection.execute("DROP TABLE present")
        store.set_meta("overlap", overlap)
        if not first_rows:
            recount_slots(connection, settings.overlap)


def _store_items(store: Store, path: Path, overlap: int, unchanged: Collection[str]) -> None:
    connection = store.connection
    if connection.execute("SELECT NOT EXISTS (SELECT 1 FROM items)").fetchone()[0]:
        connection.executemany(_INSERT, (_values(item, path, overlap) for item in read_items(path)))
        connection.execute("INSERT INTO present SELECT key FROM items")
        return
    repeated = 0
    for item in read_items(path):
        row = connection.execute("SELECT * FROM items WHERE key = ?", (item.key,)).fetchone()
        read_before = connection.execute("SELECT 1 FROM present WHERE key = ?", (item.key,)).fetchone()
        if read_before or (row and not row["retired"] and row["file"] in unchanged):
            repeated += 1
            continue
        if row:
            _check_unchanged(store, row, item, path)
        connection.execute("INSERT INTO present VALUES (?)", (item.key,))
        connection.execute(_INSERT, _values(item, path, overlap))
    if repeated:
        logger.warning("%s: %d rows stand in another file too and are shown once", path, repeated)


def _values(item: Item, path: Path, overlap: int) -> tuple[str | int | None, ...]:
    return (
        item.key,
        path.name,
        item.line,
        is_calibration(path),
        json.dumps(item.known) if item.known else None,
        overlap,
        str([len(text) for text in item.row["responses"]]),
        _encode(item.row),
    )


def _check_unchanged(store: Store, row: sqlite3.Row, item: Item, path: Path) -> None:
    """
    Raises:
        UserError: an item has labels, and what they are labels of has changed.
    """
    labels = store.connection.execute("SELECT count(*) FROM labels WHERE item = ?", (row["id"],)).fetchone()[0]
    if not labels:
        return
    before = json.loads(row["row"])
    for name in ("sources", "sampling"):
        if before.get(name) != item.row.get(name):
            raise UserError(
                f"`{name}` of this row has changed since it was labeled ({labels} labels): another model; put the old "
                "file back, or label the new rows in a folder of their own",
                file=path,
                line=item.line,
            )
    known = json.loads(row["known"]) if row["known"] else None
    if bool(row["calibration"]) != is_calibration(path) or (is_calibration(path) and known != item.known):
        raise UserError(
            f"the known answer of this row has changed since it was labeled ({labels} labels); put the old file back",
            file=path,
            line=item.line,
        )


def _retire_missing(store: Store, name: str) -> None:
    """Items whose row is gone are not shown any more.

    Raises:
        UserError: they have labels, so this is a folder of other rows.
    """
    missing = "file = ? AND retired = 0 AND key NOT IN (SELECT key FROM present)"
    lost = store.connection.execute(
        f"SELECT count(*), min(line) FROM items WHERE {missing} AND id IN (SELECT item FROM labels WHERE current = 1)",
        (name,),
    ).fetchone()
    if lost[0]:
        raise UserError(
            f"{lost[0]} rows that were labeled are not in the folder any more (the first was line {lost[1]}); put the file "
            "back, or label other rows in a folder of their own. No label was changed",
            file=store.folder / name,
        )
    count = store.connection.execute(f"UPDATE items SET retired = 1 WHERE {missing}", (name,)).rowcount
    store.connection.execute(
        "UPDATE assignments SET state = 'expired' WHERE state = 'open' AND item IN (SELECT id FROM items WHERE retired = 1)"
    )
    if count:
        logger.warning("%s: %d rows without labels are gone and are not shown any more", store.folder / name, count)

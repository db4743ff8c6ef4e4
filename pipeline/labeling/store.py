"""The database of a labeling folder: SQLite in WAL mode, where a commit is on the disk before it is confirmed."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from pipeline.errors import UserError

logger = logging.getLogger(__name__)
DATABASE = "labels.sqlite3"
LOCK = "labels.lock"
_APPLICATION = 0x524C4846  # "RLHF": what SQLite's header calls our files
_VERSION = 2
_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE labelers (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, lead INTEGER NOT NULL,
    token_sha256 TEXT UNIQUE, excluded TEXT CHECK (excluded IN ('from_now', 'altogether'))
) STRICT;
CREATE TABLE files (name TEXT PRIMARY KEY, sha256 TEXT NOT NULL) STRICT;
CREATE TABLE items (
    id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, file TEXT NOT NULL, line INTEGER NOT NULL,
    calibration INTEGER NOT NULL, known TEXT, retired INTEGER NOT NULL DEFAULT 0,
    slots INTEGER NOT NULL,   -- labelers that the item still needs
    lengths TEXT NOT NULL,    -- characters of each response
    row TEXT NOT NULL
) STRICT;
CREATE INDEX items_open ON items (slots, id) WHERE slots > 0 AND calibration = 0 AND retired = 0;
CREATE INDEX items_calibration ON items (id) WHERE calibration = 1 AND retired = 0;
CREATE INDEX items_file ON items (file);
CREATE TABLE assignments (
    item INTEGER NOT NULL REFERENCES items, labeler INTEGER NOT NULL REFERENCES labelers,
    shown TEXT NOT NULL,      -- which response stood at each place
    state TEXT NOT NULL CHECK (state IN ('open', 'expired', 'done', 'skipped')),
    adjudication INTEGER NOT NULL, given REAL NOT NULL, expires REAL NOT NULL,
    PRIMARY KEY (item, labeler)
) STRICT, WITHOUT ROWID;
CREATE INDEX assignments_labeler ON assignments (labeler, state);
CREATE INDEX assignments_open ON assignments (expires) WHERE state = 'open';
-- Nothing is ever removed here: an edit, an undo or a skip is a row of its own, and one row per item and labeler is current.
CREATE TABLE labels (
    id INTEGER PRIMARY KEY AUTOINCREMENT, item INTEGER NOT NULL REFERENCES items,
    labeler INTEGER NOT NULL REFERENCES labelers, request TEXT NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('label', 'skip')), answer TEXT NOT NULL,
    seconds REAL NOT NULL, at REAL NOT NULL, current INTEGER NOT NULL, exported INTEGER NOT NULL DEFAULT 0,
    UNIQUE (labeler, request)
) STRICT;
CREATE UNIQUE INDEX labels_current ON labels (item, labeler) WHERE current = 1;
CREATE INDEX labels_labeler ON labels (labeler, id) WHERE current = 1;
CREATE TABLE drafts (
    item INTEGER NOT NULL, labeler INTEGER NOT NULL, draft TEXT NOT NULL, PRIMARY KEY (item, labeler)
) STRICT, WITHOUT ROWID;
"""
# Added by version 2.
_CHAT_SCHEMA = """
CREATE TABLE conversations (
    id INTEGER PRIMARY KEY AUTOINCREMENT, labeler INTEGER NOT NULL REFERENCES labelers,
    system TEXT NOT NULL, begun REAL NOT NULL, ended REAL
) STRICT;
CREATE UNIQUE INDEX conversations_open ON conversations (labeler) WHERE ended IS NULL;
CREATE TABLE turns (
    id INTEGER PRIMARY KEY AUTOINCREMENT, conversation INTEGER NOT NULL REFERENCES conversations,
    number INTEGER NOT NULL, request TEXT NOT NULL, question TEXT NOT NULL, at REAL NOT NULL,
    outcome TEXT NOT NULL CHECK (outcome IN ('waiting', 'answered', 'compared', 'identical', 'one_empty', 'empty', 'failed')),
    answer TEXT, source TEXT,  -- of the one answer, as JSON
    item INTEGER UNIQUE REFERENCES items,
    UNIQUE (conversation, number), UNIQUE (conversation, request)
) STRICT;
"""


class Store:
    """An open database, for one thread at a time.

    Args:
        folder: the labeling folder; the database is made where there is none.

    Raises:
        UserError: the file is no whole database of ours.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.path = folder / DATABASE
        self._open()
        self.project = self.meta("project")
        last = self.connection.execute(
            "SELECT max(coalesce((SELECT max(at) FROM labels), 0), coalesce((SELECT max(given) FROM assignments), 0))"
        ).fetchone()[0]
        self._clock = Clock(last)

    def _open(self) -> None:
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            self.connection = sqlite3.connect(self.path, timeout=10, isolation_level=None, check_same_thread=False)
            self.connection.row_factory = sqlite3.Row
            application = self.connection.execute("PRAGMA application_id").fetchone()[0]
            if (
                size
                and application == 0
                and self.connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            ):
                raise UserError("is another program's database; move it away", file=self.path)
            self.connection.execute("PRAGMA journal_mode = WAL")
            self.connection.execute("PRAGMA synchronous = FULL")  # a commit is on the disk when it returns
            self.connection.execute("PRAGMA foreign_keys = ON")
            self.connection.execute("PRAGMA cache_size = -65536")  # KiB
            self.connection.execute("PRAGMA temp_store = MEMORY")
            self.connection.execute("PRAGMA wal_autocheckpoint = 10000")  # pages; labelers wait while the log is merged
            if application == 0:
                self._create()
            self._check()
        except sqlite3.DatabaseError as error:
            if is_full(error):
                raise UserError("no space left on its disk; free some and start again", file=self.path) from error
            raise UserError(
                f"is no whole database ({error}); put a backup in its place, or save what can be read with "
                f"`sqlite3 {self.path.name} .recover`. Nothing was changed",
                file=self.path,
            ) from error

    def _create(self) -> None:
        """All of the schema or none of it."""
        self.connection.executescript(
            f"BEGIN IMMEDIATE; {_SCHEMA} {_CHAT_SCHEMA} INSERT INTO meta VALUES ('project', '{secrets.token_hex(4)}');"
            f"PRAGMA application_id = {_APPLICATION}; PRAGMA user_version = {_VERSION}; COMMIT;"
        )

    def _check(self) -> None:
        version = self.connection.execute("PRAGMA user_version").fetchone()[0]
        if version == 1:
            self._add_chat()
            version = self.connection.execute("PRAGMA user_version").fetchone()[0]
        if version != _VERSION:
            raise UserError(f"was written by another version of rlhf ({version}, here {_VERSION})", file=self.path)
        found = self.connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise sqlite3.DatabaseError(found)

    def _add_chat(self) -> None:
        """Bring a database of version 1 up to date; another process may just have done so."""
        with self.transaction() as connection:
            if connection.execute("PRAGMA user_version").fetchone()[0] == 1:
                for statement in _CHAT_SCHEMA.split(";"):
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {_VERSION}")

    def close(self) -> None:
        self.connection.close()

    def meta(self, key: str, default: str = "") -> str:
        row = self.connection.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return row["value"] if row else default

    def set_meta(self, key: str, value: str) -> None:
        self.connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def now(self) -> float:
        """Seconds since 1970; never less than what was recorded before."""
        return self._clock.now()

    @contextlib.contextmanager
    def transaction(self, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """All of the block or nothing of it.

        Args:
            durable: on the disk when the block has ended. Otherwise it survives the end of the process at once, and a loss of
                power from the next durable transaction on: the log is one sequence.
        """
        self.connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
        self.connection.execute("BEGIN IMMEDIATE")
        try:
            yield self.connection
            self.connection.execute("COMMIT")
        except BaseException:
            if self.connection.in_transaction:
                self.connection.execute("ROLLBACK")
            raise
        finally:
            self.connection.execute("PRAGMA synchronous = FULL")

    @contextlib.contextmanager
    def reader(self) -> Iterator[sqlite3.Connection]:
        """A connection of its own that only reads, for another thread."""
        connection = sqlite3.connect(f"{self.path.absolute().as_uri()}?mode=ro", uri=True, timeout=10)
        connection.row_factory = sqlite3.Row
        try:
            yield connection
        finally:
            connection.close()


class Clock:
    """Wall time that never goes back: where the computer's does, it goes on from the last time by the monotonic clock.

    Args:
        last: the latest time that was recorded.
        wall: reads the computer's clock.
    """

    def __init__(self, last: float, wall: Callable[[], float] = time.time):
        self._last, self._monotonic, self._wall, self._warned = last, time.monotonic(), wall, False

    def now(self) -> float:
        monotonic = time.monotonic()
        expected = self._last + monotonic - self._monotonic
        wall = self._wall()
        if wall < expected - 1 and not self._warned:
            self._warned = True
            logger.warning("the clock went back by %.0f s; times go on from the last label", expected - wall)
        self._last, self._monotonic = max(wall, expected), monotonic
        return self._last


def is_full(error: sqlite3.Error) -> bool:
    """Whether the disk has no room, or cannot be written any more."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY)


def lock_folder(folder: Path, address: str) -> IO[str]:
    """Keep other servers off the folder as long as the returned file is open.

    Raises:
        UserError: another server has it.
    """
    path = folder / LOCK
    file = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise UserError(
            f"is served already ({file.read().strip() or 'by another process'}); use that page, or stop it first",
            file=folder,
        ) from None
    file.seek(0)
    file.truncate()
    file.write(f"process {os.getpid()}, {address}\n")
    file.flush()
    return file


def served_at(folder: Path) -> str | None:
    """The address of the server that has the folder, if one has."""
    path = folder / LOCK
    if not path.is_file():
        return None
    with path.open("r+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read().strip().rpartition(" ")[2] or None
    return None

"""Who gets which item: reserved while it is open, shown in an order of the labeler's own, calibration items mixed in."""

from __future__ import annotations

import hashlib
import json
import random
import sqlite3
from dataclasses import dataclass
from typing import Any

from pipeline.labeling.refusal import Refused
from pipeline.labeling.settings import Settings
from pipeline.labeling.store import Store


@dataclass(frozen=True)
class Assignment:
    """An item in a labeler's hands.

    Attributes:
        shown: which response of the file stands at each place of the page.
        state: "open", "expired" (open once, given to others since), "done" or "skipped".
        adjudication: given to a lead who judges beside the others.
    """

    item: int
    row: dict[str, Any]
    shown: list[int]
    state: str
    given: float
    adjudication: bool


def recount_slots(connection: sqlite3.Connection, overlap: int, item: int | None = None) -> None:
    """How many labelers items still need: the overlap without those who have done it or hold it open.

    Skips, adjudications and labels of labelers who are excluded altogether do not count.
    """
    where, values = ("", (overlap,)) if item is None else (" WHERE id = ?", (overlap, item))
    connection.execute(
        "UPDATE items SET slots = ? - (SELECT count(*) FROM assignments a JOIN labelers l ON l.id = a.labeler "
        "WHERE a.item = items.id AND a.adjudication = 0 AND a.state IN ('open', 'done') "
        f"AND l.excluded IS NOT 'altogether'){where}",
        values,
    )


def current_assignment(store: Store, settings: Settings, labeler: int) -> Assignment | None:
    """The item that a labeler works on: the open one, else a new one; None where nothing is left for them."""
    _release_expired(store, settings)
    row = store.connection.execute(
        "SELECT item FROM assignments WHERE labeler = ? AND state = 'open' ORDER BY given DESC, item LIMIT 1",
        (labeler,),
    ).fetchone()
    item = row["item"] if row else _next_item(store, settings, labeler)
    if item is None:
        return None
    with store.transaction(durable=False) as connection:  # a label that is confirmed later brings it to the disk
        give(store, settings, labeler=labeler, item=item)
        recount_slots(connection, settings.overlap, item)
    return own_assignment(store, labeler, item)


def own_assignment(store: Store, labeler: int, item: int) -> Assignment:
    """An item that the labeler was given.

    Raises:
        Refused: it never was.
    """
    row = store.connection.execute(
        "SELECT a.*, i.row FROM assignments a JOIN items i ON i.id = a.item WHERE a.labeler = ? AND a.item = ?",
        (labeler, item),
    ).fetchone()
    if row is None:
        raise Refused(409, "This item was not given to you.")
    return Assignment(
        item=item,
        row=json.loads(row["row"]),
        shown=json.loads(row["shown"]),
        state=row["state"],
        given=row["given"],
        adjudication=bool(row["adjudication"]),
    )


def adjudicate(store: Store, settings: Settings, labeler: int, item: int) -> Assignment:
    """Give an item to a lead, beyond the overlap; an item that they labeled stays as it is."""
    if not store.connection.execute("SELECT 1 FROM items WHERE id = ?", (item,)).fetchone():
        raise Refused(404, "There is no such item.")
    known = store.connection.execute(
        "SELECT 1 FROM assignments WHERE labeler = ? AND item = ?", (labeler, item)
    ).fetchone()
    if not known:
        with store.transaction():
            give(store, settings, labeler=labeler, item=item, adjudication=True)
    return own_assignment(store, labeler, item)


def give(store: Store, settings: Settings, *, labeler: int, item: int, adjudication: bool = False) -> None:
    """Note that a labeler holds an item, or holds it for longer. The order shown stays as it was first."""
    count = len(json.loads(store.connection.execute("SELECT lengths FROM items WHERE id = ?", (item,)).fetchone()[0]))
    shown = list(range(count))
    seed = hashlib.sha256(f"{store.project} {labeler} {item}".encode()).digest()
    random.Random(seed).shuffle(shown)
    now = store.now()
    store.connection.execute(
        "INSERT INTO assignments VALUES (?, ?, ?, 'open', ?, ?, ?) "
        "ON CONFLICT (item, labeler) DO UPDATE SET expires = excluded.expires, state = 'open'",
        (item, labeler, json.dumps(shown), adjudication, now, now + settings.reserve_minutes * 60),
    )


def _next_item(store: Store, settings: Settings, labeler: int) -> int | None:
    done = store.connection.execute(
        "SELECT count(*) FROM labels WHERE labeler = ? AND current = 1", (labeler,)
    ).fetchone()[0]
    regular, calibration = _regular_item, _calibration_item
    first, second = (
        (calibration, regular) if _calibration_turn(store, settings, labeler, done) else (regular, calibration)
    )
    item = first(store, labeler)
    # Calibration items only come among others: when those are through, so is the labeler.
    return second(store, labeler) if item is None and second is regular else item


def _calibration_turn(store: Store, settings: Settings, labeler: int, done: int) -> bool:
    """One place in each block of `calibration_every` items, which the labeler cannot foresee."""
    block, place = divmod(done, settings.calibration_every)
    seed = hashlib.sha256(f"{store.project} {labeler} block {block}".encode()).digest()
    return place == int.from_bytes(seed[:8], "big") % settings.calibration_every


def _regular_item(store: Store, labeler: int) -> int | None:
    """Items that others have begun come first, then the order of the files."""
    row = store.connection.execute(
        "SELECT id FROM items WHERE slots > 0 AND calibration = 0 AND retired = 0 "
        "AND NOT EXISTS (SELECT 1 FROM assignments WHERE item = id AND labeler = ? AND state <> 'expired') "
        "ORDER BY slots, id LIMIT 1",
        (labeler,),
    ).fetchone()
    return row["id"] if row else None


def _calibration_item(store: Store, labeler: int) -> int | None:
    row = store.connection.execute(
        "SELECT id FROM items WHERE calibration = 1 AND retired = 0 "
        "AND NOT EXISTS (SELECT 1 FROM assignments WHERE item = id AND labeler = ? AND state <> 'expired') "
        "ORDER BY id LIMIT 1",
        (labeler,),
    ).fetchone()
    return row["id"] if row else None


def _release_expired(store: Store, settings: Settings) -> None:
    """Items that were kept for somebody for too long go back to all; the draft stays."""
    now = store.now()
    expired = store.connection.execute(
        "SELECT item, labeler FROM assignments WHERE state = 'open' AND expires < ?", (now,)
    ).fetchall()
    if not expired:
        return
    with store.transaction(durable=False) as connection:
        connection.executemany(
            "UPDATE assignments SET state = 'expired' WHERE item = ? AND labeler = ?", [tuple(row) for row in expired]
        )
        for row in expired:
            recount_slots(connection, settings.overlap, row["item"])

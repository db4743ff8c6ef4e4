"""Labels as they come in: saved once each, edited, undone, skipped, drafted."""

from __future__ import annotations

import json
import re
import sqlite3
from dataclasses import dataclass
from typing import Any

from pipeline.labeling.answers import Answer, as_shown, parse_answer, seconds_on_task
from pipeline.labeling.assignment import Assignment, give, own_assignment, recount_slots
from pipeline.labeling.refusal import Refused
from pipeline.labeling.settings import Settings
from pipeline.labeling.store import Store

MAX_DRAFT_CHARACTERS = 500_000
WENT_ON = "The conversation has gone on or ended since this choice, so it cannot be changed any more."
_REQUEST = re.compile(r"[\w-]{8,64}")
# Whether `item` is a comparison in a chat that has gone on or ended since.
_WENT_ON_SINCE = (
    "EXISTS (SELECT 1 FROM turns t JOIN conversations c ON c.id = t.conversation WHERE t.item = {item} AND (c.ended "
    "IS NOT NULL OR EXISTS (SELECT 1 FROM turns later WHERE later.conversation = c.id AND later.number > t.number)))"
)


@dataclass(frozen=True)
class Submission:
    """What the page sends for one item.

    Attributes:
        request: a name that the page makes for each submission; sent again, it is the same submission.
        replaces: the label that this one replaces, 0 for the first.
        raw: the answer as the page has it, or the reason of a skip.
    """

    item: int
    request: str
    replaces: int
    raw: Any
    seconds: Any


def submit(store: Store, settings: Settings, labeler: int, submission: Submission) -> int:
    """Save a label and return its number; it is on the disk then.

    Raises:
        Refused: no answer to this item, not the labeler's item, labeled already, or exported already.
    """
    if saved := _sent_before(store, labeler, submission):
        return saved
    assignment = own_assignment(store, labeler, submission.item)
    answer = parse_answer(submission.raw, assignment.shown, settings)
    return _save(
        store,
        settings,
        labeler=labeler,
        assignment=assignment,
        submission=submission,
        kind="label",
        answer=answer.to_json(),
    )


def skip(store: Store, settings: Settings, labeler: int, submission: Submission) -> int:
    """Note that the labeler skips the item, and why."""
    if saved := _sent_before(store, labeler, submission):
        return saved
    reason = submission.raw
    if not isinstance(reason, str) or not reason.strip() or len(reason) > 500:
        raise Refused(422, "Say why you skip it, in up to 500 characters.")
    assignment = own_assignment(store, labeler, submission.item)
    return _save(
        store,
        settings,
        labeler=labeler,
        assignment=assignment,
        submission=submission,
        kind="skip",
        answer=json.dumps(reason),
    )


def check_request(name: Any) -> None:
    if not isinstance(name, str) or not _REQUEST.fullmatch(name):
        raise Refused(422, "A submission needs a name of its own (`request`).")


def _sent_before(store: Store, labeler: int, submission: Submission) -> int | None:
    """The label that this very submission made, where its confirmation was lost on the way."""
    check_request(submission.request)
    row = store.connection.execute(
        "SELECT id, item FROM labels WHERE labeler = ? AND request = ?", (labeler, submission.request)
    ).fetchone()
    if row is not None and row["item"] != submission.item:
        raise Refused(409, "This submission was sent before, for another item.")
    return row["id"] if row else None


def went_on(connection: sqlite3.Connection, item: int) -> bool:
    """Whether the item is a comparison in a chat that has gone on or ended since."""
    return bool(connection.execute(f"SELECT {_WENT_ON_SINCE.format(item='?')}", (item,)).fetchone()[0])


def _check_last(connection: sqlite3.Connection, item: int, labeler: int) -> None:
    """The labeler whose conversation went on cannot choose otherwise; a lead still may judge it."""
    row = connection.execute(
        "SELECT adjudication FROM assignments WHERE item = ? AND labeler = ?", (item, labeler)
    ).fetchone()
    if went_on(connection, item) and not row["adjudication"]:
        raise Refused(409, WENT_ON)


def _save(
    store: Store,
    settings: Settings,
    *,
    labeler: int,
    assignment: Assignment,
    submission: Submission,
    kind: str,
    answer: str,
) -> int:
    now = store.now()
    seconds = seconds_on_task(submission.seconds, now - assignment.given)
    with store.transaction() as connection:
        current = current_label(connection, labeler, assignment.item)
        _check_replaces(current, submission.replaces)
        _check_last(connection, assignment.item, labeler)
        if current is not None:
            connection.execute("UPDATE labels SET current = 0 WHERE id = ?", (current["id"],))
        number = connection.execute(
            "INSERT INTO labels (item, labeler, request, kind, answer, seconds, at, current) VALUES (?, ?, ?, ?, ?, ?, ?, 1)",
            (assignment.item, labeler, submission.request, kind, answer, seconds, now),
        ).lastrowid
        connection.execute(
            "UPDATE assignments SET state = ? WHERE item = ? AND labeler = ?",
            ("done" if kind == "label" else "skipped", assignment.item, labeler),
        )
        connection.execute("DELETE FROM drafts WHERE item = ? AND labeler = ?", (assignment.item, labeler))
        recount_slots(connection, settings.overlap, assignment.item)
    assert number is not None
    return number


def current_label(connection: sqlite3.Connection, labeler: int, item: int) -> sqlite3.Row | None:
    row: sqlite3.Row | None = connection.execute(
        "SELECT * FROM labels WHERE item = ? AND labeler = ? AND current = 1", (item, labeler)
    ).fetchone()
    return row


def _check_replaces(current: sqlite3.Row | None, replaces: int) -> None:
    if current is None and replaces:
        raise Refused(409, "This label was undone in the meantime, perhaps in another window. Load the page again.")
    if current is not None and current["id"] != replaces:
        raise Refused(
            409, "You have labeled this item already, perhaps in another window. Go back to it to change your label."
        )
    if current is not None and current["exported"]:
        raise Refused(409, "This label was exported already and cannot be changed any more. Tell the lead.")


def undo(store: Store, settings: Settings, labeler: int, label: int) -> int:
    """Take a label or skip back: its item is open again, with the label as the draft. Returns the item."""
    with store.transaction() as connection:
        row = connection.execute("SELECT * FROM labels WHERE id = ? AND labeler = ?", (label, labeler)).fetchone()
        if row is None:
            raise Refused(404, "There is no such label of yours.")
        if row["exported"]:
            raise Refused(409, "This label was exported already and cannot be changed any more. Tell the lead.")
        item = int(row["item"])
        if not row["current"] and current_label(connection, labeler, item) is not None:
            raise Refused(409, "This label was changed in the meantime. Load the page again.")
        _check_last(connection, item, labeler)
        if row["current"]:
            connection.execute("UPDATE labels SET current = 0 WHERE id = ?", (label,))
            shown = own_assignment(store, labeler, item).shown
            if row["kind"] == "label":
                draft = as_shown(Answer.from_json(row["answer"]), shown)
                connection.execute("INSERT OR REPLACE INTO drafts VALUES (?, ?, ?)", (item, labeler, json.dumps(draft)))
            give(store, settings, labeler=labeler, item=item)
            connection.execute(
                "UPDATE assignments SET given = ? WHERE item = ? AND labeler = ?", (store.now(), item, labeler)
            )  # so that it comes before other open items
            recount_slots(connection, settings.overlap, item)
    return item


def save_draft(store: Store, labeler: int, item: int, draft: Any) -> None:
    """Keep what the page holds, whatever it is; it comes back when the item is opened again."""
    own_assignment(store, labeler, item)
    text = json.dumps(draft)
    if len(text) > MAX_DRAFT_CHARACTERS:
        raise Refused(413, "The draft is too long to be kept.")
    with store.transaction(durable=False) as connection:
        connection.execute("INSERT OR REPLACE INTO drafts VALUES (?, ?, ?)", (item, labeler, text))


def draft_of(store: Store, labeler: int, item: int) -> Any:
    row = store.connection.execute(
        "SELECT draft FROM drafts WHERE item = ? AND labeler = ?", (item, labeler)
    ).fetchone()
    return json.loads(row["draft"]) if row else None


def history(store: Store, labeler: int, most: int = 200) -> list[dict[str, Any]]:
    """A labeler's own labels, the newest first."""
    rows = store.connection.execute(
        f"SELECT l.id, l.item, l.kind, l.exported, {_WENT_ON_SINCE.format(item='l.item')} AS went_on FROM labels l "
        "WHERE l.labeler = ? AND l.current = 1 ORDER BY l.id DESC LIMIT ?",
        (labeler, most),
    )
    return [{**row, "went_on": bool(row["went_on"])} for row in map(dict, rows)]

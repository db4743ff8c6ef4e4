"""Who may label: names, and personal links whose tokens are kept as hashes only."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import sqlite3
from dataclasses import dataclass

from pipeline.errors import UserError, shorten
from pipeline.labeling.assignment import recount_slots
from pipeline.labeling.refusal import Refused
from pipeline.labeling.store import Store

_NAME = re.compile(r"[\w][\w .@+-]{0,63}")


@dataclass(frozen=True)
class Labeler:
    """A person who labels; a lead also sees everybody's labels."""

    id: int
    name: str
    lead: bool
    excluded: str | None


def add_labeler(store: Store, name: str, lead: bool = False) -> str:
    """A new labeler's token. It is shown once: the store keeps its hash.

    Raises:
        UserError: the name is taken or cannot be a name.
    """
    check_name(name)
    token = _new_token(store)
    try:
        with store.transaction() as connection:
            connection.execute(
                "INSERT INTO labelers (name, lead, token_sha256) VALUES (?, ?, ?)", (name, lead, hash_token(token))
            )
    except sqlite3.IntegrityError:
        raise UserError(f"labeler {name!r} exists; `rlhf label users link {name}` makes a new link") from None
    return token


def renew_token(store: Store, name: str) -> str:
    """A new token for a labeler; the old one is worth nothing from now on."""
    token = _new_token(store)
    with store.transaction() as connection:
        changed = connection.execute("UPDATE labelers SET token_sha256 = ? WHERE name = ?", (hash_token(token), name))
    if not changed.rowcount:
        raise UserError(f"no labeler {name!r}; `rlhf label users list` names them")
    return token


def check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise UserError(f"{shorten(name)} cannot be a labeler's name; use up to 64 letters, digits, spaces, . @ + - _")


def labelers(store: Store) -> list[Labeler]:
    return [_labeler(row) for row in store.connection.execute("SELECT * FROM labelers ORDER BY id")]


def set_excluded(store: Store, name: str, excluded: str | None, overlap: int) -> None:
    """Let a labeler label again (None), no more ("from_now"), or no more and drop their labels too ("altogether").

    Labels stay in the database; those of a labeler excluded altogether are not exported and count nowhere.
    """
    with store.transaction() as connection:
        changed = connection.execute("UPDATE labelers SET excluded = ? WHERE name = ?", (excluded, name))
        if not changed.rowcount:
            raise UserError(f"no labeler {name!r}; `rlhf label users list` names them")
        if excluded:
            connection.execute(
                "UPDATE assignments SET state = 'expired' WHERE state = 'open' "
                "AND labeler = (SELECT id FROM labelers WHERE name = ?)",
                (name,),
            )
        recount_slots(connection, overlap)


def authenticate(store: Store, token: str) -> Labeler:
    """Whose token it is; compared in constant time with every hash.

    Raises:
        Refused: nobody's, of another project, or of somebody excluded.
    """
    project = token.partition("-")[0]
    if re.fullmatch(r"[0-9a-f]{8}", project) and project != store.project:
        raise Refused(403, "This link belongs to another labeling project. Ask the lead for a link to this one.")
    digest, holder = hash_token(token), None
    for number, stored in store.connection.execute(
        "SELECT id, token_sha256 FROM labelers WHERE token_sha256 IS NOT NULL"
    ):
        if hmac.compare_digest(stored, digest):
            holder = number
    match = store.connection.execute("SELECT * FROM labelers WHERE id = ?", (holder,)).fetchone()
    if match is None:
        raise Refused(403, "This link is not valid, or not any more. Ask the lead for a new one.")
    if match["excluded"]:
        raise Refused(
            403, "The lead has ended your work in this project. Thank you. Ask the lead if this is a mistake."
        )
    return _labeler(match)


def hash_token(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()


def _new_token(store: Store) -> str:
    return f"{store.project}-{secrets.token_urlsafe(24)}"


def _labeler(row: sqlite3.Row) -> Labeler:
    return Labeler(id=row["id"], name=row["name"], lead=bool(row["lead"]), excluded=row["excluded"])

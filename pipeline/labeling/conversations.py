"""Conversations of labelers with a model, in the database: every question is kept before it is answered.

A question that gets two answers makes an item of its own, so that drafts, labels, statistics and exports are those of rows.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.data.files import RecordError
from pipeline.data.messages import Message
from pipeline.data.records import parse_ranking
from pipeline.labeling.answers import Answer, check_written
from pipeline.labeling.assignment import give, own_assignment
from pipeline.labeling.labels import check_request, current_label
from pipeline.labeling.refusal import Refused
from pipeline.labeling.settings import Settings
from pipeline.labeling.store import Store

FILE = "chat"  # what stands in the place of an item's file
NOTES = {
    "identical": "two answers were the same, so there was nothing to compare",
    "one_empty": "a second answer was empty, so there was nothing to compare",
}
CUT_OFF = "cut off at its longest"
ELSEWHERE = "This conversation has gone on or ended, perhaps in another window. Load the page again."


@dataclass(frozen=True)
class Turn:
    """A question and what came of it.

    Attributes:
        outcome: "waiting" for its answers; "answered"; "compared" (two answers, `item`); "identical" or "one_empty" (two,
            of which one is left); "empty" (not part of the conversation); "failed" (likewise; `answer` says why).
        source: of the one answer.
    """

    id: int
    conversation: int
    number: int
    question: str
    outcome: str
    answer: str | None
    source: dict[str, Any] | None
    item: int | None


@dataclass(frozen=True)
class Conversation:
    """The conversation that a labeler is in, with its turns."""

    id: int
    labeler: int
    system: str
    turns: list[Turn]


@dataclass(frozen=True)
class Written:
    """An answer as a model wrote it. source: model, hashes, temperature, seed, and whether it finished."""

    text: str
    source: dict[str, Any]


def open_conversation(store: Store, settings: Settings, labeler: int) -> Conversation:
    """The labeler's conversation; a new one where none is open."""
    row = store.connection.execute(
        "SELECT * FROM conversations WHERE labeler = ? AND ended IS NULL", (labeler,)
    ).fetchone()
    if row is None:
        with store.transaction(durable=False) as connection:
            values = (labeler, settings.system.strip(), store.now())
            connection.execute("INSERT INTO conversations (labeler, system, begun) VALUES (?, ?, ?)", values)
        return open_conversation(store, settings, labeler)
    return _with_turns(store, row)


def conversation_of(store: Store, turn: int) -> Conversation:
    """The conversation that a turn belongs to."""
    row = store.connection.execute(
        "SELECT c.* FROM conversations c JOIN turns t ON t.conversation = c.id WHERE t.id = ?", (turn,)
    ).fetchone()
    return _with_turns(store, row)


def owner(store: Store, turn: int) -> int | None:
    """The labeler who asked."""
    row = store.connection.execute(
        "SELECT c.labeler FROM conversations c JOIN turns t ON t.conversation = c.id WHERE t.id = ?", (turn,)
    ).fetchone()
    return row["labeler"] if row else None


def _with_turns(store: Store, row: sqlite3.Row) -> Conversation:
    turns = store.connection.execute("SELECT * FROM turns WHERE conversation = ? ORDER BY number", (row["id"],))
    return Conversation(
        id=row["id"], labeler=row["labeler"], system=row["system"], turns=[_turn(turn) for turn in turns]
    )


def _turn(row: sqlite3.Row) -> Turn:
    return Turn(
        id=row["id"],
        conversation=row["conversation"],
        number=row["number"],
        question=row["question"],
        outcome=row["outcome"],
        answer=row["answer"],
        source=json.loads(row["source"]) if row["source"] else None,
        item=row["item"],
    )


# ------------------------------------------------------------------------------------------------ what labelers do


@dataclass(frozen=True)
class Question:
    """What the page sends. number: of the turn that the labeler saw coming."""

    conversation: int
    number: int
    request: str
    text: Any


def ask(store: Store, settings: Settings, labeler: int, question: Question) -> int:
    """Save a question and return its turn; it is on the disk then.

    Raises:
        Refused: no question, the conversation is elsewhere, an answer or a choice is due, or it has all its turns.
    """
    check_request(question.request)
    conversation = open_conversation(store, settings, labeler)
    sent = store.connection.execute(
        "SELECT t.id FROM turns t JOIN conversations c ON c.id = t.conversation WHERE c.labeler = ? AND t.request = ?",
        (labeler, question.request),
    ).fetchone()
    if sent:
        return int(sent["id"])
    if question.conversation != conversation.id or question.number != len(conversation.turns) + 1:
        raise Refused(409, ELSEWHERE)
    _check_nothing_due(store, conversation)
    if question.number > settings.max_turns:
        raise Refused(409, "This conversation has all its turns. Begin a new one.")
    if not isinstance(question.text, str) or not question.text.strip():
        raise Refused(422, "Write a question.")
    check_written(question.text, "question", settings)
    with store.transaction() as connection:
        number = connection.execute(
            "INSERT INTO turns (conversation, number, request, question, at, outcome) VALUES (?, ?, ?, ?, ?, 'waiting')",
            (conversation.id, question.number, question.request, question.text, store.now()),
        ).lastrowid
    assert number is not None
    return number


def end_conversation(store: Store, settings: Settings, labeler: int, number: int) -> None:
    """End a conversation, so that the next question begins another; one that has ended already stays so."""
    conversation = open_conversation(store, settings, labeler)
    if number == conversation.id and conversation.turns:
        _check_nothing_due(store, conversation)
        with store.transaction() as connection:
            connection.execute("UPDATE conversations SET ended = ? WHERE id = ?", (store.now(), number))


def undecided(store: Store, conversation: Conversation) -> Turn | None:
    """The last turn, where its two answers are still to be compared."""
    last = conversation.turns[-1] if conversation.turns else None
    if last is None or last.item is None or current_label(store.connection, conversation.labeler, last.item):
        return None
    return last


def _check_nothing_due(store: Store, conversation: Conversation) -> None:
    if conversation.turns and conversation.turns[-1].outcome == "waiting":
        raise Refused(409, "The last question is still being answered.")
    if undecided(store, conversation):
        raise Refused(409, "Compare the two answers first, or skip them.")


# ------------------------------------------------------------------------------------------------ what was said


def messages(store: Store, conversation: Conversation) -> list[dict[str, str]]:
    """What was said so far, as {role, content} and what the page says of an answer (`note`).

    The last question is part of it while its answers are due or compared; one without an answer is not.
    """
    said = [{"role": "system", "content": conversation.system}] if conversation.system else []
    for turn in conversation.turns:
        answer = _answer(store, conversation.labeler, turn)
        due = turn.outcome == "waiting" or turn.item is not None
        if answer is not None or due:
            said.append({"role": "user", "content": turn.question})
        if answer is not None:
            said.append({"role": "assistant", **answer})
    return said


def _answer(store: Store, labeler: int, turn: Turn) -> dict[str, str] | None:
    """The answer from which the conversation goes on after a turn."""
    if turn.item is None:
        if turn.outcome not in ("answered", *NOTES):
            return None
        notes = [NOTES.get(turn.outcome, ""), CUT_OFF if turn.source and not turn.source["finished"] else ""]
        return {"content": turn.answer or "", "note": "; ".join(filter(None, notes))}
    label = current_label(store.connection, labeler, turn.item)
    if label is None:
        return None
    assignment = own_assignment(store, labeler, turn.item)
    chosen, note = assignment.shown[0], "skipped; the conversation goes on from answer A"
    if label["kind"] == "label":
        ranks = Answer.from_json(label["answer"]).ranks
        chosen = min(assignment.shown, key=lambda place: ranks[place] or len(ranks))  # of a tie, the first shown
        note = (
            "a tie; the conversation goes on from answer A" if ranks[0] == ranks[1] else "the better one of two answers"
        )
    return {"content": assignment.row["responses"][chosen], "note": note}


def dialogue(store: Store, conversation: Conversation) -> list[Message]:
    """What was said, as the model reads it."""
    return [{"role": said["role"], "content": said["content"]} for said in messages(store, conversation)]


# ------------------------------------------------------------------------------------------------ what the model wrote


def samples(settings: Settings, turn: Turn) -> list[int]:
    """Which model writes each of a turn's answers."""
    if turn.number % settings.compare_every:
        return [0]
    return [0, len(settings.model) - 1]


def seed_of(store: Store, turn: Turn, sample: int) -> int:
    """The same after a restart, so that an answer that a kill cut short is written again."""
    digest = hashlib.sha256(f"{store.project} {turn.id} {sample}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def save_failure(store: Store, turn: Turn, reason: str) -> None:
    with store.transaction() as connection:
        connection.execute("UPDATE turns SET outcome = 'failed', answer = ? WHERE id = ?", (reason, turn.id))


def save_answers(store: Store, settings: Settings, turn: Turn, answers: Sequence[Written]) -> None:
    """One answer to the turn, or two as an item to compare; what cannot be compared is counted by the outcome."""
    written = [answer for answer in answers if answer.text.strip()]
    if not written:
        _save_one(store, turn, "empty", None)
    elif len(answers) == 1:
        _save_one(store, turn, "answered", written[0])
    elif len(written) == 1:
        _save_one(store, turn, "one_empty", written[0])
    elif written[0].text == written[1].text:
        _save_one(store, turn, "identical", written[0])
    else:
        _save_pair(store, settings, turn, written)


def _save_one(store: Store, turn: Turn, outcome: str, answer: Written | None) -> None:
    values = (outcome, answer and answer.text, answer and json.dumps(answer.source), turn.id)
    with store.transaction() as connection:
        connection.execute("UPDATE turns SET outcome = ?, answer = ?, source = ? WHERE id = ?", values)


def _save_pair(store: Store, settings: Settings, turn: Turn, answers: Sequence[Written]) -> None:
    conversation = conversation_of(store, turn.id)
    prompt = dialogue(store, conversation)
    row: dict[str, Any] = {
        "prompt": prompt[0]["content"] if len(prompt) == 1 else prompt,
        "responses": [answer.text for answer in answers],
        "sources": [answer.source for answer in answers],
        "sampling": {"max_new_tokens": settings.max_tokens},
        "conversation": f"{store.project}-{conversation.id}",
        "turn": turn.number,
    }
    try:
        parse_ranking({**row, "ranks": [1, 1]})
    except RecordError as error:
        save_failure(store, turn, f"These answers could not be kept ({error}).")
        return
    key = hashlib.sha256(f"{store.project} turn {turn.id}".encode()).hexdigest()
    lengths = str([len(answer.text) for answer in answers])
    with store.transaction() as connection:
        item = connection.execute(
            "INSERT INTO items (key, file, line, calibration, slots, lengths, row) VALUES (?, ?, ?, 0, 0, ?, ?)",
            (key, f"{FILE} {conversation.id}", turn.number, lengths, json.dumps(row, ensure_ascii=False)),
        ).lastrowid
        assert item is not None
        give(store, settings, labeler=conversation.labeler, item=item)
        connection.execute("UPDATE turns SET outcome = 'compared', item = ? WHERE id = ?", (item, turn.id))


# ------------------------------------------------------------------------------------------------ counts


def outcomes(connection: sqlite3.Connection) -> Counter[str]:
    """How many turns came to what; `conversations` counts those with a turn."""
    counts = Counter(dict(connection.execute("SELECT outcome, count(*) FROM turns GROUP BY outcome").fetchall()))
    counts["conversations"] = connection.execute("SELECT count(DISTINCT conversation) FROM turns").fetchone()[0]
    return counts

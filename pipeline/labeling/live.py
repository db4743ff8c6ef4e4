"""Live chat on the labeling page: a thread that lets the models answer, and the requests of the page."""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pipeline.data.messages import Message
from pipeline.errors import UserError
from pipeline.labeling import conversations
from pipeline.labeling.assignment import own_assignment
from pipeline.labeling.conversations import Conversation, Question, Turn, Written
from pipeline.labeling.labelers import Labeler
from pipeline.labeling.project import Project
from pipeline.labeling.refusal import Refused
from pipeline.labeling.requests import in_store, json_body, whole_number
from pipeline.labeling.settings import setting_error
from pipeline.labeling.store import Store
from pipeline.labeling.work import done, item_work

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

logger = logging.getLogger(__name__)
FAILED = "The model failed on this question; the lead finds why in server.log."
RETRY_SECONDS = 3.0


class Reply(Protocol):
    """An answer: iterate over it for its text, in pieces. ended: then "stop", "length" or "interrupted"."""

    ended: str

    def __iter__(self) -> Iterator[str]: ...

    def stop(self) -> None: ...


class Models(Protocol):
    """One or two models.

    sources: what is written beside the answers of each. identities: hashes of all that determines their answers.
    """

    @property
    def sources(self) -> Sequence[dict[str, Any]]: ...

    @property
    def identities(self) -> Sequence[dict[str, Any]]: ...

    def reply(self, model: int, messages: Sequence[Message], seed: int) -> Reply:
        """
        Raises:
            UserError: the template refuses the dialogue, or it is too long.
        """
        ...


def check_models(store: Store, identities: Sequence[dict[str, Any]], folder: Path) -> None:
    """Refuse other models than those that conversations were held with; note them where there are none yet.

    Raises:
        UserError: they have changed.
    """
    now = json.dumps(sorted(json.dumps(identity, sort_keys=True) for identity in identities))
    held = store.connection.execute("SELECT count(*) FROM turns").fetchone()[0]
    if held and store.meta("models") != now:
        raise setting_error(
            folder,
            "model",
            f"another model than the {held} answers so far came from (its hashes differ); put the old one back, or chat "
            "in a folder of its own",
        )
    with store.transaction():
        store.set_meta("models", now)


# ------------------------------------------------------------------------------------------------ generation


@dataclass
class _Job:
    """A turn that waits for its answers. text: what of a single answer is written so far."""

    text: str = ""
    begun: bool = False


class Generation:
    """Lets the models answer waiting turns, one after the other: sampling's random generator is one per process.

    Args:
        in_store: runs a function in the store's thread and returns what it returned.
    """

    def __init__(self, project: Project, models: Models, in_store: Callable[[Callable[[], Any]], Any]):
        self._project, self._models, self._in_store = project, models, in_store
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._jobs: dict[int, _Job] = {}
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._reply: Reply | None = None

    def want(self, turn: int) -> None:
        """Answer a turn that waits, unless that is under way. A turn that a killed server left waiting comes here again."""
        with self._lock:
            if turn not in self._jobs and not self._stopped.is_set():
                self._jobs[turn] = _Job()
                self._thread.submit(self._run, turn)

    def progress(self, turn: int) -> dict[str, Any]:
        """Whether a turn still waits, how many come before it, and what is written."""
        with self._lock:
            job = self._jobs.get(turn)
            ahead = 0 if job is None or job.begun else list(self._jobs).index(turn)
            return {"waiting": job is not None, "ahead": ahead, "text": "" if job is None else job.text}

    def stop(self) -> None:
        """End the answer that is being written; its turn goes on waiting."""
        self._stopped.set()
        if (reply := self._reply) is not None:
            reply.stop()
        self._thread.shutdown(cancel_futures=True)

    def _run(self, turn: int) -> None:
        try:
            self._answer(turn, self._jobs[turn])
        except Exception:
            logger.exception("turn %d", turn)
        finally:
            with self._lock:
                del self._jobs[turn]

    def _answer(self, number: int, job: _Job) -> None:
        store, settings = self._project.store, self._project.settings
        job.begun = True
        conversation: Conversation = self._in_store(lambda: conversations.conversation_of(store, number))
        turn = next(turn for turn in conversation.turns if turn.id == number)
        if turn.outcome != "waiting":
            return
        dialogue = self._in_store(lambda: conversations.dialogue(store, conversation))
        models = conversations.samples(settings, turn)
        answers: list[Written] = []
        try:
            for sample, model in enumerate(models):
                seed = conversations.seed_of(store, turn, sample)
                reply = self._reply = self._models.reply(model, dialogue, seed)
                text = self._write(reply, job, shown=len(models) == 1)
                finished = reply.ended == "stop"
                answers.append(Written(text, {**self._models.sources[model], "seed": seed, "finished": finished}))
        except UserError as error:
            logger.warning("turn %d: %s", number, error)
            reason = str(error)
            self._save(lambda: conversations.save_failure(store, turn, reason))
        except Exception:
            logger.exception("turn %d", number)
            self._save(lambda: conversations.save_failure(store, turn, FAILED))
        else:
            self._save(lambda: conversations.save_answers(store, settings, turn, answers))

    def _write(self, reply: Reply, job: _Job, *, shown: bool) -> str:
        """The whole of an answer; `shown` lets the page see it while it comes."""
        text = ""
        for piece in reply:
            text += piece
            if shown:
                job.text = text
            if self._stopped.is_set():
                reply.stop()
        return text

    def _save(self, save: Callable[[], None]) -> None:
        """Save what was written, where the server is not about to stop; a full disk is tried again."""
        while not self._stopped.is_set():
            try:
                self._in_store(save)
                return
            except sqlite3.OperationalError as error:
                logger.warning("an answer could not be saved (%s); trying again", error)
                self._stopped.wait(RETRY_SECONDS)


# ------------------------------------------------------------------------------------------------ the page's requests


def live_routes() -> list[Route]:
    return [
        Route("/api/ask", post_ask, methods=["POST"]),
        Route("/api/new", post_new, methods=["POST"]),
        Route("/api/progress/{turn:int}", get_progress),
    ]


def live_work(project: Project, labeler: Labeler, generation: Generation) -> dict[str, Any]:
    """The labeler's conversation as the page shows it: what was said, and what is due.

    `chat.state` is "ask" (a question is due), "waiting" (the answers are), "choose" (a comparison is) or "full".
    """
    store, settings = project.store, project.settings
    conversation = conversations.open_conversation(store, settings, labeler.id)
    said = conversations.messages(store, conversation)
    last = conversation.turns[-1] if conversation.turns else None
    chat: dict[str, Any] = {
        "conversation": conversation.id,
        "number": len(conversation.turns) + 1,
        "left": settings.max_turns - len(conversation.turns),
        "state": "ask" if len(conversation.turns) < settings.max_turns else "full",
    }
    if last is not None and last.outcome == "waiting":
        generation.want(last.id)
        compared = len(conversations.samples(settings, last)) > 1
        chat |= {"state": "waiting", "turn": last.id, "compared": compared}
    elif last is not None and last.outcome in ("empty", "failed"):
        reason = last.answer or "The model's answer was empty."
        chat |= {"problem": f"{reason} Your last question is not part of the conversation.", "question": last.question}
    work = {"item": None, "prompt": said, "responses": [], "draft": None, "label": None, "done": done(project, labeler)}
    if pair := conversations.undecided(store, conversation):
        work = {**_pair(project, labeler, pair), "prompt": said}
        chat["state"] = "choose"
    return {**work, "chat": chat}


def _pair(project: Project, labeler: Labeler, turn: Turn) -> dict[str, Any]:
    """The two answers of a turn in the order shown, with what is said of each."""
    assert turn.item is not None
    assignment = own_assignment(project.store, labeler.id, turn.item)
    finished = [assignment.row["sources"][place]["finished"] for place in assignment.shown]
    notes = ["" if whole else conversations.CUT_OFF for whole in finished]
    return {**item_work(project, labeler, assignment), "notes": notes}


async def post_ask(request: Request) -> Response:
    body = await json_body(request)
    question = Question(
        conversation=whole_number(body, "conversation"),
        number=whole_number(body, "number"),
        request=body.get("request", ""),
        text=body.get("text"),
    )

    def work(project: Project, labeler: Labeler) -> int:
        return conversations.ask(project.store, project.settings, labeler.id, question)

    return JSONResponse({"turn": await in_store(request, work)})


async def post_new(request: Request) -> Response:
    """End the labeler's conversation; the next question begins another."""
    number = whole_number(await json_body(request), "conversation")
    await in_store(
        request,
        lambda project, labeler: conversations.end_conversation(project.store, project.settings, labeler.id, number),
    )
    return JSONResponse({"ended": number})


async def get_progress(request: Request) -> Response:
    """How far the answers to the labeler's own turn are."""
    turn: int = request.path_params["turn"]

    def check(project: Project, labeler: Labeler) -> None:
        if not 0 < turn < 2**62 or conversations.owner(project.store, turn) != labeler.id:
            raise Refused(404, "There is no such turn of yours.")

    await in_store(request, check)
    return JSONResponse(request.app.state.generation.progress(turn))

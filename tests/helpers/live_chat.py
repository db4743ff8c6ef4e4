"""Live chats that are served in this process, with models that say what a test wants."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from helpers.labeling import read_jsonl
from pipeline.labeling.app import make_app
from pipeline.labeling.export import export
from pipeline.labeling.labelers import add_labeler
from pipeline.labeling.project import open_project

import yaml
from starlette.testclient import TestClient


class Reply:
    def __init__(self, text: str, ended: str = "stop", gate: threading.Event | None = None):
        self.text, self.ended, self.gate = text, ended, gate
        self.stopped = threading.Event()

    def __iter__(self) -> Iterator[str]:
        for word in self.text.split(" "):
            yield word if word == self.text.split(" ")[0] else f" {word}"
            while self.gate is not None and not self.gate.wait(0.01) and not self.stopped.is_set():
                continue

    def stop(self) -> None:
        self.stopped.set()


class Models:
    """Models whose answers a function gives: of model, dialogue, and how many replies there were before."""

    def __init__(self, say: Callable[[int, list[dict[str, str]], int], Reply]):
        self.say, self.asked = say, []
        self.sources = [{"model": f"secret-{n}", "weights_sha256": f"{n:064}", "temperature": 1.0} for n in range(2)]
        self.identities = [{"weights_sha256": source["weights_sha256"]} for source in self.sources]

    def reply(self, model: int, messages: list[dict[str, str]], seed: int) -> Reply:
        self.asked.append((model, messages, seed))
        return self.say(model, list(messages), len(self.asked) - 1)


def numbered(model: int, messages: list[dict[str, str]], before: int) -> Reply:
    return Reply(f"Answer {before} of model {model}.", "length" if before == 1 else "stop")


class Page:
    """What the page of one labeler does."""

    def __init__(self, app: Any, token: str):
        self.http = TestClient(app, base_url="http://127.0.0.1", headers={"authorization": f"Bearer {token}"})

    def state(self) -> dict[str, Any]:
        return self.http.get("/api/item").json()

    def settled(self) -> dict[str, Any]:
        """The state once no answer is due."""
        deadline = time.monotonic() + 10
        while (work := self.state())["chat"]["state"] == "waiting":
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return work

    def post_question(self, text: Any, **changes: Any) -> Any:
        chat = self.state()["chat"]
        body = {
            "conversation": chat["conversation"],
            "number": chat["number"],
            "request": uuid.uuid4().hex,
            "text": text,
        }
        return self.http.post("/api/ask", json={**body, **changes})

    def ask(self, text: str) -> dict[str, Any]:
        assert self.post_question(text).status_code == 200
        return self.settled()

    def choose(self, work: dict[str, Any], ranks: list[int], strength: int | None = 2, **changes: Any) -> Any:
        answer = {"ranks": ranks, "strength": strength if len(set(ranks)) > 1 else None}
        body = {"item": work["item"], "request": uuid.uuid4().hex, "answer": answer, "seconds": 1}
        return self.http.post("/api/label", json={**body, **changes})


class Chat:
    """A chat project that is served in this process."""

    def __init__(self, folder: Path, say: Callable[..., Reply] = numbered, names: str = "ana", **settings: Any):
        folder.mkdir(exist_ok=True)
        given = {"mode": "chat", "model": ["one", "two"], "compare_every": 1, **settings}
        (folder / "label.yaml").write_text(yaml.safe_dump(given), encoding="utf-8")
        self.project = open_project(folder)
        self.models = Models(say)
        self.app = make_app(self.project, models=self.models)
        self.tokens = [add_labeler(self.project.store, name) for name in names.split()]
        self.pages = [Page(self.app, token) for token in self.tokens]

    @property
    def page(self) -> Page:
        return self.pages[0]

    def exported(self) -> list[dict[str, Any]]:
        folder = export(self.project.store, self.project.settings).folder
        return read_jsonl(folder / "rankings.jsonl")


def said(work: dict[str, Any]) -> list[str]:
    return [message["content"] for message in work["prompt"]]

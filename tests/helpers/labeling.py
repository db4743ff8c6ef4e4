"""Labeling folders, their server, and clients that answer through its HTTP interface."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.labeling import labelers as people
from pipeline.labeling.assignment import current_assignment
from pipeline.labeling.labels import Submission, submit
from pipeline.labeling.project import Project, open_project
from pipeline.labeling.store import Store

import httpx
import yaml

ROOT = Path(__file__).resolve().parents[2]


def comparisons(count: int, responses: int = 2) -> list[dict[str, Any]]:
    return [
        {
            "prompt": f"Question {n}: my kettle is broken, what now?",
            "responses": [f"Answer {k} to question {n}. " + "We will send a new one. " * k for k in range(responses)],
            "sources": [{"model": f"model-{k}", "weights_sha256": f"{k:064}"} for k in range(responses)],
        }
        for n in range(count)
    ]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def labeling_folder(folder: Path, rows: list[dict[str, Any]], **settings: Any) -> Path:
    write_rows(folder / "rows.jsonl", rows)
    if settings:
        (folder / "label.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return folder


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def rlhf(*words: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline.cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False, **options)


def project_with(
    folder: Path, names: str = "ana", rows: list[dict[str, Any]] | None = None, **settings: Any
) -> Project:
    project = open_project(labeling_folder(folder, rows or comparisons(4), **settings))
    known = {person.name for person in people.labelers(project.store)}
    for name in names.split():
        if name not in known:
            people.add_labeler(project.store, name)
    return project


def number(project: Project, name: str = "ana") -> int:
    return next(person.id for person in people.labelers(project.store) if person.name == name)


def send(project: Project, item: int, name: str = "ana", **changes: Any) -> int:
    values = {
        "item": item,
        "request": uuid.uuid4().hex,
        "replaces": 0,
        "raw": {"ranks": [1, 2], "strength": 3},
        "seconds": 1,
    }
    return submit(project.store, project.settings, number(project, name), Submission(**{**values, **changes}))


def work(project: Project, name: str = "ana") -> int | None:
    assignment = current_assignment(project.store, project.settings, number(project, name))
    return assignment.item if assignment else None


@dataclass
class Server:
    """A running `rlhf label FOLDER`."""

    process: subprocess.Popen[str]
    url: str
    lead: str  # token, where this start made one
    seconds: float  # until it served

    def stop(self, sent: int = signal.SIGTERM) -> int:
        self.process.send_signal(sent)
        return self.process.wait(20)


@contextlib.contextmanager
def serving(folder: Path, *words: str) -> Iterator[Server]:
    started = time.monotonic()
    command = [sys.executable, "-m", "pipeline.cli", "label", str(folder), "--port", "0", *words]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT, env=environment
    )
    try:
        lead = ""
        assert process.stdout is not None
        for line in process.stdout:
            if match := re.search(r"/in/(\S+)", line):
                lead = match[1]
            if match := re.search(r"serving at (\S+);", line):
                yield Server(process=process, url=match[1], lead=lead, seconds=time.monotonic() - started)
                break
        else:
            raise AssertionError(f"the server ended with {process.wait()}")
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def add_labeler(folder: Path, name: str, *, lead: bool = False) -> str:
    """A new labeler's token."""
    with contextlib.closing(Store(folder)) as store:
        return people.add_labeler(store, name, lead)


class Client:
    """A scripted labeler."""

    def __init__(self, url: str, token: str, timeout: float = 10):
        self.http = httpx.Client(
            base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=timeout, verify=False
        )

    def item(self, number: int | None = None) -> dict[str, Any]:
        return self.get("/api/item" + ("" if number is None else f"?item={number}"))

    def get(self, path: str) -> dict[str, Any]:
        response = self.http.get(path)
        assert response.status_code == 200, response.text
        return response.json()

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.http.post(path, json=body)

    def label(self, item: int, answer: dict[str, Any], request: str | None = None, replaces: int = 0) -> httpx.Response:
        name = request or uuid.uuid4().hex
        return self.post("/api/label", item=item, request=name, answer=answer, seconds=3.0, replaces=replaces)

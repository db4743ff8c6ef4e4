"""The server of a labeling folder, asked over HTTP: access, forged requests, hostile text, kills, the command line."""

from __future__ import annotations

import json
import random
import signal
import sqlite3
import threading
import time
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

from helpers.labeling import (
    Client,
    add_labeler,
    comparisons,
    labeling_folder,
    read_jsonl,
    rlhf,
    serving,
    write_rows,
)
from pipeline.labeling.access import MAX_BODY_BYTES

import httpx
import pytest

A_IS_BETTER = {"ranks": [1, 2], "strength": 2, "quality": [None, None], "flags": [[], []], "response": ""}


# ------------------------------------------------------------------------------------------------ access


def test_an_item_is_given_labeled_and_seen_again_without_sources_or_others_labels(tmp_path: Path) -> None:
    folder = labeling_folder(tmp_path, comparisons(2), overlap=2)
    with serving(folder) as server:
        ana, ben = (Client(server.url, add_labeler(folder, name)) for name in ("ana", "ben"))
        work = ana.item()
        assert work.keys() == {"item", "prompt", "responses", "draft", "label", "done"}
        assert ana.label(work["item"], A_IS_BETTER).status_code == 200
        own = ana.item(work["item"])
        assert own["label"]["answer"]["ranks"] == [1, 2]
        assert own["responses"] == work["responses"]
        theirs = ben.item()
        assert (theirs["item"], theirs["label"], theirs["draft"]) == (work["item"], None, None)
        for text in (json.dumps(own), ana.http.get("/").text):
            assert "model-" not in text
            assert "sources" not in text
        assert ben.http.get(f"/api/item?item={ana.item()['item']}").status_code == 409
        assert ana.http.get("/lead").status_code == 403
        lead = Client(server.url, server.lead).http.get("/lead").text
        assert "ana" in lead
        assert server.stop() in (143, -signal.SIGTERM)


def test_a_link_sets_a_cookie_that_scripts_cannot_read_and_wrong_ones_are_told_why(tmp_path: Path) -> None:
    folder = labeling_folder(tmp_path / "one", comparisons(1))
    labeling_folder(tmp_path / "two", comparisons(1))
    with serving(folder) as server, serving(tmp_path / "two") as other:
        token = add_labeler(folder, "ana")
        answer = httpx.get(f"{server.url}/in/{token}")
        assert answer.status_code == 303
        assert "httponly" in answer.headers["set-cookie"].lower()
        assert "samesite=lax" in answer.headers["set-cookie"].lower()
        cookie = dict([answer.headers["set-cookie"].split(";")[0].split("=", 1)])
        assert httpx.get(f"{server.url}/api/item", cookies=cookie).status_code == 200
        assert httpx.get(f"{server.url}/").status_code == 401
        assert "personal link" in httpx.get(f"{server.url}/").text
        for wrong, words in (
            (other.lead, "another labeling project"),
            (token[:-1] + "!", "not valid"),
            ("x", "not valid"),
        ):
            refused = httpx.get(f"{server.url}/in/{wrong}")
            assert refused.status_code == 403
            assert words in refused.text
    log = (folder / "server.log").read_text()
    assert "another labeling project" in log
    assert token not in log
    assert other.lead not in log


def forged(url: str, cookie: str) -> list[dict[str, Any]]:
    """30 requests that a browser sends for another site's page, or that no page sends."""
    host = url.removeprefix("http://")
    body = json.dumps({"item": 1, "request": "request-forged", "answer": A_IS_BETTER, "seconds": 1})
    good = {"cookie": cookie, "content-type": "application/json", "origin": url}
    requests = []
    for path in ("/api/label", "/api/skip", "/api/draft", "/api/undo", "/lead/exclude", "/lead/export"):
        for origin in ("http://evil.example", "null", f"http://{host}.evil.example"):
            requests.append({"path": path, "content": body, "headers": {**good, "origin": origin}})
    for headers in (
        {**good, "origin": url.replace("127.0.0.1", "localhost")},
        {**good, "origin": f"http://127.0.0.1:{int(host.split(':')[1]) + 1}"},
        {name: value for name, value in good.items() if name != "origin"},
        {**{n: v for n, v in good.items() if n != "origin"}, "sec-fetch-site": "cross-site"},
        {**{n: v for n, v in good.items() if n != "origin"}, "sec-fetch-site": "same-site"},
        {**good, "content-type": "text/plain"},
        {**good, "content-type": "multipart/form-data; boundary=x"},
        {name: value for name, value in good.items() if name != "content-type"},
        {**good, "host": "evil.example", "origin": "http://evil.example"},
        {**good, "host": "127.0.0.1.evil.example"},
        {**good, "cookie": cookie[:-2]},
        {**good, "cookie": ""},
    ):
        requests.append({"path": "/api/label", "content": body, "headers": headers})
    return requests


def test_thirty_forged_requests_are_refused_and_change_nothing(tmp_path: Path) -> None:
    folder = labeling_folder(tmp_path, comparisons(1))
    with serving(folder) as server:
        token = add_labeler(folder, "ana")
        answer = httpx.get(f"{server.url}/in/{token}")
        cookie = answer.headers["set-cookie"].split(";")[0]
        assert Client(server.url, token).item()["item"] == 1
        requests = forged(server.url, cookie)
        assert len(requests) == 30
        for request in requests:
            refused = httpx.post(server.url + request["path"], content=request["content"], headers=request["headers"])
            assert 400 <= refused.status_code < 500, request
        assert Client(server.url, token).item()["label"] is None
        good = {"cookie": cookie, "content-type": "application/json", "origin": server.url}
        assert httpx.post(f"{server.url}/api/label", content=requests[0]["content"], headers=good).status_code == 200


def test_no_page_may_load_or_run_anything_from_elsewhere(tmp_path: Path) -> None:
    folder = labeling_folder(tmp_path, comparisons(1))
    (folder / "guidelines.md").write_text(
        "# Rules\n\n<script>alert(1)</script> [x](javascript:alert(1)) ![i](http://a.b/c.png)"
    )
    with serving(folder) as server:
        http = Client(server.url, add_labeler(folder, "ana")).http
        for path in ("/", "/static/label.js", "/static/page.css", "/nothing", "/api/item"):
            headers = http.get(path).headers
            policy = headers["content-security-policy"]
            assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
            assert "unsafe" not in policy
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["referrer-policy"] == "same-origin"
        page = http.get("/").text
        assert "<h1>Rules</h1>" in page
        assert "&lt;script&gt;" in page
        assert 'href="javascript' not in page
        assert "<img" not in page
        assert "http://" not in page.replace("http://a.b", "")
        assert http.get("/static/../store.py").status_code == 404
        assert http.get("/static/%2e%2e/store.py").status_code == 404


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"x" * (MAX_BODY_BYTES + 1), 413),
        (b"[" * 100_000, 400),
        (b"no json", 400),
        (b"[1]", 400),
        (b'{"item": "1"}', 422),
        (b'{"item": 1e400}', 422),
        (b'{"item": 99999999999999999999999}', 422),
        (b'{"item": 1, "request": "short", "answer": {}}', 422),
        (b'{"item": 7, "request": "request-1", "answer": {"ranks": [1, 2], "strength": 1}}', 409),
        (b'{"item": 1, "request": "request-1", "answer": {"ranks": [1, 1], "response": "\\ud800"}}', 422),
        (b'{"item": 1, "request": "request-1", "answer": {"ranks": [1, 2]}, "seconds": NaN}', 422),
    ],
)
def test_bodies_that_no_page_sends_get_an_answer(
    shared_server: tuple[Client, str], content: bytes, status: int
) -> None:
    client, _ = shared_server
    answer = client.http.post("/api/label", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == status
    assert answer.json()["error"]
    chunks = (content[i : i + 65536] for i in range(0, len(content), 65536))
    answer = client.http.post("/api/label", content=chunks, headers={"content-type": "application/json"})
    assert answer.status_code == status


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    folder = labeling_folder(tmp_path_factory.mktemp("served"), comparisons(3), better_answer=True)
    with serving(folder) as server:
        client = Client(server.url, add_labeler(folder, "ana"))
        client.item()
        yield client, server.url


def test_the_disk_is_full_in_the_page_and_in_the_log(tmp_path: Path) -> None:
    """A database that may not grow answers as one on a full disk does."""
    from pipeline.labeling.app import make_app
    from pipeline.labeling.labelers import add_labeler as add
    from pipeline.labeling.project import open_project

    from starlette.testclient import TestClient

    project = open_project(labeling_folder(tmp_path, comparisons(1), better_answer=True))
    token = add(project.store, "ana")
    client = TestClient(make_app(project), base_url="http://127.0.0.1", headers={"authorization": f"Bearer {token}"})
    item = client.get("/api/item").json()["item"]
    connection = project.store.connection
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count = {pages}")
    body = {"item": item, "request": "request-1", "answer": {"ranks": [1, 1], "response": "long " * 4000}}
    refused = client.post("/api/label", json=body)
    assert refused.status_code == 507
    assert "NOT saved" in refused.json()["error"]
    connection.execute("PRAGMA max_page_count = 100000")
    assert client.get("/api/item").json()["label"] is None
    assert client.post("/api/label", json=body).status_code == 200


# ------------------------------------------------------------------------------------------------ the lead


def test_the_lead_excludes_adjudicates_and_exports_in_the_page(tmp_path: Path) -> None:
    folder = labeling_folder(tmp_path, comparisons(1), overlap=2)
    with serving(folder) as server:
        ana, ben = (Client(server.url, add_labeler(folder, name)) for name in ("ana", "ben"))
        for client, choice in ((ana, 0), (ben, 1)):
            work = client.item()
            first = work["responses"][0].startswith("Answer 0")
            better_first = first == (choice == 0)
            client.label(work["item"], {"ranks": [1, 2] if better_first else [2, 1], "strength": 1})
        lead = Client(server.url, server.lead)
        lead.http.headers["content-type"] = "application/x-www-form-urlencoded"
        assert "item 1</a>" in lead.http.get("/lead").text
        page = lead.http.get("/lead/items/1").text
        assert "weights_sha256" in page
        assert page.count('<th scope="row">') == 2
        assert lead.http.get("/lead/items/9").status_code == 404
        work = lead.item(1)
        assert (
            lead.http.post(
                "/api/label",
                json={"item": 1, "request": "request-lead", "answer": {"ranks": [1, 1]}},
                headers={"content-type": "application/json"},
            ).status_code
            == 200
        )
        assert ">yes<" in lead.http.get("/lead").text
        assert lead.http.post("/lead/exclude", content="name=ben&excluded=altogether").status_code == 303
        assert ben.http.get("/api/item").status_code == 403
        assert "2 new rankings" in lead.http.post("/lead/export", content="").text
        assert ana.post("/lead/export").status_code == 403
        assert lead.http.post("/lead/exclude", content="name=lead&excluded=altogether").status_code == 422
    rows = read_jsonl(folder / "export" / "rankings.jsonl")
    assert [(row["labeler"], row.get("adjudication")) for row in rows] == [("ana", None), ("lead", True)]


# ------------------------------------------------------------------------------------------------ kills and load


class Labelers:
    """Scripted clients that label until they are stopped, and remember what was confirmed and what was sent."""

    def __init__(self, url: str, tokens: list[str]):
        self.confirmed: dict[str, int] = {}
        self.sent: set[str] = set()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._label, args=(Client(url, token),)) for token in tokens]

    def __enter__(self) -> Labelers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _label(self, client: Client) -> None:
        while not self._stop.is_set():
            name = uuid.uuid4().hex
            try:
                item = client.item()["item"]
                self.sent.add(name)
                answer = client.label(item, A_IS_BETTER, request=name)
            except httpx.HTTPError:
                return  # the server is dead
            if answer.status_code == 200:
                self.confirmed[name] = answer.json()["label"]


@pytest.mark.full
def test_a_kill_at_any_moment_loses_no_confirmed_label(tmp_path: Path) -> None:
    """50 SIGKILLs under 8 labelers: each confirmed label is in the database and once in the export, and nothing else is."""
    kill_at_random_moments(tmp_path, kills=50)


def test_a_kill_loses_no_confirmed_label(tmp_path: Path) -> None:
    kill_at_random_moments(tmp_path, kills=2)


def kill_at_random_moments(folder: Path, kills: int) -> None:
    labeling_folder(folder, comparisons(100 * kills), overlap=8)
    confirmed: dict[str, int] = {}
    sent: set[str] = set()
    tokens: list[str] = []
    moments = random.Random(0)
    for _ in range(kills):
        with serving(folder) as server:
            tokens = tokens or [add_labeler(folder, f"labeler {n}") for n in range(8)]
            with Labelers(server.url, tokens) as labelers:
                time.sleep(moments.uniform(0.05, 0.8))
                server.stop(signal.SIGKILL)
            confirmed |= labelers.confirmed
            sent |= labelers.sent
    assert rlhf("label", "export", "--folder", folder).returncode == 0
    with sqlite3.connect(folder / "labels.sqlite3") as connection:
        stored = dict(connection.execute("SELECT request, id FROM labels WHERE current = 1").fetchall())
        project = connection.execute("SELECT value FROM meta WHERE key = 'project'").fetchone()[0]
        per_item = connection.execute(
            "SELECT max(n) FROM (SELECT count(*) n FROM labels GROUP BY item, labeler)"
        ).fetchone()
    assert len(confirmed) > 5 * kills, len(confirmed)
    assert confirmed.items() <= stored.items()
    assert stored.keys() <= sent  # what was saved and not confirmed was sent; at most one per labeler and kill
    assert len(stored) - len(confirmed) <= 8 * kills
    assert per_item == (1,)
    exported = Counter(row["id"] for row in read_jsonl(folder / "export" / "rankings.jsonl"))
    assert exported == Counter(f"{project}-{number}" for number in stored.values())
    print(f"{kills} kills: {len(confirmed)} confirmed, {len(stored)} stored and exported")


# ------------------------------------------------------------------------------------------------ the command


def test_the_command_adds_lists_excludes_imports_and_exports(tmp_path: Path) -> None:
    folder = labeling_folder(tmp_path / "folder", comparisons(2))
    added = rlhf("label", "users", "add", "ana", "--folder", folder)
    assert "ana's link, shown this once: http://127.0.0.1:8765/in/" in added.stdout
    assert rlhf("label", "users", "add", "ana", "--folder", folder).returncode == 2
    assert rlhf("label", "users", "link", "ana", "--folder", folder).stdout != added.stdout
    assert "excluded altogether" in rlhf("label", "users", "exclude", "ana", "--altogether", "--folder", folder).stdout
    assert rlhf("label", "users", "list", "--folder", folder).stdout == "ana\tlabeler\texcluded altogether\n"
    assert "no labels yet" in rlhf("label", "export", "--folder", folder).stdout
    task = {"data": {"prompt": "p", "answer1": "a", "answer2": "b"}, "annotations": []}
    write_rows(tmp_path / "tasks.jsonl", [task])
    assert "1 items" in rlhf("label", "import", tmp_path / "tasks.jsonl", "--folder", tmp_path / "new").stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "error: nowhere: is no folder; make it"),
        (["users"], "error: command line: rlhf label users add"),
        (["export", "--folder", "pipeline"], "error: pipeline: is no labeling folder yet"),
        (["import"], "error: command line: rlhf label import FILE"),
        (["import", "nothing.json"], "error: nothing.json: does not exist"),
        (["tests", "more"], "error: command line: 'tests' is taken for a folder"),
        (["tests"], "error: tests: holds no file of rows to label"),
    ],
)
def test_a_command_that_cannot_be_done_gets_one_line(words: list[str], message: str) -> None:
    done = rlhf("label", *words)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(message)


def test_a_second_server_on_the_folder_or_port_is_refused(tmp_path: Path) -> None:
    folder = labeling_folder(tmp_path / "one", comparisons(1))
    labeling_folder(tmp_path / "two", comparisons(1))
    with serving(folder) as server:
        second = rlhf("label", folder, "--port", "0")
        assert second.returncode == 2
        assert f"is served already (process {server.process.pid}, {server.url})" in second.stderr
        taken = rlhf("label", tmp_path / "two", "--port", server.url.rpartition(":")[2])
        assert taken.returncode == 2
        assert "cannot listen on 127.0.0.1" in taken.stderr
        assert server.url in rlhf("label", "users", "add", "ana", "--folder", folder).stdout


def test_the_server_starts_without_torch(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = "import sys, pipeline.cli, pipeline.commands.label, pipeline.labeling.serve, pipeline.labeling.importing; print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"

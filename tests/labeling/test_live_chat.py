"""Live chat on the labeling page, with models that say what a test wants: what is asked, compared, kept and exported."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

from helpers.labeling import labeling_folder, rlhf, write_rows
from helpers.live_chat import Chat, Models, Page, Reply, numbered, said
from pipeline.data.files import read_text
from pipeline.data.records import parse_ranking
from pipeline.errors import UserError
from pipeline.labeling.app import make_app
from pipeline.labeling.importing import import_labels
from pipeline.labeling.labelers import add_labeler, renew_token
from pipeline.labeling.live import check_models
from pipeline.labeling.project import open_project
from pipeline.labeling.settings import Settings, read_settings
from pipeline.labeling.store import Store

import pytest
import yaml
from starlette.testclient import TestClient

# ------------------------------------------------------------------------------------------------ a conversation


def test_a_conversation_goes_on_from_the_preferred_answer_and_each_pair_is_a_ranking(tmp_path: Path) -> None:
    chat = Chat(tmp_path, system="Be kind.", compare_every=2)
    first = chat.page.ask("Hello <b>you</b>")
    assert said(first) == ["Be kind.", "Hello <b>you</b>", "Answer 0 of model 0."]
    assert (first["item"], first["chat"]["state"], first["chat"]["left"]) == (None, "ask", 19)
    pair = chat.page.ask("And then?")
    assert (pair["chat"]["state"], said(pair)[-1]) == ("choose", "And then?")
    answers = ["Answer 1 of model 0.", "Answer 2 of model 1."]
    assert sorted(pair["responses"]) == answers
    assert pair["notes"][pair["responses"].index(answers[0])] == "cut off at its longest"
    assert "secret" not in json.dumps(pair) + chat.page.http.get("/").text
    worse_first = [2, 1] if pair["responses"][0] == answers[0] else [1, 2]  # model 1's is better
    assert chat.page.choose(pair, worse_first).status_code == 200
    after = chat.page.settled()
    assert (said(after)[-1], after["chat"]["state"], after["done"]) == (answers[1], "ask", 1)
    third = chat.page.ask("Thanks")
    assert chat.models.asked[-1][1] == [{"role": m["role"], "content": m["content"]} for m in third["prompt"][:-1]]
    (row,) = chat.exported()
    assert row["prompt"] == [{"role": m["role"], "content": m["content"]} for m in pair["prompt"]]
    assert (row["responses"], row["ranks"], row["strength"], row["margin"]) == (answers, [2, 1], 2, 0.3333)
    assert [row["responses"][place] for place in row["shown"]] == pair["responses"]
    assert [(s["model"], s["finished"], s["temperature"]) for s in row["sources"]] == [
        ("secret-0", False, 1.0),
        ("secret-1", True, 1.0),
    ]
    assert row["labeler"] == "ana"
    assert parse_ranking(row)["ranks"] == [2, 1]
    checked = rlhf("check", tmp_path / "export" / "rankings.jsonl")
    assert (checked.returncode, "warning" in checked.stderr.lower()) == (0, False), checked.stderr + checked.stdout


def test_a_tie_and_a_skip_go_on_from_the_answer_shown_first(tmp_path: Path) -> None:
    chat = Chat(tmp_path)
    tie = chat.page.ask("One")
    chat.page.choose(tie, [1, 1])
    after = chat.page.settled()
    assert said(after)[-1] == tie["responses"][0]
    assert "tie" in after["prompt"][-1]["note"]
    pair = chat.page.ask("Two")
    skipped = {"item": pair["item"], "request": "request-1", "reason": "Both are nonsense", "seconds": 1}
    assert chat.page.http.post("/api/skip", json=skipped).status_code == 200
    assert said(chat.page.settled())[-1] == pair["responses"][0]
    assert [row["ranks"] for row in chat.exported()] == [[1, 1]]


def test_an_export_in_between_changes_no_line_that_was_written(tmp_path: Path) -> None:
    chat = Chat(tmp_path)
    lines = []
    for question in ("One", "Two"):
        chat.page.choose(chat.page.ask(question), [1, 2])
        chat.exported()
        lines.append(read_text(tmp_path / "export" / "rankings.jsonl"))
    assert lines[1].startswith(lines[0])
    assert lines[1].count("\n") == 2


def test_a_choice_can_be_changed_or_undone_until_the_conversation_goes_on(tmp_path: Path) -> None:
    chat = Chat(tmp_path)
    page = chat.page
    pair = page.ask("One")
    label = page.choose(pair, [1, 2]).json()["label"]
    label = page.choose(pair, [2, 1], replaces=label).json()["label"]
    assert said(page.settled())[-1] == pair["responses"][1]
    assert page.http.post("/api/undo", json={"label": label}).status_code == 200
    again = page.settled()
    assert (again["chat"]["state"], again["draft"]["ranks"], said(again)) == ("choose", [2, 1], ["One"])
    assert page.post_question("Two").status_code == 409
    label = page.choose(again, [1, 2]).json()["label"]
    page.ask("Two")
    for refused in (page.http.post("/api/undo", json={"label": label}), page.choose(pair, [2, 1], replaces=label)):
        assert refused.status_code == 409
        assert "gone on or ended" in refused.json()["error"]
    assert page.http.get(f"/api/item?item={pair['item']}").json()["label"]["went_on"] is True
    lead = Page(chat.app, add_labeler(chat.project.store, "lead", lead=True))
    judged = lead.http.get(f"/api/item?item={pair['item']}").json()
    assert lead.choose(judged, [1, 1]).status_code == 200
    assert [(row["labeler"], row.get("adjudication")) for row in chat.exported()] == [("ana", None), ("lead", True)]


def test_answers_that_cannot_be_compared_are_counted_and_the_conversation_goes_on(tmp_path: Path) -> None:
    texts = ["same", "same", "", "other", " ", "", "Fine."]
    chat = Chat(tmp_path, lambda _model, _messages, before: Reply(texts[before] if before < 7 else f"More {before}."))
    same = chat.page.ask("One")
    assert (said(same), same["chat"]["state"]) == (["One", "same"], "ask")
    assert "the same" in same["prompt"][-1]["note"]
    one_empty = chat.page.ask("Two")
    assert said(one_empty)[-1] == "other"
    assert "empty" in one_empty["prompt"][-1]["note"]
    empty = chat.page.ask("Three")
    assert said(empty) == ["One", "same", "Two", "other"]
    assert (empty["chat"]["question"], "empty" in empty["chat"]["problem"]) == ("Three", True)
    assert chat.page.ask("Four")["chat"]["state"] == "choose"
    token = add_labeler(chat.project.store, "lead", lead=True)
    lead = Page(chat.app, token).http.get("/lead").text
    assert "1 pairs of equal answers, 1 with an empty one; 1 empty answers, 0 failed" in lead
    assert chat.exported() == []


def test_what_the_model_cannot_answer_is_said_and_stays_out_of_the_conversation(tmp_path: Path) -> None:
    def say(model: int, messages: list[dict[str, str]], before: int) -> Reply:
        if "long" in messages[-1]["content"]:
            raise UserError("the conversation has 900 tokens; begin a new one")
        if "bug" in messages[-1]["content"]:
            raise RuntimeError("out of memory at secret-0")
        return Reply(f"Answer {before}.")

    chat = Chat(tmp_path, say)
    assert "900 tokens" in chat.page.ask("long")["chat"]["problem"]
    failed = chat.page.ask("bug")
    assert "server.log" in failed["chat"]["problem"]
    assert "secret" not in json.dumps(failed)
    assert said(chat.page.ask("Fine")) == ["Fine"]


def test_a_conversation_ends_by_choice_or_at_its_turns_and_another_begins(tmp_path: Path) -> None:
    chat = Chat(tmp_path, max_turns=2, compare_every=2)
    chat.page.ask("One")
    number = chat.page.state()["chat"]["conversation"]
    pair = chat.page.ask("Two")
    new = {"conversation": number}
    assert chat.page.http.post("/api/new", json=new).status_code == 409  # a choice is due
    chat.page.choose(pair, [1, 2])
    assert chat.page.state()["chat"]["state"] == "full"
    assert "all its turns" in chat.page.post_question("Three").json()["error"]
    for _ in range(2):
        assert chat.page.http.post("/api/new", json=new).status_code == 200
    after = chat.page.state()
    assert (after["prompt"], after["chat"]["number"]) == ([], 1)
    assert after["chat"]["conversation"] != number


# ------------------------------------------------------------------------------------------------ requests


def test_a_question_that_is_sent_twice_counts_once_and_another_windows_is_refused(tmp_path: Path) -> None:
    chat = Chat(tmp_path, compare_every=2)
    before = chat.page.state()["chat"]
    sent = [chat.page.post_question("One", request="request-1", number=1) for _ in range(2)]
    assert sent[0].json() == sent[1].json()
    chat.page.settled()
    assert chat.page.post_question("One", request="request-1", number=1).json() == sent[0].json()
    late = chat.page.post_question("From another window", number=before["number"])
    assert (late.status_code, "Load the page again" in late.json()["error"]) == (409, True)
    assert (said(chat.page.state())[0], len(chat.models.asked)) == ("One", 1)


@pytest.mark.parametrize("text", ["", " \n", None, 7, "x" * 20_001, "a\ud800b", "a\x00b"])
def test_a_question_that_is_no_text_is_refused(tmp_path: Path, text: Any) -> None:
    chat = Chat(tmp_path)
    chat.page.state()
    body = json.dumps({"conversation": 1, "number": 1, "request": "request-1", "text": text})
    refused = chat.page.http.post("/api/ask", content=body, headers={"content-type": "application/json"})
    assert refused.status_code == 422
    assert chat.page.state()["chat"]["number"] == 1


def test_forged_and_foreign_requests_are_refused(tmp_path: Path) -> None:
    chat = Chat(tmp_path, names="ana ben")
    pair = chat.pages[0].ask("Hello")
    turn = chat.project.store.connection.execute("SELECT id FROM turns").fetchone()[0]
    ben = chat.pages[1]
    assert ben.http.get(f"/api/progress/{turn}").status_code == 404
    assert chat.page.http.get("/api/progress/99999999999999999999").status_code == 404
    assert ben.choose(pair, [1, 2]).status_code == 409
    assert ben.post_question("Hi", conversation=pair["chat"]["conversation"]).status_code == 409
    for path in ("/api/ask", "/api/new"):
        forged = ben.http.post(path, json={}, headers={"origin": "http://evil.example"})
        assert forged.status_code == 403
        assert TestClient(chat.app, base_url="http://127.0.0.1").post(
            path, json={}, headers={"origin": "http://127.0.0.1"}
        ).status_code in (401, 422)


# ------------------------------------------------------------------------------------------------ waiting, stopping


def test_the_server_answers_others_while_a_model_writes_and_says_who_waits(tmp_path: Path) -> None:
    gate = threading.Event()
    chat = Chat(
        tmp_path, lambda _model, _messages, _before: Reply("It takes time.", gate=gate), "ana ben", compare_every=2
    )
    ana, ben = chat.pages
    turns = [page.post_question("Hello").json()["turn"] for page in (ana, ben)]
    assert [page.state()["chat"]["state"] for page in (ana, ben)] == ["waiting", "waiting"]
    deadline = time.monotonic() + 5
    while not (progress := ana.http.get(f"/api/progress/{turns[0]}").json())["text"] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert progress == {"waiting": True, "ahead": 0, "text": "It"}
    assert ben.http.get(f"/api/progress/{turns[1]}").json() == {"waiting": True, "ahead": 1, "text": ""}
    assert ana.post_question("More").status_code == 409
    gate.set()
    assert [said(page.settled()) for page in (ana, ben)] == [["Hello", "It takes time."]] * 2


def test_a_stop_in_the_midst_of_an_answer_leaves_the_question_and_it_is_answered_later(tmp_path: Path) -> None:
    gate = threading.Event()
    chat = Chat(tmp_path, lambda _model, _messages, _before: Reply("Half an answer", gate=gate))
    with chat.page.http:
        chat.page.post_question("Hello")
        assert chat.page.state()["chat"]["state"] == "waiting"
    chat.project.store.close()
    again = open_project(tmp_path)
    models = Models(numbered)
    page = Page(make_app(again, models=models), renew_token(again.store, "ana"))
    pair = page.settled()
    assert (said(pair), pair["chat"]["state"], len(models.asked)) == (["Hello"], "choose", 2)
    assert models.asked[0][2] == chat.models.asked[0][2], "the same seed as before"


# ------------------------------------------------------------------------------------------------ folders and settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "chat"}, "label.yaml:1: `mode: chat` needs `model:`"),
        ({"mode": "talk"}, "label.yaml:1: `mode` must be rows or chat, got 'talk'"),
        ({"model": "x"}, "label.yaml:1: `model` means nothing with `mode: rows`"),
        ({"mode": "chat", "model": "x", "overlap": 2}, "label.yaml:3: `overlap` means nothing with `mode: chat`"),
        ({"mode": "chat", "model": ["x", "x"]}, "label.yaml:2: `model` must name one model, or two different ones"),
        ({"mode": "chat", "model": 3}, "label.yaml:2: `model` must be the folder of a model"),
        ({"mode": "chat", "model": "x", "temperature": 0}, "label.yaml:3: with `temperature: 0` one model gives"),
        ({"mode": "chat", "model": "x", "compare_every": 0}, "label.yaml:3: `compare_every` must be a whole number from 1"),
        ({"mode": "chat", "model": "nowhere/at-all/x"}, "label.yaml:2: 'nowhere/at-all/x' is no folder; name a run's"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_served_get_one_line(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    (tmp_path / "label.yaml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    with pytest.raises(UserError) as error:
        loaded(tmp_path, read_settings(tmp_path))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def loaded(folder: Path, settings: Settings) -> Any:
    from pipeline.chat.labeled import load_labeled_models

    return load_labeled_models(folder, settings, lambda name: name)


def test_rows_and_other_models_are_refused(tmp_path: Path) -> None:
    chat = Chat(tmp_path / "chat")
    check_models(chat.project.store, chat.models.identities, tmp_path / "chat")
    check_models(chat.project.store, [{"weights_sha256": "other"}], tmp_path / "chat")  # nothing was said yet
    check_models(chat.project.store, chat.models.identities, tmp_path / "chat")
    chat.page.ask("Hello")
    check_models(chat.project.store, chat.models.identities[::-1], tmp_path / "chat")
    with pytest.raises(UserError, match=r"label.yaml:\d: another model than the 1 answers so far came from"):
        check_models(chat.project.store, [{"weights_sha256": "other"}], tmp_path / "chat")
    write_rows(tmp_path / "chat" / "rows.jsonl", [{"prompt": "p", "responses": ["a", "b"]}])
    with pytest.raises(UserError, match=r"rows.jsonl: with `mode: chat` no rows are labeled"):
        open_project(tmp_path / "chat")
    write_rows(tmp_path / "tasks.jsonl", [{"data": {"prompt": "p", "answer1": "a", "answer2": "b"}}])
    with pytest.raises(UserError, match=r"label.yaml:\d: with `mode: chat` no rows are labeled; import"):
        import_labels(tmp_path / "chat", tmp_path / "tasks.jsonl")


def test_a_database_from_before_the_chat_is_brought_up_to_date(tmp_path: Path) -> None:
    project = open_project(labeling_folder(tmp_path, [{"prompt": "p", "responses": ["a", "b"]}]))
    project.store.connection.executescript("DROP TABLE turns; DROP TABLE conversations; PRAGMA user_version = 1")
    project.store.close()
    store = Store(tmp_path)
    assert store.connection.execute("SELECT count(*) FROM turns").fetchone()[0] == 0
    assert store.connection.execute("SELECT count(*) FROM items").fetchone()[0] == 1
    store.close()

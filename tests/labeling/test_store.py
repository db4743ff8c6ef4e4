"""What a labeling folder keeps: items of its files, who gets which, each label once, and what it says to bad input."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any

from helpers.labeling import comparisons, labeling_folder, number, project_with, send, work, write_rows
from pipeline.errors import UserError
from pipeline.labeling.assignment import adjudicate, current_assignment
from pipeline.labeling.labelers import add_labeler, authenticate, renew_token, set_excluded
from pipeline.labeling.labels import Submission, draft_of, history, save_draft, skip, undo
from pipeline.labeling.project import open_project
from pipeline.labeling.refusal import Refused
from pipeline.labeling.store import DATABASE, Clock, Store, lock_folder

import pytest

# ------------------------------------------------------------------------------------------------ assignment


def test_each_item_gets_as_many_labelers_as_the_overlap_says_and_nobody_gets_it_twice(tmp_path: Path) -> None:
    project = project_with(tmp_path, "ana ben cy", overlap=2)
    got: dict[str, list[int]] = {"ana": [], "ben": [], "cy": []}
    for _ in range(6):
        for name, items in got.items():
            if (item := work(project, name)) is not None:
                items.append(item)
                send(project, item, name)
    assert all(len(set(items)) == len(items) for items in got.values())
    assert Counter(item for items in got.values() for item in items) == dict.fromkeys([1, 2, 3, 4], 2)


def test_an_open_item_is_kept_for_its_labeler_and_given_on_when_the_time_is_over(tmp_path: Path) -> None:
    project = project_with(tmp_path, "ana ben", comparisons(1))
    assert work(project) == work(project) == 1
    assert work(project, "ben") is None
    project.store.connection.execute("UPDATE assignments SET expires = 0")
    assert work(project, "ben") == 1
    send(project, 1)  # who comes late is not sent away
    send(project, 1, "ben")


def test_calibration_items_come_once_in_each_block_and_to_everybody(tmp_path: Path) -> None:
    known = [{**row, "ranks": [2, 1], "prompt": f"known {n}"} for n, row in enumerate(comparisons(3))]
    write_rows(tmp_path / "calibration.jsonl", known)
    project = project_with(tmp_path, "ana ben", comparisons(12), calibration_every=4, overlap=2)
    calibration = {row["id"] for row in project.store.connection.execute("SELECT id FROM items WHERE calibration = 1")}
    for name in ("ana", "ben"):
        seen = []
        while (item := work(project, name)) is not None:
            seen.append(item in calibration)
            send(project, item, name)
        assert len(seen) == 15
        assert [sum(seen[block : block + 4]) for block in (0, 4, 8)] == [1, 1, 1]


def test_the_order_of_answers_is_shuffled_per_labeler_and_stays(tmp_path: Path) -> None:
    project = project_with(tmp_path, "ana ben", comparisons(30, 4), overlap=2)
    orders: dict[str, list[list[int]]] = {"ana": [], "ben": []}
    for name, seen in orders.items():
        while assignment := current_assignment(project.store, project.settings, number(project, name)):
            again = current_assignment(project.store, project.settings, number(project, name))
            assert again is not None
            assert again.shown == assignment.shown
            seen.append(assignment.shown)
            send(project, assignment.item, name, raw={"ranks": [1, 2, 3, 4]})
    assert sum(a != b for a, b in zip(orders["ana"], orders["ben"], strict=True)) > 20
    assert len({tuple(order) for order in orders["ana"]}) > 10


def test_a_lead_adjudicates_beyond_the_overlap(tmp_path: Path) -> None:
    project = project_with(tmp_path, "ana boss", comparisons(1))
    send(project, work(project) or 0)
    assert work(project, "boss") is None
    assert adjudicate(project.store, project.settings, number(project, "boss"), 1).item == 1
    send(project, 1, "boss")


# ------------------------------------------------------------------------------------------------ labels


def test_the_same_submission_twice_is_one_label(tmp_path: Path) -> None:
    project = project_with(tmp_path)
    item = work(project) or 0
    assert send(project, item, request="the-same-one") == send(project, item, request="the-same-one")
    with pytest.raises(Refused, match="labeled this item already"):
        send(project, item)
    assert project.store.connection.execute("SELECT count(*) FROM labels").fetchone()[0] == 1


def test_an_edit_replaces_what_it_says_it_replaces(tmp_path: Path) -> None:
    project = project_with(tmp_path)
    item = work(project) or 0
    first = send(project, item)
    second = send(project, item, replaces=first, raw={"ranks": [1, 1]})
    with pytest.raises(Refused, match="already"):
        send(project, item, replaces=first)
    with pytest.raises(Refused, match="changed in the meantime"):
        undo(project.store, project.settings, number(project), first)
    assert [label["id"] for label in history(project.store, number(project))] == [second]


def test_undo_opens_the_item_again_with_the_label_as_its_draft(tmp_path: Path) -> None:
    project = project_with(tmp_path)
    item = work(project) or 0
    label = send(project, item)
    assert work(project) != item
    assert undo(project.store, project.settings, number(project), label) == item
    assert work(project) == item
    assert draft_of(project.store, number(project), item)["strength"] == 3
    assert undo(project.store, project.settings, number(project), label) == item  # twice is once


def test_drafts_stay_and_skips_have_a_reason(tmp_path: Path) -> None:
    project = project_with(tmp_path)
    item = work(project) or 0
    save_draft(project.store, number(project), item, {"response": "half"})
    assert draft_of(project.store, number(project), item) == {"response": "half"}
    submission = Submission(item=item, request="request-1", replaces=0, raw=" ", seconds=1)
    with pytest.raises(Refused, match="why"):
        skip(project.store, project.settings, number(project), submission)
    skip(project.store, project.settings, number(project), Submission(item, "request-1", 0, "too hard", 1))
    assert draft_of(project.store, number(project), item) is None
    assert work(project) != item
    assert history(project.store, number(project))[0]["kind"] == "skip"


@pytest.mark.parametrize(
    "raw",
    [
        None, [], {}, {"ranks": [1]}, {"ranks": [1, 2, 3]}, {"ranks": [0, 1]}, {"ranks": [1, 3]}, {"ranks": ["1", "2"]}, {"ranks": [1.0, 2.0]},
        {"ranks": [True, 2]}, {"ranks": [1, None]}, {"ranks": [None, None]}, {"ranks": [1, 2]}, {"ranks": [1, 2], "strength": 5},
        {"ranks": [1, 1], "strength": 2}, {"ranks": [1, 2], "strength": 1, "both_bad": True}, {"ranks": [1, 1], "flags": [["x"], []]},
        {"ranks": [1, 1], "quality": [8, 1]}, {"ranks": [1, 1], "response": "not asked for"}, {"ranks": [1, 1], "sources": "x"},
    ],
)  # fmt: skip
def test_ranks_that_are_no_ranking_are_refused_and_nothing_is_counted(tmp_path: Path, raw: Any) -> None:
    project = project_with(tmp_path)
    item = work(project) or 0
    with pytest.raises(Refused) as refused:
        send(project, item, raw=raw)
    assert refused.value.status == 422
    assert project.store.connection.execute("SELECT count(*) FROM labels").fetchone()[0] == 0


def test_an_item_that_was_not_given_is_refused(tmp_path: Path) -> None:
    project = project_with(tmp_path)
    with pytest.raises(Refused, match="not given to you"):
        send(project, 3)


def test_a_full_disk_loses_nothing_that_was_confirmed(tmp_path: Path) -> None:
    project = project_with(tmp_path, rows=comparisons(400))
    connection = project.store.connection
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count = {pages + 2}")
    confirmed: list[int] = []

    def fill_the_disk() -> None:
        for _ in range(400):
            confirmed.append(send(project, work(project) or 0, raw={"ranks": [1, 2], "strength": 1}))

    with pytest.raises(sqlite3.OperationalError, match="full"):
        fill_the_disk()
    assert confirmed
    project.store.close()
    again = open_project(tmp_path)
    assert [row[0] for row in again.store.connection.execute("SELECT id FROM labels ORDER BY id")] == confirmed


def test_a_clock_that_goes_back_is_named_and_times_do_not(caplog: pytest.LogCaptureFixture) -> None:
    times = iter([1000.0, 400.0, 401.0, 2000.0])
    clock = Clock(last=0, wall=lambda: next(times))
    read = [clock.now() for _ in range(4)]
    assert read == sorted(read)
    assert read[3] == 2000.0
    assert sum("clock went back" in message for message in caplog.messages) == 1


def test_every_commit_is_synced(tmp_path: Path) -> None:
    project = project_with(tmp_path)
    assert project.store.connection.execute("PRAGMA synchronous").fetchone()[0] == 2
    assert project.store.connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal"


# ------------------------------------------------------------------------------------------------ labelers


def test_tokens_are_kept_as_hashes_and_renewed(tmp_path: Path) -> None:
    project = project_with(tmp_path, "")
    token = add_labeler(project.store, "ana")
    assert authenticate(project.store, token).name == "ana"
    project.store.close()
    assert all(token.encode() not in path.read_bytes() for path in tmp_path.iterdir())
    store = Store(tmp_path)
    assert authenticate(store, renew_token(store, "ana")).name == "ana"
    with pytest.raises(Refused, match="not valid"):
        authenticate(store, token)
    with pytest.raises(UserError, match="exists"):
        add_labeler(store, "ana")
    for name in ("", "a/b", "x" * 65, "a\nb", "<b>"):
        with pytest.raises(UserError, match="cannot be a labeler's name"):
            add_labeler(store, name)


def test_a_token_of_another_project_is_told_so(tmp_path: Path) -> None:
    one, other = project_with(tmp_path / "one", ""), project_with(tmp_path / "other", "")
    with pytest.raises(Refused, match="another labeling project"):
        authenticate(one.store, add_labeler(other.store, "ana"))


def test_an_excluded_labeler_is_sent_away_and_altogether_frees_the_items(tmp_path: Path) -> None:
    project = project_with(tmp_path, "ben", comparisons(1))
    token = add_labeler(project.store, "ana")
    send(project, work(project) or 0)
    set_excluded(project.store, "ana", "from_now", 1)
    with pytest.raises(Refused, match="ended your work"):
        authenticate(project.store, token)
    assert work(project, "ben") is None
    set_excluded(project.store, "ana", "altogether", 1)
    assert work(project, "ben") == 1
    set_excluded(project.store, "ana", None, 1)
    assert authenticate(project.store, token).name == "ana"


# ------------------------------------------------------------------------------------------------ folders and files


def test_new_rows_are_added_and_labels_stay(tmp_path: Path) -> None:
    project = project_with(tmp_path)
    send(project, work(project) or 0)
    project.store.close()
    project = project_with(tmp_path, rows=comparisons(6))
    assert project.store.connection.execute("SELECT count(*), max(id) FROM items").fetchone()[0] == 6
    assert len(history(project.store, number(project))) == 1


def test_a_folder_of_other_rows_is_refused_where_labels_would_be_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    project = project_with(tmp_path)
    project.store.close()
    project = project_with(tmp_path, rows=comparisons(8)[4:])  # nothing was labeled: only said
    assert "are not shown any more" in caplog.text
    send(project, work(project) or 0)
    project.store.close()
    with pytest.raises(UserError, match=r"rows\.jsonl: 1 rows that were labeled are not in the folder any more"):
        project_with(tmp_path, rows=comparisons(4))
    (tmp_path / "rows.jsonl").rename(tmp_path / "renamed.jsonl")  # the same rows in another file are the same items
    write_rows(tmp_path / "renamed.jsonl", comparisons(8)[4:])
    project = open_project(tmp_path)
    assert len(history(project.store, number(project))) == 1


def test_a_changed_model_is_refused_with_its_line(tmp_path: Path) -> None:
    rows = comparisons(4)
    project = project_with(tmp_path, rows=rows)
    send(project, work(project) or 0)
    project.store.close()
    rows[0]["sources"][0]["weights_sha256"] = "f" * 64
    with pytest.raises(UserError, match=r"rows\.jsonl:1: `sources` of this row has changed since it was labeled"):
        project_with(tmp_path, rows=rows)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a document"}\n', ":1: needs `prompt` and `responses`"),
        ('{"prompt": "p", "response": "a demonstration"}\n', ":1: needs `prompt` and `responses`"),
        ('{"prompt": "p", "responses": ["a", "b"]}\n{"prompt": "p"', ":2: not valid JSON"),
        ('{"prompt": "p", "responses": ["one"]}\n', ":1: 1 responses; give 2 to 26"),
        ('{"prompt": "p", "responses": ["a", 1]}\n', ":1: `responses` must be a list of texts"),
        ('{"prompt": " ", "responses": ["a", "b"]}\n', ":1: `prompt` is empty"),
        ('{"prompt": "p", "responses": ["a", "a"]}\n', "no row of it can be labeled"),
        ("", "is empty"),
    ],
)
def test_rows_that_are_none_of_ours_get_their_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"rows\.jsonl") as refused:
        open_project(tmp_path)
    assert message in str(refused.value)


def test_rows_that_nobody_can_compare_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = comparisons(2)
    rows = [*good, good[0], {"prompt": "p", "responses": ["a", "a"]}, {"prompt": "p", "responses": ["a", " "]}]
    project = project_with(tmp_path, rows=rows)
    assert project.store.connection.execute("SELECT count(*) FROM items").fetchone()[0] == 2
    assert "3 rows left out in all" in caplog.text
    assert "a response is empty (lines 5)" in caplog.text


def test_pairs_in_columns_of_their_own_and_prompts_alone_are_items(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p1", "chosen": "a", "rejected": "b"},
        {"prompt": "p2", "response_a": "a", "response_b": "b", "model_a": "x"},
        {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]},
    ]
    project = project_with(tmp_path, rows=rows)
    stored = [json.loads(row["row"]) for row in project.store.connection.execute("SELECT row FROM items ORDER BY id")]
    assert [row["responses"] for row in stored] == [["a", "b"], ["a", "b"], []]


@pytest.mark.parametrize("damage", ["noise", "cut", "other"])
def test_a_half_written_database_is_named_and_left_as_it_is(tmp_path: Path, damage: str) -> None:
    project = project_with(tmp_path, rows=comparisons(200))
    project.store.close()
    path = tmp_path / DATABASE
    if damage == "other":
        path.unlink()
        with contextlib.closing(sqlite3.connect(path)) as other:
            other.execute("CREATE TABLE mine (x)")
    else:
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"noise" * 1000)
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"labels\.sqlite3.*(no whole database|another program's)"):
        open_project(tmp_path)
    assert path.read_bytes() == before


def test_an_empty_database_file_is_a_new_one(tmp_path: Path) -> None:
    (tmp_path / DATABASE).write_bytes(b"")
    assert work(project_with(tmp_path)) == 1


def test_two_servers_on_one_folder(tmp_path: Path) -> None:
    with (
        lock_folder(tmp_path, "http://127.0.0.1:1"),
        pytest.raises(UserError, match=r"served already \(process \d+, http://127"),
    ):
        lock_folder(tmp_path, "http://127.0.0.1:2")
    lock_folder(tmp_path, "http://127.0.0.1:2").close()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("overlap: 0", "label.yaml:1: `overlap` must be a whole number from 1 to 1000, got 0"),
        ("title: x\nflag: [a]", "label.yaml:2: unknown key 'flag'"),
        ("margins: [0, 1]", "`margins` must be 4 rising numbers"),
        ("flags: [a, a]", "must not name anything twice"),
        ("strength: 1", "`strength` must be true or false"),
        ("- a", "must hold `key: value` lines"),
        ("a: [", "is no valid YAML"),
    ],
)
def test_settings_are_checked(tmp_path: Path, text: str, message: str) -> None:
    labeling_folder(tmp_path, comparisons(1))
    (tmp_path / "label.yaml").write_text(text)
    with pytest.raises(UserError) as refused:
        open_project(tmp_path)
    assert message in str(refused.value)

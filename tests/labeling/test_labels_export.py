"""Labels as records: what `rlhf check` reads, incremental, and through Label Studio's and Argilla's files and back."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from helpers.labeling import comparisons, number, project_with, read_jsonl, send, work, write_rows
from pipeline.commands.check_data import check_data
from pipeline.data.files import iter_rows
from pipeline.data.layouts import expand_row
from pipeline.data.records import PARSERS, read_records
from pipeline.errors import UserError
from pipeline.labeling.assignment import current_assignment
from pipeline.labeling.export import export
from pipeline.labeling.importing import import_labels
from pipeline.labeling.interchange import write_labels
from pipeline.labeling.labelers import set_excluded
from pipeline.labeling.labels import Submission, submit, undo
from pipeline.labeling.project import Project, open_project
from pipeline.labeling.refusal import Refused
from pipeline.labeling.statistics import project_statistics

import pytest

FLAGS = ["Hallucination", "Harmful advice"]


def labeled(folder: Path) -> Project:
    """Two labelers, every mode: pairs, a ranking with a tie and an unranked answer, both bad, a written answer."""
    rows = [*comparisons(3), *comparisons(2, 4), {"prompt": "Write me a poem."}]
    rows[0]["split"] = "test"
    project = project_with(folder, "ana ben", rows, overlap=2, quality=True, flags=FLAGS, better_answer=True)
    for name in ("ana", "ben"):
        while assignment := current_assignment(project.store, project.settings, number(project, name)):
            count = len(assignment.shown)
            raw: dict[str, Any] = {"ranks": [2, 1], "strength": 4} if count == 2 else {"ranks": [1, 3, 3, None]}
            raw |= {"quality": [7, *[None] * (count - 1)], "flags": [[FLAGS[1]], *[[]] * (count - 1)]}
            if assignment.item == 2:
                raw = {"ranks": [1, 1], "both_bad": True, "response": "A better one."}
            send(project, assignment.item, name, raw=raw if count else {"response": "Roses are red."})
    return project


def without(record: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in names}


def test_labels_are_rankings_and_demonstrations_in_the_order_of_the_file(tmp_path: Path) -> None:
    project = labeled(tmp_path)
    done = export(project.store, project.settings)
    rankings, demonstrations = (read_jsonl(done.folder / f"{kind}.jsonl") for kind in ("rankings", "demonstrations"))
    assert (len(rankings), len(demonstrations)) == (10, 4)
    for row in rankings:
        shown = [row["responses"][place] for place in row["shown"]]
        order = [row["ranks"][place] for place in row["shown"]]
        if row.get("both_bad"):
            assert (order, row.get("margin")) == ([1, 1], None)
            continue
        assert row["flags"][row["shown"][0]] == [FLAGS[1]]
        assert row["quality"][row["shown"][0]] == 7
        assert sorted(shown) == sorted(row["responses"])
        assert (order, row.get("margin")) == (([2, 1], 1.0) if len(shown) == 2 else ([1, 2, 2, None], None))
        assert row["sources"][0]["weights_sha256"] == "0" * 64
    assert {row["labeler"] for row in rankings} == {"ana", "ben"}
    assert rankings[0]["split"] == "test"
    assert {row["response"] for row in demonstrations} == {"A better one.", "Roses are red."}
    records = read_records(done.folder / "rankings.jsonl", PARSERS["ranking"])
    assert {len(record["responses"]) for record in records} == {2, 3}  # what was not ranked is not compared
    assert len(read_records(done.folder / "demonstrations.jsonl", PARSERS["demonstration"])) == 4


def test_check_is_happy_with_the_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    project = labeled(tmp_path)
    done = export(project.store, project.settings)
    assert check_data(str(done.folder / "rankings.jsonl"), as_json=True) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["labelers"]) == (10, {"ana": 5, "ben": 5})
    assert found["agreement"]["judged_pairs"] > 3
    # The fixture ranks by place, and places are shuffled per labeler: ana and ben may disagree, nothing else is wrong.
    assert {name.split(":")[0] for name in found["problems"]} <= {"all responses tie", "contradicts"}
    assert found["trainable"] == 10 - sum(problem["rows"] for problem in found["problems"].values())


def test_an_incremental_export_never_changes_a_line(tmp_path: Path) -> None:
    project = project_with(tmp_path)
    first = send(project, work(project) or 0)
    done = export(project.store, project.settings)
    path = done.folder / "rankings.jsonl"
    before = path.read_bytes()
    with pytest.raises(Refused, match="exported already"):
        send(project, 1, replaces=first)
    with pytest.raises(Refused, match="exported already"):
        undo(project.store, project.settings, number(project), first)
    send(project, work(project) or 0)
    path.write_bytes(before + b'{"id": "half a li')  # a kill in the middle of an export
    again = export(project.store, project.settings)
    assert (again.before["ranking"], again.added["ranking"]) == (1, 1)
    assert path.read_bytes().startswith(before)
    assert [row["id"] for row in read_jsonl(path)] == [f"{project.store.project}-{n}" for n in (1, 2)]
    assert export(project.store, project.settings).added["ranking"] == 0


def test_labels_of_a_labeler_excluded_altogether_are_not_exported_and_written_lines_stay(tmp_path: Path) -> None:
    project = project_with(tmp_path, "ana ben")
    send(project, work(project) or 0)
    send(project, work(project, "ben") or 0, "ben")
    export(project.store, project.settings)
    set_excluded(project.store, "ana", "altogether", 1)
    assert export(project.store, project.settings).excluded == 1
    fresh = export(project.store, project.settings, tmp_path / "fresh")
    assert [row["labeler"] for row in read_jsonl(fresh.folder / "rankings.jsonl")] == ["ben"]


def test_calibration_items_and_skips_are_not_exported(tmp_path: Path) -> None:
    write_rows(tmp_path / "calibration.jsonl", [{**comparisons(9)[8], "ranks": [1, 2]}])
    project = project_with(tmp_path, rows=comparisons(3), calibration_every=2)
    items = []
    while (item := work(project)) is not None:
        items.append(item)
        send(project, item)
    assert len(items) == 4
    assert export(project.store, project.settings).added["ranking"] == 3


def test_a_file_of_something_else_is_not_appended_to(tmp_path: Path) -> None:
    project = project_with(tmp_path)
    write_rows(tmp_path / "other" / "rankings.jsonl", comparisons(1))
    with pytest.raises(UserError, match=r"rankings\.jsonl:1: is no export of this project"):
        export(project.store, project.settings, tmp_path / "other")


@pytest.mark.parametrize("format_name", ["label-studio", "argilla"])
def test_labels_go_through_other_tools_files_and_come_back_the_same(tmp_path: Path, format_name: str) -> None:
    project = labeled(tmp_path / "one")
    assert write_labels(project.store, format_name, tmp_path / "out.json") == 12
    done = import_labels(tmp_path / "two", tmp_path / "out.json")
    assert (done.items, done.labels) == (6, 12)
    assert import_labels(tmp_path / "two", tmp_path / "out.json").labels == 0
    (tmp_path / "two" / "label.yaml").write_text((tmp_path / "one" / "label.yaml").read_text())
    other = open_project(tmp_path / "two")
    for kind in ("rankings", "demonstrations"):
        ours, theirs = (
            [without(row, "id", "item") for row in read_jsonl(export(p.store, p.settings).folder / f"{kind}.jsonl")]
            for p in (project, other)
        )
        key = lambda row: (row["prompt"], row["labeler"], len(row.get("responses", [])))  # noqa: E731
        assert sorted(ours, key=key) == sorted(theirs, key=key)
        assert ours


def test_other_readers_of_these_tools_read_our_argilla_file(tmp_path: Path) -> None:
    project = project_with(tmp_path, rows=comparisons(1, 3))
    send(project, work(project) or 0, raw={"ranks": [1, 2, 2]})
    write_labels(project.store, "argilla", tmp_path / "out.json")
    (row,) = [judged for file_row in iter_rows(tmp_path / "out.json") for judged in expand_row(file_row.columns or {})]
    assert sorted(row["ranks"]) == [1, 2, 2]
    assert row["labeler"] == "ana"


def label_studio(number: int, selected: str | None) -> dict[str, Any]:
    result = [{"from_name": "pref", "type": "pairwise", "value": {"selected": selected}}]
    annotations = [{"completed_by": 3, "result": result}] if selected else []
    return {
        "id": number,
        "data": {"prompt": f"Q {number}", "answer1": "Sorry.", "answer2": "No."},
        "annotations": annotations,
    }


def test_files_of_label_studio_and_argilla_are_imported(tmp_path: Path) -> None:
    tasks = [label_studio(1, "left"), label_studio(2, "right"), label_studio(3, None)]
    (tmp_path / "ls.json").write_text(json.dumps(tasks, indent=2))
    done = import_labels(tmp_path / "one", tmp_path / "ls.json")
    assert (done.items, done.labels) == (3, 2)
    with contextlib.closing(open_project(tmp_path / "one").store) as store:
        rows = read_jsonl(export(store, open_project(tmp_path / "one").settings).folder / "rankings.jsonl")
    assert [(row["ranks"], row["labeler"]) for row in rows] == [([1, 2], "3"), ([2, 1], "3")]
    ranked = {"data": {"prompt": "p", "items": [{"id": "x", "body": "a"}, {"id": "y", "body": "b"}]},
              "annotations": [{"completed_by": {"email": "a@b.c"}, "result": [{"from_name": "r", "type": "ranker", "value": {"ranker": {"rank": ["y", "x"]}}}]}]}  # fmt: skip
    argilla = {"id": "u", "fields": {"prompt": "p", "response-1": "a", "response-2": "b"},
               "responses": {"order": [{"user_id": "ana", "value": ["response-2", "response-1"], "status": "submitted"},
                                       {"user_id": "ben", "value": ["response-1", "response-2"], "status": "draft"}]}}  # fmt: skip
    for name, row in (("ranked", ranked), ("argilla", argilla)):
        (tmp_path / f"{name}.json").write_text(json.dumps([row]))
        import_labels(tmp_path / name, tmp_path / f"{name}.json")
        project = open_project(tmp_path / name)
        (row,) = read_jsonl(export(project.store, project.settings).folder / "rankings.jsonl")
        assert (row["prompt"], row["responses"], row["ranks"]) == ("p", ["a", "b"], [2, 1])


FOREIGN: dict[str, list[dict[str, Any]]] = {
    "label-studio pairwise": [label_studio(1, "left"), label_studio(2, "right"), label_studio(3, None)],
    "label-studio ranker": [
        {"id": 7, "data": {"prompt": "p", "source": "crm", "items": [{"id": n, "title": n, "body": n * 3} for n in "xyz"]},
         "annotations": [
             {"completed_by": {"id": 4, "email": "a@b.c"}, "lead_time": 12.5, "was_cancelled": False,
              "result": [{"from_name": "r", "to_name": "i", "type": "ranker", "value": {"ranker": {"rank": ["y", "x", "z"]}}}]},
             {"completed_by": 5, "was_cancelled": True, "result": []},
             {"completed_by": 6, "lead_time": 3,
              "result": [{"from_name": "r", "to_name": "i", "type": "ranker",
                          "value": {"ranker": {"rank-1": ["z", "x"], "rank-2": ["y"], "_": []}}}]}]}
    ],
    "argilla ranking": [
        {"id": "u", "status": "completed", "metadata": {"source": "crm"},
         "fields": {"prompt": "p", "response-1": "a", "response-2": "b", "response-3": "c"},
         "responses": {"order": [{"user_id": "ana", "value": [{"value": "response-2", "rank": 1}, {"value": "response-1", "rank": 2},
                                                              {"value": "response-3", "rank": 2}], "status": "submitted"},
                                 {"user_id": "ben", "value": ["response-1", "response-3", "response-2"], "status": "submitted"},
                                 {"user_id": "eva", "value": ["response-3", "response-1", "response-2"], "status": "draft"}]}}
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("format_name", ["label-studio", "argilla"])
def test_a_foreign_file_imported_exported_and_imported_again_is_the_same(
    tmp_path: Path, name: str, format_name: str
) -> None:
    (tmp_path / "theirs.json").write_text(json.dumps(FOREIGN[name], indent=2), encoding="utf-8")
    exports = []
    for folder, file in (("one", "theirs.json"), ("two", "out.json")):
        done = import_labels(tmp_path / folder, tmp_path / file)
        project = open_project(tmp_path / folder)
        rows = read_jsonl(export(project.store, project.settings).folder / "rankings.jsonl")
        exports.append([without(row, "id", "item") for row in rows])
        assert done.labels == len(rows) == 2
        if folder == "one":
            write_labels(project.store, format_name, tmp_path / "out.json")
        project.store.close()
    assert exports[0] == exports[1]


@pytest.mark.parametrize(
    "row",
    [{"prompt": "p"}, {"data": {"items": [{"id": 1}]}, "annotations": []}, {"fields": {"a": "b"}, "responses": 3}],
)
def test_what_is_no_task_is_refused_with_its_line(tmp_path: Path, row: dict[str, Any]) -> None:
    write_rows(tmp_path / "tasks.jsonl", [label_studio(1, "left"), row])
    with pytest.raises(UserError, match=r"tasks\.jsonl:2: "):
        import_labels(tmp_path / "folder", tmp_path / "tasks.jsonl")
    assert not list((tmp_path / "folder").iterdir())


# ------------------------------------------------------------------------------------------------ the lead's numbers


def test_agreement_bias_accuracy_and_disagreement(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{n}", "responses": ["short", "a much longer answer"]} for n in range(10)]
    write_rows(
        tmp_path / "calibration.jsonl", [{**row, "prompt": f"k{n}", "ranks": [2, 1]} for n, row in enumerate(rows)]
    )
    project = project_with(tmp_path, "long first", rows, overlap=2, calibration_every=2, strength=False)
    for name in ("long", "first"):
        while assignment := current_assignment(project.store, project.settings, number(project, name)):
            prefer = assignment.shown.index(1) if name == "long" else 0
            submission = Submission(
                assignment.item, f"request-{assignment.item}", 0, {"ranks": [1, 2] if prefer == 0 else [2, 1]}, 1
            )
            submit(project.store, project.settings, number(project, name), submission)
    with project.store.reader() as connection:
        found = project_statistics(connection, project.store.now(), 2)
    long, first = found.labelers["long"], found.labelers["first"]
    assert (long.longer.share, long.calibration.share, first.first.share) == (1.0, 1.0, 1.0)
    assert 0 < (first.longer.share or 0) < 1
    assert first.calibration.share == pytest.approx(
        sum(project.store.connection.execute("SELECT sum(shown = '[1, 0]') FROM assignments a JOIN items i ON i.id = a.item WHERE labeler = ? AND calibration = 1", (number(project, "first"),)).fetchone()) / first.calibration.total
    )  # fmt: skip
    differing = len(found.disagreements)
    assert (found.items, found.complete, found.labels) == (10, 10, long.labels + first.labels)
    assert found.agreement == pytest.approx(1 - differing / 10)
    assert long.agreement.share == first.agreement.share == found.agreement
    assert found.alpha is not None
    assert found.alpha < 0.9

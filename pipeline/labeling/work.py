"""An item as the page shows it to one labeler: never its sources, never what others said."""

from __future__ import annotations

import json
from typing import Any

from pipeline.data.records import parse_prompt
from pipeline.labeling.answers import Answer, as_shown
from pipeline.labeling.assignment import Assignment, adjudicate, current_assignment, own_assignment
from pipeline.labeling.labelers import Labeler
from pipeline.labeling.labels import current_label, draft_of, went_on
from pipeline.labeling.project import Project


def current_work(project: Project, labeler: Labeler) -> dict[str, Any]:
    """The item that the labeler works on; `item` is None where nothing is left for them."""
    assignment = current_assignment(project.store, project.settings, labeler.id)
    if assignment is None:
        return {"item": None, "done": done(project, labeler)}
    return item_work(project, labeler, assignment)


def work_on(project: Project, labeler: Labeler, item: int) -> dict[str, Any]:
    """An item that the labeler was given before; for a lead, any item, to adjudicate."""
    if labeler.lead:
        return item_work(project, labeler, adjudicate(project.store, project.settings, labeler.id, item))
    return item_work(project, labeler, own_assignment(project.store, labeler.id, item))


def item_work(project: Project, labeler: Labeler, assignment: Assignment) -> dict[str, Any]:
    """An item with the labeler's draft and label, in the order shown."""
    store = project.store
    responses = assignment.row["responses"]
    label = current_label(store.connection, labeler.id, assignment.item)
    return {
        "item": assignment.item,
        "prompt": parse_prompt({"prompt": assignment.row["prompt"]})["prompt"],
        "responses": [responses[place] for place in assignment.shown],
        "draft": draft_of(store, labeler.id, assignment.item),
        "label": None
        if label is None
        else {
            "id": label["id"],
            "kind": label["kind"],
            "exported": bool(label["exported"]),
            "went_on": went_on(store.connection, assignment.item) and not assignment.adjudication,
            "answer": as_shown(Answer.from_json(label["answer"]), assignment.shown)
            if label["kind"] == "label"
            else None,
            "reason": json.loads(label["answer"]) if label["kind"] == "skip" else None,
        },
        "done": done(project, labeler),
    }


def done(project: Project, labeler: Labeler) -> int:
    """How many labels a labeler has."""
    return int(
        project.store.connection.execute(
            "SELECT count(*) FROM labels WHERE labeler = ? AND current = 1 AND kind = 'label'", (labeler.id,)
        ).fetchone()[0]
    )

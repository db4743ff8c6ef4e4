"""The lead's pages: progress, agreement, bias, disagreement; excluding labelers; export."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from typing import Any
from urllib.parse import parse_qs

from pipeline.data.records import parse_prompt
from pipeline.labeling.answers import Answer
from pipeline.labeling.export import Exported, export
from pipeline.labeling.labelers import Labeler, labelers, set_excluded
from pipeline.labeling.project import Project
from pipeline.labeling.refusal import Refused
from pipeline.labeling.requests import in_store
from pipeline.labeling.statistics import ProjectStatistics, project_statistics
from pipeline.labeling.store import Store

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route
from starlette.templating import Jinja2Templates

EXCLUSIONS = {"": None, "from_now": "from_now", "altogether": "altogether"}


def lead_routes() -> list[Route]:
    return [
        Route("/lead", lead_page),
        Route("/lead/items/{item:int}", item_page),
        Route("/lead/exclude", post_exclude, methods=["POST"]),
        Route("/lead/export", post_export, methods=["POST"]),
    ]


async def lead_page(request: Request) -> Response:
    await _for_lead(request)
    return await _lead_page(request, "")


async def _lead_page(request: Request, notice: str) -> Response:
    project: Project = request.app.state.project
    context = {
        "title": project.settings.title,
        "project": project,
        "statistics": await run_in_threadpool(_statistics, project),
        "people": await in_store(request, lambda project, _: labelers(project.store)),
        "notice": notice,
    }
    return _page(request, "lead.html", context)


def _statistics(project: Project) -> ProjectStatistics:
    """In another thread and by another connection than labels are saved with."""
    with project.store.reader() as connection:
        return project_statistics(connection, project.store.now(), project.settings.overlap)


async def _for_lead(request: Request) -> Project:
    def check(project: Project, labeler: Labeler) -> Project:
        if not labeler.lead:
            raise Refused(403, "This page is the lead's. Your own page is at the start address.")
        return project

    return await in_store(request, check)


async def item_page(request: Request) -> Response:
    project = await _for_lead(request)
    item = request.path_params["item"]
    with project.store.reader() as connection:
        row = connection.execute("SELECT * FROM items WHERE id = ?", (item,)).fetchone()
        if row is None:
            raise Refused(404, "There is no such item.")
        labels = [_label_row(label) for label in connection.execute(_LABELS_OF_ITEM, (item,))]
    columns = json.loads(row["row"])
    context = {
        "title": project.settings.title,
        "item": row,
        "prompt": parse_prompt({"prompt": columns["prompt"]})["prompt"],
        "responses": columns["responses"],
        "sources": columns.get("sources") or [],
        "known": json.loads(row["known"]) if row["known"] else None,
        "labels": labels,
    }
    return _page(request, "lead_item.html", context)


_LABELS_OF_ITEM = (
    "SELECT r.name, r.excluded, l.kind, l.answer, l.seconds, a.shown, a.adjudication FROM labels l "
    "JOIN labelers r ON r.id = l.labeler JOIN assignments a ON a.item = l.item AND a.labeler = l.labeler "
    "WHERE l.item = ? AND l.current = 1 ORDER BY l.id"
)


def _label_row(row: sqlite3.Row) -> dict[str, Any]:
    answer = Answer.from_json(row["answer"]) if row["kind"] == "label" else None
    reason = json.loads(row["answer"]) if answer is None else None
    return {**dict(row), "answer": answer, "reason": reason, "shown": json.loads(row["shown"])}


async def _form(request: Request) -> dict[str, str]:
    fields = parse_qs((await request.body()).decode("utf-8", "replace"), keep_blank_values=True)
    return {name: values[0] for name, values in fields.items()}


async def post_exclude(request: Request) -> Response:
    """Exclude a labeler from now on or altogether, or let them in again."""
    await _for_lead(request)
    form = await _form(request)
    name, choice = form.get("name", ""), form.get("excluded", "?")
    if choice not in EXCLUSIONS:
        raise Refused(422, "Exclude from now on, altogether, or not.")

    def work(project: Project, labeler: Labeler) -> None:
        known = {person.name: person for person in labelers(project.store)}
        if name not in known or known[name].lead:
            raise Refused(422, "There is no such labeler, or it is a lead.")
        set_excluded(project.store, name, EXCLUSIONS[choice], project.settings.overlap)

    await in_store(request, work)
    return RedirectResponse("/lead", status_code=303)


async def post_export(request: Request) -> Response:
    """Append new labels to the files in the folder, beside the labelers' requests."""
    project = await _for_lead(request)
    done = await run_in_threadpool(_export, project)
    added = ", ".join(f"{count} new {kind}s" for kind, count in done.added.items())
    notice = f"Exported to {done.folder}: {added}."
    if done.excluded:
        notice += f" {done.excluded} earlier lines are of labelers excluded altogether; `rlhf label export --to` leaves them out."
    return await _lead_page(request, notice)


def _export(project: Project) -> Exported:
    with contextlib.closing(Store(project.folder)) as store:
        return export(store, project.settings)


def _page(request: Request, name: str, context: dict[str, Any]) -> Response:
    templates: Jinja2Templates = request.app.state.templates
    return templates.TemplateResponse(request, name, context)

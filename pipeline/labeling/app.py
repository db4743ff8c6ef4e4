"""The web application: pages for labelers and for the lead, and the requests that these pages make."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sqlite3
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from urllib.parse import urlsplit

from pipeline.labeling.access import Guard
from pipeline.labeling.guidelines import guidelines_html
from pipeline.labeling.labelers import authenticate
from pipeline.labeling.labels import Submission, history, save_draft, skip, submit, undo
from pipeline.labeling.lead import lead_routes
from pipeline.labeling.live import Generation, Models, live_routes, live_work
from pipeline.labeling.project import Project
from pipeline.labeling.refusal import Refused
from pipeline.labeling.requests import cookie_name, in_store, json_body, whole_number
from pipeline.labeling.store import is_full
from pipeline.labeling.work import current_work, work_on

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.templating import Jinja2Templates

logger = logging.getLogger(__name__)
HERE = Path(__file__).parent
COOKIE_SECONDS = 90 * 24 * 3600


def make_app(project: Project, public_url: str | None = None, models: Models | None = None) -> Starlette:
    """The application over an open project. All work on the store is done in one thread, in the order of arrival.

    Args:
        models: those that labelers chat with, where the project's mode says so.
    """
    public_host = urlsplit(public_url).netloc if public_url else None
    thread = ThreadPoolExecutor(1, thread_name_prefix="store")
    generation = None if models is None else Generation(project, models, lambda work: thread.submit(work).result())

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        if generation is not None:
            await run_in_threadpool(generation.stop)

    app = Starlette(
        lifespan=lifespan,
        routes=[
            Route("/", label_page),
            Route("/in/{token}", enter),
            Route("/out", leave),
            Route("/api/item", get_item),
            Route("/api/history", get_history),
            Route("/api/draft", post_draft, methods=["POST"]),
            Route("/api/label", post_label, methods=["POST"]),
            Route("/api/skip", post_skip, methods=["POST"]),
            Route("/api/undo", post_undo, methods=["POST"]),
            *lead_routes(),
            *(live_routes() if generation else []),
            Mount("/static", StaticFiles(directory=HERE / "static")),
        ],
        middleware=[Middleware(Guard, public_host=public_host)],  # type: ignore[arg-type]
        exception_handlers={Refused: _refused, sqlite3.OperationalError: _store_failed, 404: _not_found},  # type: ignore[dict-item]
    )
    app.state.project = project
    app.state.thread, app.state.generation = thread, generation
    app.state.templates = Jinja2Templates(directory=HERE / "templates")
    app.state.secure = bool(public_url and public_url.startswith("https://"))
    return app


# ------------------------------------------------------------------------------------------------ errors


def _answer_error(request: Request, status: int, message: str) -> Response:
    """JSON for the page's own requests, a page for a person's."""
    path = "/in/…" if request.url.path.startswith("/in/") else request.url.path  # a token stays out of the log
    logger.warning("%s %s: %d %s", request.method, path, status, message)
    if request.url.path.startswith("/api/"):
        return JSONResponse({"error": message}, status_code=status)
    context = {"title": request.app.state.project.settings.title, "message": message}
    templates: Jinja2Templates = request.app.state.templates
    return templates.TemplateResponse(request, "message.html", context, status_code=status)


async def _refused(request: Request, error: Refused) -> Response:
    return _answer_error(request, error.status, str(error))


async def _not_found(request: Request, error: Exception) -> Response:
    return _answer_error(request, 404, "There is no such page.")


async def _store_failed(request: Request, error: sqlite3.OperationalError) -> Response:
    if is_full(error):
        message = (
            "The server's disk is full or cannot be written. This was NOT saved; keep the page open and tell the lead."
        )
        return _answer_error(request, 507, message)
    if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return _answer_error(request, 503, "The server is busy. This was NOT saved yet; try again.")
    raise error


# ------------------------------------------------------------------------------------------------ pages


async def enter(request: Request) -> Response:
    """A personal link: keeps its token in a cookie that scripts cannot read, and goes to the page."""
    project, token = request.app.state.project, request.path_params["token"]
    labeler = await asyncio.get_running_loop().run_in_executor(
        request.app.state.thread, authenticate, project.store, token
    )
    response = RedirectResponse("/lead" if labeler.lead else "/", status_code=303)
    response.set_cookie(
        cookie_name(project),
        token,
        max_age=COOKIE_SECONDS,
        httponly=True,
        samesite="lax",
        secure=request.app.state.secure,
    )
    return response


async def leave(request: Request) -> Response:
    response = RedirectResponse("/", status_code=303)
    response.delete_cookie(cookie_name(request.app.state.project))
    return response


async def label_page(request: Request) -> Response:
    labeler = await in_store(request, lambda _, labeler: labeler)
    project: Project = request.app.state.project
    context = {
        "title": project.settings.title,
        "labeler": labeler,
        # Which model answers is not for labelers to know.
        "settings": json.dumps({**asdict(project.settings), "model": None}),
        "chat": project.settings.mode == "chat",
        "guidelines": guidelines_html(project.folder),
    }
    templates: Jinja2Templates = request.app.state.templates
    return templates.TemplateResponse(request, "label.html", context)


# ------------------------------------------------------------------------------------------------ requests of the page


async def get_item(request: Request) -> Response:
    """The item that the labeler works on, or one of their own by number."""
    wanted = request.query_params.get("item", "")
    if wanted and not (wanted.isascii() and wanted.isdigit() and len(wanted) < 18):
        raise Refused(422, "`item` must be a whole number.")
    if wanted:
        return JSONResponse(await in_store(request, lambda project, labeler: work_on(project, labeler, int(wanted))))
    generation: Generation | None = request.app.state.generation
    if generation is not None:
        return JSONResponse(await in_store(request, lambda project, labeler: live_work(project, labeler, generation)))
    return JSONResponse(await in_store(request, current_work))


async def get_history(request: Request) -> Response:
    labels = await in_store(request, lambda project, labeler: history(project.store, labeler.id))
    return JSONResponse({"labels": labels})


async def post_draft(request: Request) -> Response:
    body = await json_body(request)
    item = whole_number(body, "item")
    await in_store(request, lambda project, labeler: save_draft(project.store, labeler.id, item, body.get("draft")))
    return JSONResponse({"saved": True})


async def post_label(request: Request) -> Response:
    return await _submit(request, submit, "answer")


async def post_skip(request: Request) -> Response:
    return await _submit(request, skip, "reason")


async def _submit(request: Request, save: Callable[..., int], content: str) -> Response:
    body = await json_body(request)
    submission = Submission(
        item=whole_number(body, "item"),
        request=body.get("request", ""),
        replaces=whole_number(body, "replaces") if "replaces" in body else 0,
        raw=body.get(content),
        seconds=body.get("seconds"),
    )
    number = await in_store(
        request, lambda project, labeler: save(project.store, project.settings, labeler.id, submission)
    )
    return JSONResponse({"label": number})


async def post_undo(request: Request) -> Response:
    body = await json_body(request)
    label = whole_number(body, "label")
    item = await in_store(request, lambda project, labeler: undo(project.store, project.settings, labeler.id, label))
    return JSONResponse({"item": item})

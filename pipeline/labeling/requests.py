"""What every route needs: whose request it is, work in the store's thread, JSON bodies."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any, TypeVar

from pipeline.labeling.labelers import Labeler, authenticate
from pipeline.labeling.project import Project
from pipeline.labeling.refusal import Refused

from starlette.requests import Request

T = TypeVar("T")


async def in_store(request: Request, work: Callable[[Project, Labeler], T]) -> T:
    """Do some work in the store's thread, for the labeler whose token the request carries."""
    project, token = request.app.state.project, _token(request)

    def authenticated() -> T:
        return work(project, authenticate(project.store, token))

    return await asyncio.get_running_loop().run_in_executor(request.app.state.thread, authenticated)


def cookie_name(project: Project) -> str:
    """Browsers share cookies between the ports of a host, so the name says which project's it is."""
    return f"rlhf-{project.store.project}"


def _token(request: Request) -> str:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        token = request.cookies.get(cookie_name(request.app.state.project), "")
    if not token:
        raise Refused(401, "Open your personal link first; the lead of the project has it.")
    return token


async def json_body(request: Request) -> dict[str, Any]:
    """The request's JSON object.

    Raises:
        Refused: it holds something else.
    """
    if not request.headers.get("content-type", "").startswith("application/json"):
        raise Refused(415, "A request is JSON. Nothing was changed.")
    try:
        body = json.loads(await request.body())
    except (ValueError, RecursionError):
        raise Refused(400, "This request is no JSON. Nothing was changed.") from None
    if not isinstance(body, dict):
        raise Refused(400, "A request is a JSON object. Nothing was changed.")
    return body


def whole_number(body: dict[str, Any], name: str) -> int:
    value = body.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**62:
        raise Refused(422, f"`{name}` must be a whole number.")
    return value

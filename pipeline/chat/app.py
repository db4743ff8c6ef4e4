"""The page of `rlhf chat --web`: a conversation with a model, or with two beside each other.

The page holds the conversation and sends it with each request; the server keeps nothing.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from pipeline.chat.model import ChatModel, Reply, Sampling
from pipeline.data.files import RecordError
from pipeline.data.messages import parse_messages
from pipeline.errors import UserError
from pipeline.labeling import app as labeling
from pipeline.labeling.access import Guard
from pipeline.labeling.refusal import Refused
from pipeline.labeling.requests import json_body, whole_number

from starlette.applications import Starlette
from starlette.concurrency import iterate_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.templating import Jinja2Templates

HERE = Path(__file__).parent


def make_app(models: Sequence[ChatModel], sampling: Sampling, system: str | None = None) -> Starlette:
    """The application. The models answer one request at a time, in the order of arrival.

    Args:
        models: one, or two whose answers are shown beside each other.
        system: the system prompt that the page begins with.
    """
    app = Starlette(
        routes=[
            Route("/", page),
            Route("/api/answer", post_answer, methods=["POST"]),
            Mount("/static", StaticFiles(directory=labeling.HERE / "static")),
            Mount("/chat", StaticFiles(directory=HERE / "static")),
        ],
        middleware=[Middleware(Guard)],  # type: ignore[arg-type]
        exception_handlers={Refused: _refused, UserError: _refused},  # type: ignore[dict-item]
    )
    app.state.models, app.state.sampling, app.state.system = models, sampling, system
    app.state.turn = asyncio.Lock()
    app.state.templates = Jinja2Templates(directory=[HERE / "templates", labeling.HERE / "templates"])
    return app


async def page(request: Request) -> Response:
    names = [model.name for model in request.app.state.models]
    context = {"title": " and ".join(names), "names": json.dumps(names), "system": request.app.state.system or ""}
    templates: Jinja2Templates = request.app.state.templates
    return templates.TemplateResponse(request, "chat.html", context)


async def post_answer(request: Request) -> Response:
    """The answer of a model (`model`, its number) to `messages`: lines of JSON with `text`, the last with `ended`."""
    body = await json_body(request)
    models: Sequence[ChatModel] = request.app.state.models
    number, seed = whole_number(body, "model"), whole_number(body, "seed")
    if number >= len(models):
        raise Refused(422, f"There is no model {number}.")
    try:
        messages = parse_messages(body.get("messages"), "messages")
    except RecordError as error:
        raise Refused(422, str(error)) from None
    if messages[-1]["role"] != "user":
        raise Refused(422, "The conversation must end with a question.")
    reply = Reply(models[number], messages, request.app.state.sampling, seed)
    return StreamingResponse(_lines(reply, request.app.state.turn), media_type="application/x-ndjson")


async def _lines(reply: Reply, turn: asyncio.Lock) -> AsyncIterator[str]:
    """An answer as lines of JSON; it ends where its reader goes away."""
    async with turn:
        try:
            async for piece in iterate_in_threadpool(reply):
                if piece:
                    yield json.dumps({"text": piece}) + "\n"
        finally:
            reply.stop()
    yield json.dumps({"ended": reply.ended}) + "\n"


async def _refused(request: Request, error: Exception) -> Response:
    status = error.status if isinstance(error, Refused) else 422
    return JSONResponse({"error": str(error)}, status_code=status)

"""Who may talk to the server, and what a browser may do with its pages: before any route is asked."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from pipeline.labeling.refusal import Refused

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse

MAX_BODY_BYTES = 1 << 20
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]
# Nothing from elsewhere, no inline script or style, no frame around the page.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # "no-referrer" would make browsers send our own forms with `Origin: null`
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Guard:
    """Refuses foreign hosts, requests that another site's page makes, and bodies that are too long; sets HEADERS.

    Args:
        public_host: host (and port) of the address that a proxy in front gives the page.
    """

    def __init__(self, app: Application, public_host: str | None = None):
        self.app, self.public_host = app, public_host

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(raw=message["headers"])
                for name, value in HEADERS.items():
                    headers[name] = value
                message["headers"] = headers.raw
            await send(message)

        headers = Headers(raw=scope["headers"])
        try:
            self._check_host(headers)
            if scope["method"] not in ("GET", "HEAD"):
                check_same_origin(headers)
                _check_length(headers)
        except Refused as refused:
            response = JSONResponse({"error": str(refused)}, status_code=refused.status)
            return await response(scope, receive, send_with_headers)
        return await self.app(scope, _limited(receive), send_with_headers)

    def _check_host(self, headers: Headers) -> None:
        """A name that an attacker's DNS may point at this machine is refused; IP addresses and own names are not."""
        host = headers.get("host", "")
        name = urlsplit(f"//{host}").hostname or ""
        if host == self.public_host or name in ("localhost", socket.gethostname().lower()) or _is_address(name):
            return
        raise Refused(
            421,
            "This server does not answer under that name. Start it with --public-url, or use the address it printed.",
        )


def check_same_origin(headers: Headers) -> None:
    """Whether a request that changes something comes from our own page, or from a program with a token of its own.

    Raises:
        Refused: it comes from another site's page, or does not say where from.
    """
    origin, host = headers.get("origin"), headers.get("host")
    if origin is not None:
        if urlsplit(origin).netloc != host or not host:
            raise Refused(403, "This request comes from another page. Nothing was changed.")
    elif not headers.get("authorization") and headers.get("sec-fetch-site") != "same-origin":
        raise Refused(403, "This request does not say which page it comes from. Nothing was changed.")
    kind = headers.get("content-type", "").partition(";")[0].strip()
    if kind not in ("application/json", "application/x-www-form-urlencoded"):
        raise Refused(415, "A request is JSON. Nothing was changed.")


def _check_length(headers: Headers) -> None:
    length = headers.get("content-length")
    if length is not None and (not length.isdigit() or int(length) > MAX_BODY_BYTES):
        raise Refused(413, f"This is more than {MAX_BODY_BYTES >> 20} MiB. Nothing was changed.")


def _limited(receive: Receive) -> Receive:
    """`receive` that gives up on a body which grows too long."""
    received = 0

    async def limited() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > MAX_BODY_BYTES:
            raise Refused(413, f"This is more than {MAX_BODY_BYTES >> 20} MiB. Nothing was changed.")
        return message

    return limited


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True

"""`rlhf label FOLDER`: the server of one labeling folder."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError
from pipeline.labeling.app import make_app
from pipeline.labeling.labelers import add_labeler, labelers
from pipeline.labeling.live import Models, check_models
from pipeline.labeling.project import Project, open_project, rows_to_label
from pipeline.labeling.settings import Settings, read_settings
from pipeline.labeling.store import lock_folder

import uvicorn

LOG = "server.log"


@dataclass(frozen=True)
class Address:
    """Where the page is served.

    Attributes:
        public_url: the address that a proxy in front gives the page, if any.
    """

    host: str
    port: int
    public_url: str | None

    def url(self, port: int) -> str:
        if self.public_url:
            return self.public_url.rstrip("/")
        host = "127.0.0.1" if self.host in ("0.0.0.0", "") else f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{port}"


def serve(
    folder: Path, address: Address, say: Callable[[str], None], load_models: Callable[[Settings], Models] | None = None
) -> None:
    """Serve a folder until a signal comes.

    Args:
        load_models: loads what labelers chat with, where the settings say so.
        say: told the address, and on the first start the lead's link.

    Raises:
        UserError: no rows, bad rows or models, a port in use, or another server on the folder.
    """
    settings = read_settings(folder)
    rows_to_label(folder, settings)  # its errors, before anything is written
    models = load_models(settings) if load_models and settings.mode == "chat" else None
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(listen(address))
        url = address.url(listening.getsockname()[1])
        stack.enter_context(lock_folder(folder, url))
        stack.enter_context(_logging_to(folder / LOG))
        project = open_project(folder)
        stack.callback(project.store.close)
        if models is not None:
            check_models(project.store, models.identities, folder)
        _announce(project, url, say)
        app = make_app(project, address.public_url, models)
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=5,
            timeout_keep_alive=75,
        )
        uvicorn.Server(config).run(sockets=[listening])


def listen(address: Address) -> socket.socket:
    """A socket that listens.

    Raises:
        UserError: the port is in use, or is none.
    """
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    # asyncio sends small packets at once only on sockets that name TCP.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((address.host, address.port))
        listening.listen(1024)
    except (OSError, OverflowError) as error:
        listening.close()
        reason = error.strerror if isinstance(error, OSError) else "no such port"
        raise UserError(
            f"command line: cannot listen on {address.host}:{address.port} ({reason}); name another --port"
        ) from None
    return listening


def _announce(project: Project, url: str, say: Callable[[str], None]) -> None:
    connection = project.store.connection
    items, calibration = connection.execute(
        "SELECT coalesce(sum(1 - calibration), 0), coalesce(sum(calibration), 0) FROM items WHERE retired = 0"
    ).fetchone()
    labels = connection.execute("SELECT count(*) FROM labels WHERE current = 1 AND kind = 'label'").fetchone()[0]
    people = labelers(project.store)
    if project.settings.mode == "chat":
        say(f"live chat of {project.folder}: {items:,} comparisons, {labels:,} labels so far")
    else:
        say(
            f"labeling page of {project.folder}: {items:,} items, {calibration:,} for calibration, {labels:,} labels so far"
        )
    if not any(person.lead for person in people):
        say(f"the lead's link, shown this once: {url}/in/{add_labeler(project.store, 'lead', lead=True)}")
    if not any(not person.lead for person in people):
        say(f"add labelers: rlhf label users add NAME --folder {project.folder}")
    say(f"serving at {url}; stop with Ctrl-C")


@contextlib.contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    """Refused requests and failures, in a file beside the database and on the terminal."""
    logger = logging.getLogger("pipeline.labeling")
    handlers: list[logging.Handler] = [logging.FileHandler(path, encoding="utf-8"), logging.StreamHandler()]
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(handler)
    logging.getLogger("uvicorn.error").addHandler(handlers[0])
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()

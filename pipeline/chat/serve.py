"""`rlhf chat --web`: the server of the chat page."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.chat.app import make_app
from pipeline.chat.model import ChatModel, Sampling
from pipeline.labeling.serve import Address, listen

import uvicorn


def serve(models: Sequence[ChatModel], sampling: Sampling, system: str | None, address: Address) -> None:
    """Serve the page until a signal comes.

    Raises:
        UserError: the port is in use.
    """
    with listen(address) as listening:
        print(f"chat with {' and '.join(model.name for model in models)}", flush=True)
        if address.host not in ("127.0.0.1", "::1", "localhost"):
            print(f"warning: --host {address.host}: everybody who reaches this machine may use the page", flush=True)
        print(f"serving at {address.url(listening.getsockname()[1])}; stop with Ctrl-C", flush=True)
        config = uvicorn.Config(
            make_app(models, sampling, system),
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=2,
        )
        uvicorn.Server(config).run(sockets=[listening])

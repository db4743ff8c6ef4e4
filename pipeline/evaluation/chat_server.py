"""An OpenAI-compatible server (vLLM, llama.cpp, a company's) that is asked by plain HTTP.

The Hub's client refuses every address under HF_HUB_OFFLINE, a server in the same rack too. Redirects are not followed and,
on this machine, proxies not used: the key goes to the given address alone.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pipeline.errors import UserError

import httpx

KEY = "RLHF_JUDGE_API_KEY"  # environment variables; keys are read from nowhere else and written nowhere
KEYS = (KEY, "OPENAI_API_KEY")
LOCAL = ("localhost", "127.0.0.1", "::1")
TRIES, PAUSE, AT_ONCE = 3, 2.0, 8
READ_TIMEOUT, REPLY_SECONDS, REPLY_BYTES = 60.0, 180.0, 2**20  # of one read; of a whole reply
OF_THE_QUESTION = (400, 413, 422)  # statuses; asking the same again changes nothing, asking something else may
OF_THE_SERVER = (301, 302, 303, 307, 308, 401, 403, 404)  # statuses; asking anything again changes nothing
Value = TypeVar("Value")


class NoServer(UserError):
    """No question is answered there."""


def check_address(address: str, flag: str) -> None:
    """
    Raises:
        UserError: the address holds a key.
    """
    parts = urlsplit(address)
    if parts.username or parts.password or parts.query:
        raise UserError(f"{flag}: no keys in an address, it would be seen by others; put it into {KEY}")


def _api_key(address: str, flag: str) -> str | None:
    """The key for an address, from the environment.

    Raises:
        UserError: the key is no header value, or would travel unencrypted.
    """
    name = next((name for name in KEYS if os.environ.get(name, "").strip()), None)
    if name is None:
        return None
    key = os.environ[name].strip()
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise UserError(f"{name} holds characters that no API key has (spaces, or letters outside ASCII); set it again")
    parts = urlsplit(address)
    if parts.scheme != "https" and parts.hostname not in LOCAL:
        raise UserError(
            f"{flag}: {name} is set and would go unencrypted to {parts.hostname}; use https, or unset {name}"
        )
    return key


class ChatServer:
    """Asks one model of a server several questions at once.

    Args:
        pause: seconds before a question is asked again; twice as long each further time.
        flag: of the command, for errors.
    """

    def __init__(self, address: str, model: str, pause: float = PAUSE, flag: str = "--llm-judge"):
        self.address = address.rstrip("/") + "/chat/completions"
        key = _api_key(address, flag)
        self.headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self.local = urlsplit(address).hostname in LOCAL
        self.model, self.pause = model, pause

    def ask(self, bodies: Sequence[Mapping[str, Any]], read: Callable[[str], Value]) -> list[Value | Exception]:
        """What `read` makes of each reply, or why there is none. If nobody answers the first, no other is asked.

        Args:
            bodies: `messages` and settings of each question.
            read: raises UserError where a reply is of no use; the question is asked again.
        """
        client = httpx.Client(
            timeout=READ_TIMEOUT, headers=self.headers, follow_redirects=False, trust_env=not self.local
        )
        with client:
            first = [self._ask(client, body, read) for body in bodies[:1]]
            if first and isinstance(first[0], NoServer):
                return first * len(bodies)  # do not wait for each question in turn
            with ThreadPoolExecutor(AT_ONCE) as pool:
                return [*first, *pool.map(lambda body: self._ask(client, body, read), bodies[1:])]

    def _ask(self, client: httpx.Client, body: Mapping[str, Any], read: Callable[[str], Value]) -> Value | Exception:
        failure: Exception = UserError("not asked")
        for number in range(TRIES):
            if number:
                time.sleep(self.pause * 2 ** (number - 1))
            try:
                return read(self._reply(client, body))
            except httpx.HTTPStatusError as error:
                status = error.response.status_code
                kind = UserError if status in OF_THE_QUESTION else NoServer
                failure = kind(f"the server says {status}")
                if status in (*OF_THE_QUESTION, *OF_THE_SERVER):
                    return failure
            except httpx.HTTPError as error:
                failure = NoServer(type(error).__name__)  # its text may hold the address
            except UserError as error:
                failure = error
            except (LookupError, TypeError, ValueError, RecursionError):
                failure = UserError("the reply is no chat completion")
        return failure

    def _reply(self, client: httpx.Client, body: Mapping[str, Any]) -> str:
        """The text of a reply.

        Raises:
            UserError: too long, too slow, or no text.
        """
        deadline = time.monotonic() + REPLY_SECONDS
        received = bytearray()
        with client.stream("POST", self.address, json={"model": self.model, **body}) as response:
            response.raise_for_status()
            for chunk in response.iter_raw():
                received += chunk
                if len(received) > REPLY_BYTES:
                    raise UserError(f"the reply is longer than {REPLY_BYTES // 2**20} MiB")
                if time.monotonic() > deadline:
                    raise UserError(f"the reply took longer than {REPLY_SECONDS:.0f} s")
        content = json.loads(received)["choices"][0]["message"]["content"]
        if content is not None and not isinstance(content, str):
            raise UserError("the reply is no chat completion")
        return content or ""

"""A vLLM server over HTTP: what it holds, weights from a folder, and completions of token ids.

Written for vLLM 0.32. Of its interface this file takes `/version`, `/v1/models`, `/tokenize`, `/v1/completions`, `/health`,
`/v1/load_lora_adapter`, `/v1/unload_lora_adapter` and, in development mode alone (VLLM_SERVER_DEV_MODE=1), `/server_info`,
`/collective_rpc` and `/reset_prefix_cache`. The last three are no stable interface: where `/server_info` changes, the server counts as
one without adapters and of unknown precision; where the others do, the first transfer of weights fails with one line.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.rollout.engine import SampledResponse, SamplingSettings

import httpx

START = "scripts/rollout_server.sh"
PAGE = "docs/engines.md"
CONNECT_SECONDS, READ_SECONDS = 10.0, 600.0  # a request waits in the server's queue, too
KEEPALIVE_SECONDS = 2.0  # uvicorn closes idle connections after 5
FORBIDDEN_BIAS = -100.0  # the lowest that vLLM takes
RESETS, RESET_PAUSE = 5, 0.5  # tries to empty the prefix cache, which fails while a request runs
DETAIL = 200  # characters of a server's error
ADAPTER = "policy-adapter"  # what requests call an adapter that was sent


class ServerFailure(Exception):
    """The server does not answer now, and may again later."""


@dataclass(frozen=True)
class ServedModel:
    """What a server serves.

    name: what requests call it. context: tokens of prompt and response at most. root: the folder or Hub id that it was started
    with. dtype: "float32", "bfloat16", …; "" where it does not say. lora_rank: of the largest adapter that it takes; 0 without
    --enable-lora.
    """

    version: str
    name: str
    context: int
    root: str
    dtype: str
    lora_rank: int


class VLLMServer:
    """A server's endpoints as functions; threads may share it.

    All of them raise ServerFailure where it does not answer, and UserError where it answers what another try would not change.

    Args:
        url: its address, without `/v1`.
        connections: requests at once.

    Attributes:
        name: of the model, as requests call it; `model` reads it.
        with_adapter: whether completions are those of the adapter that was loaded, or of the model without it.
    """

    def __init__(self, url: str, connections: int):
        self.url = url.rstrip("/")
        self.connections = connections
        self._client = httpx.Client(
            timeout=httpx.Timeout(READ_SECONDS, connect=CONNECT_SECONDS),
            limits=httpx.Limits(
                max_connections=connections, max_keepalive_connections=connections, keepalive_expiry=KEEPALIVE_SECONDS
            ),
            trust_env=False,  # a server of this cluster: no proxy
            follow_redirects=False,
        )
        self.name = ""
        self.with_adapter = False

    def model(self) -> ServedModel:
        """What the server serves."""
        version = self._ask("GET", "/version", missing=self._no_vllm())
        models = self._ask("GET", "/v1/models", missing=self._no_vllm())
        try:
            first = models["data"][0]
            name, context = str(first["id"]), int(first["max_model_len"])
            number, root = str(version["version"]), str(first.get("root"))
        except (LookupError, TypeError, ValueError):
            raise UserError(self._no_vllm()) from None
        self.name = name
        return ServedModel(number, name, context, root, *self._dtype_and_lora_rank())

    def _dtype_and_lora_rank(self) -> tuple[str, int]:
        response = self._send("GET", "/server_info?config_format=json")
        try:
            config = response.json()["vllm_config"]
            lora = config["lora_config"] or {}
            return str(config["model_config"]["dtype"]).removeprefix("torch."), int(lora.get("max_lora_rank", 0))
        except (LookupError, TypeError, ValueError, AttributeError):
            return "", 0

    def check_development_mode(self) -> None:
        """
        Raises:
            UserError: the server takes no weights.
        """
        response = self._send("POST", "/collective_rpc", {})
        if response.status_code != httpx.codes.BAD_REQUEST:  # "Missing 'method'"
            raise UserError(
                f"engine_url {self.url}: the server takes no weights; start it with VLLM_SERVER_DEV_MODE=1 ({START})"
            )

    def tokenize(self, text: str) -> list[int]:
        body = {"model": self.name, "prompt": text, "add_special_tokens": False}
        reply = self._ask("POST", "/tokenize", body)
        return [int(token) for token in self._part(reply, "tokens")]

    def load_weights(self, folder: Path, *, for_the_first_time: bool) -> None:
        """Replace the model's weights by those of a folder.

        Args:
            for_the_first_time: a server error then means that it cannot load them.
        """
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        refused = (
            f"it does not load the weights in {folder}: another architecture or size, or a folder that it does not see"
        )
        self._ask("POST", "/collective_rpc", body, failed=refused if for_the_first_time else None)
        self._forget_prefixes()

    def load_adapter(self, folder: Path, *, for_the_first_time: bool) -> None:
        """Load the LoRA adapter of a folder in place of the one before."""
        # Not `load_inplace`: with it, vLLM 0.32 reads the folder again in every forward pass.
        self._send("POST", "/v1/unload_lora_adapter", {"lora_name": ADAPTER})  # 404 where there is none
        refused = f"it does not load the adapter in {folder}"
        self._ask(
            "POST",
            "/v1/load_lora_adapter",
            {"lora_name": ADAPTER, "lora_path": str(folder)},
            missing=f"engine_url {self.url}: {refused}: a folder that it does not see",
            failed=refused if for_the_first_time else None,
        )
        self._forget_prefixes()

    def _forget_prefixes(self) -> None:
        """Drop what was computed with the old weights."""
        for _ in range(RESETS):
            if self._part(self._ask("POST", "/reset_prefix_cache"), "success"):
                return
            time.sleep(RESET_PAUSE)
        raise ServerFailure("its prefix cache is not emptied: requests of others run; a server serves one run")

    def sample_all(
        self, prompt_ids: Sequence[Sequence[int]], seeds: Sequence[int | None], settings: SamplingSettings
    ) -> list[SampledResponse]:
        """As `sample`, of many prompts at once."""
        with ThreadPoolExecutor(self.connections) as pool:
            asked = [pool.submit(self.sample, ids, seed, settings) for ids, seed in zip(prompt_ids, seeds, strict=True)]
            try:
                return [response.result() for response in asked]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def sample(self, prompt_ids: Sequence[int], seed: int | None, settings: SamplingSettings) -> SampledResponse:
        """A response to a prompt; without a seed, of the likeliest tokens."""
        body = {
            "prompt": list(prompt_ids),
            "max_tokens": settings.max_new_tokens,
            "temperature": 0.0 if seed is None else settings.temperature,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "stop_token_ids": list(settings.stop_ids),
            "ignore_eos": True,  # so that the stop tokens are ours alone
            "logit_bias": {str(token): FORBIDDEN_BIAS for token in settings.forbidden_ids},
            "logprobs": 0,  # of the sampled token
            "return_token_ids": True,
        }
        choice = self._complete(body if seed is None else {**body, "seed": seed})
        ids, logprobs = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
        if not isinstance(ids, list) or not isinstance(logprobs, list):
            raise UserError(
                f"engine_url {self.url}: no token ids or log-probabilities in the reply; take vLLM 0.11 or newer"
            )
        if choice.get("finish_reason") not in ("stop", "length"):
            raise ServerFailure(f"a request ended by {choice.get('finish_reason')!r}")
        self._check(ids, logprobs, settings)
        return SampledResponse(ids, logprobs)

    def logprobs(self, ids: Sequence[int]) -> list[float]:
        """Log-probabilities of all ids but the first, each given those before it; no temperature, nothing forbidden."""
        body = {"prompt": list(ids), "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
        rows = self._part(self._complete(body), "prompt_logprobs")
        return [float(self._part(row, str(token), "logprob")) for row, token in zip(rows[1:], ids[1:], strict=True)]

    def _complete(self, body: dict[str, Any]) -> Any:
        """The choice of a completion."""
        path, name = "/v1/completions", ADAPTER if self.with_adapter else self.name
        lost = "it has no adapter, so it restarted" if self.with_adapter else None
        return self._part(self._ask("POST", path, {"model": name, **body}, lost=lost), "choices", 0)

    def answers(self) -> bool:
        """Whether the server is up."""
        try:
            return self._send("GET", "/health").is_success
        except ServerFailure:
            return False

    def _check(self, ids: Sequence[int], logprobs: Sequence[float], settings: SamplingSettings) -> None:
        forbidden, stops = set(settings.forbidden_ids), set(settings.stop_ids)
        wrong = None
        if len(ids) != len(logprobs) or not all(isinstance(x, float | int) and math.isfinite(x) for x in logprobs):
            wrong = f"{len(ids)} tokens with {len(logprobs)} log-probabilities, or one that is no number"
        elif not ids or len(ids) > settings.max_new_tokens:
            wrong = f"{len(ids)} tokens, where 1 to {settings.max_new_tokens} were asked for"
        elif banned := forbidden.intersection(ids):
            wrong = f"token {min(banned)}, which is forbidden"
        elif stops.intersection(ids[:-1]):
            wrong = "tokens after a stop token"
        elif len(ids) < settings.max_new_tokens and ids[-1] not in stops:
            wrong = f"{len(ids)} tokens without a stop token, where {settings.max_new_tokens} were asked for"
        if wrong is not None:
            raise UserError(f"engine_url {self.url}: a response of {wrong}; see {PAGE}")

    def _no_vllm(self) -> str:
        return f"engine_url {self.url}: no vLLM server answers there; start one by {START}"

    def _ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        missing: str | None = None,
        lost: str | None = None,
        failed: str | None = None,
    ) -> Any:
        """The JSON of a reply, or its text.

        Args:
            missing: error where there is no such path. lost: failure where there is no such model. failed: what a server error
                means where it can only be the request's.
        """
        response = self._send(method, path, body)
        if response.is_success:
            try:
                return response.json() if response.content else None
            except ValueError:  # a sentence about an adapter that was loaded; a page where there is no vLLM
                return response.text
        if lost is not None and response.status_code == httpx.codes.NOT_FOUND:
            raise ServerFailure(lost)
        detail = f"{response.status_code} for {path}: {' '.join(response.text.split())[:DETAIL]}"
        if failed is not None and response.status_code == httpx.codes.INTERNAL_SERVER_ERROR:
            raise UserError(f"engine_url {self.url}: {failed} ({detail})")
        if (
            response.status_code >= httpx.codes.INTERNAL_SERVER_ERROR
            or response.status_code == httpx.codes.TOO_MANY_REQUESTS
        ):
            raise ServerFailure(detail)
        raise UserError(missing or f"engine_url {self.url}: the server refuses a request with {detail}")

    def _send(self, method: str, path: str, body: Any = None) -> httpx.Response:
        for last in (False, True):
            try:
                return self._client.request(method, self.url + path, json=body)
            except httpx.HTTPError as error:
                if last or not isinstance(error, httpx.ReadError | httpx.WriteError | httpx.RemoteProtocolError):
                    raise ServerFailure(f"{type(error).__name__} at {path}") from None
        raise AssertionError  # a connection that the server closed while it was idle: the second try has a new one

    def _part(self, reply: Any, *path: str | int) -> Any:
        try:
            for step in path:
                reply = reply[step]
        except (LookupError, TypeError):
            raise UserError(f"engine_url {self.url}: a reply has no {path[-1]!r}; take vLLM 0.11 or newer") from None
        return reply

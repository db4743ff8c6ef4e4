"""Servers with vLLM's endpoints: a small one in this process, which answers from a transformers model, and the real one."""

from __future__ import annotations

import contextlib
import copy
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from pipeline.models.loading import load_causal_lm
from pipeline.models.tokenizers import load_tokenizer
from pipeline.rollout.vllm_server import ADAPTER

import torch
from peft import PeftModel


@dataclass
class FakeVLLM:
    """Answers as vLLM 0.32 does; a test may spoil its answers.

    Attributes:
        start: the folder that it starts from, and after a restart again.
        loads: folders that weights or adapters were loaded from.
        files: names of the files of weights in each.
        lora_rank: of the largest adapter; 0: it was started without --enable-lora.
        ignores_adapters: it loads adapters and answers without them.
        spoil: changes a completion's choice before it is sent.
        failures: so many of the next completions fail; with `restarts` the server has its first weights again afterwards.
    """

    start: Path
    context: int = 64
    development_mode: bool = True
    reload_works: bool = True
    lora_rank: int = 0
    ignores_adapters: bool = False
    loads: list[str] = field(default_factory=list)
    files: list[list[str]] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    spoil: Any = None
    failures: int = 0
    restarts: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.tokenizer = load_tokenizer(str(self.start))
        self.restart()

    def restart(self) -> None:
        self.model = load_causal_lm(str(self.start)).eval()
        self.adapted: Any = None

    def reply(self, path: str, body: Any) -> tuple[int, Any]:
        """Status and JSON of a request; only one at a time."""
        with self._lock:
            handler = {
                "/version": lambda: (200, {"version": "0.32.0"}),
                "/server_info?config_format=json": lambda: self._info(),
                "/health": lambda: (200, None),
                "/v1/models": lambda: (
                    200,
                    {"data": [{"id": "policy", "max_model_len": self.context, "root": str(self.start)}]},
                ),
                "/tokenize": lambda: (
                    200,
                    {"tokens": self.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]},
                ),
                "/collective_rpc": lambda: self._reload(body),
                "/reset_prefix_cache": lambda: (200, {"success": True}),
                "/v1/load_lora_adapter": lambda: self._load_adapter(body),
                "/v1/unload_lora_adapter": lambda: self._unload_adapter(),
                "/v1/completions": lambda: self._complete(body),
            }.get(path)
            return handler() if handler else (404, {"detail": "Not Found"})

    def _reload(self, body: Any) -> tuple[int, Any]:
        if not self.development_mode:
            return 404, {"detail": "Not Found"}
        if "method" not in body:
            return 400, {"error": {"message": "Missing 'method' in request body"}}
        assert body["method"] == "reload_weights"
        folder = body["kwargs"]["weights_path"]
        self._note(folder)
        model = load_causal_lm(folder).eval()
        if {n: p.shape for n, p in model.named_parameters()} != {n: p.shape for n, p in self.model.named_parameters()}:
            return 500, {"error": {"message": "Call to collective_rpc method failed"}}
        if self.reload_works:
            self.model = model
        return 200, {"results": [None]}

    def _note(self, folder: str) -> None:
        self.loads.append(folder)
        self.files.append(sorted(file.name for file in Path(folder).rglob("*.safetensors")))

    def _info(self) -> tuple[int, Any]:
        if not self.development_mode:
            return 404, {"detail": "Not Found"}
        lora = {"max_lora_rank": self.lora_rank} if self.lora_rank else None
        return 200, {"vllm_config": {"model_config": {"dtype": "torch.float32"}, "lora_config": lora}}

    def _load_adapter(self, body: Any) -> tuple[int, Any]:
        assert body["lora_name"] == ADAPTER
        if not self.lora_rank or self.adapted is not None:
            return 500 if not self.lora_rank else 400, {"error": {"message": "LoRA is not enabled, or a name is taken"}}
        self._note(body["lora_path"])
        base = copy.deepcopy(self.model)
        if not self.ignores_adapters:
            base = PeftModel.from_pretrained(base, body["lora_path"]).merge_and_unload()
        self.adapted = base.eval()
        return 200, "Success: LoRA adapter added"

    def _unload_adapter(self) -> tuple[int, Any]:
        known, self.adapted = self.adapted is not None, None
        return (200, "Success: LoRA adapter removed") if known else (404, {"error": {"message": "cannot be found"}})

    @torch.no_grad()
    def _complete(self, body: Any) -> tuple[int, Any]:
        if self.failures > 0:
            self.failures -= 1
            if self.restarts and self.failures == 0:
                self.restart()
            return 500, {"error": {"message": "EngineCore encountered an issue"}}
        model = {"policy": self.model, ADAPTER: self.adapted}[body["model"]]
        if model is None:
            return 404, {"error": {"message": f"The model `{ADAPTER}` does not exist."}}
        if "prompt_logprobs" in body:
            ids = torch.tensor(body["prompt"])
            logprobs = model(input_ids=ids[None]).logits[0].log_softmax(-1)
            rows = [{str(t): {"logprob": logprobs[i, t].item()}} for i, t in enumerate(ids[1:].tolist())]
            return 200, {"choices": [{"prompt_logprobs": [None, *rows], "finish_reason": "length"}]}
        choice = self._sampled(model, body)
        if self.spoil:
            self.spoil(choice)
        return 200, {"choices": [choice]}

    def _sampled(self, model: Any, body: Any) -> dict[str, Any]:
        assert body["ignore_eos"]
        assert (body["top_p"], body["top_k"], body["logprobs"]) == (1.0, 0, 0)
        assert len(body["prompt"]) + body["max_tokens"] <= self.context
        generator = torch.Generator().manual_seed(body.get("seed", 0))
        self.seeds += [body["seed"]] if "seed" in body else []
        ids: list[int] = []
        logprobs: list[float] = []
        while len(ids) < body["max_tokens"] and not (ids and ids[-1] in body["stop_token_ids"]):
            logits = model(input_ids=torch.tensor([[*body["prompt"], *ids]])).logits[0, -1].float()
            for token, bias in body["logit_bias"].items():
                logits[int(token)] += bias
            likely = (logits / (body["temperature"] or 1.0)).log_softmax(-1)
            token = torch.multinomial(likely.exp(), 1, generator=generator) if body["temperature"] else likely.argmax()
            ids.append(int(token))
            logprobs.append(likely[int(token)].item())
        reason = "stop" if ids[-1] in body["stop_token_ids"] else "length"
        return {"token_ids": ids, "logprobs": {"token_logprobs": logprobs}, "finish_reason": reason}


@contextlib.contextmanager
def served(fake: FakeVLLM) -> Iterator[str]:
    """The address of a server in a thread of this process."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(None)

        def do_POST(self) -> None:
            self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "null"))

        def _answer(self, body: Any) -> None:
            status, reply = fake.reply(self.path, body)
            data = b"" if reply is None else reply.encode() if isinstance(reply, str) else json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()

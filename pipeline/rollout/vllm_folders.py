"""Answers of finished models by a vLLM server, which is given the weights of one folder after another (docs/engines.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.algorithms.logprobs import tempered_logits, token_logprobs
from pipeline.config.engine import check_engine
from pipeline.errors import UserError
from pipeline.models.loading import CONFIG_ERRORS, read_config
from pipeline.rollout.alarms import DRIFT
from pipeline.rollout.engine import LocalEngine, SampledResponse, SamplingSettings
from pipeline.rollout.vllm_engine import MOST_CONNECTIONS, check_server, request_seeds
from pipeline.rollout.vllm_probe import Probe, check_drift
from pipeline.rollout.vllm_server import START, ServedModel, ServerFailure, VLLMServer

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM


class ServerLost(UserError):
    """The server does not answer, or has weights that it was not sent: no model can answer there."""


@dataclass
class ServedFolders:
    """A vLLM server that sees the same folders under the same paths.

    Attributes:
        loaded: the folder whose weights it has; probe: by which they are known.
        drifts: nats per token between its log-probabilities and those computed here, by folder.
    """

    server: VLLMServer
    model: ServedModel
    loaded: Path | None = None
    probe: Probe | None = None
    drifts: dict[str, float] = field(default_factory=dict)

    @classmethod
    def connect(cls, url: str) -> ServedFolders:
        """
        Raises:
            UserError: no address, no vLLM server answers there, or it takes no weights.
        """
        try:
            check_engine(url, 1.0)
        except ValueError as error:
            raise UserError(f"command line: {error}") from None
        server = VLLMServer(url, MOST_CONNECTIONS)
        try:
            model = server.model()
            server.check_development_mode()
        except ServerFailure as failure:
            raise UserError(f"engine_url {server.url}: no answer ({failure}); start the server by {START}") from None
        return cls(server, model)

    def engine(self, folder: Path, tokenizer: Any, settings: SamplingSettings) -> FolderEngine:
        """
        Raises:
            UserError: no folder of a model, or a temperature that the server cannot take.
        """
        if not (folder / "config.json").is_file():
            raise UserError(
                f"{str(folder)!r}: no folder with a model; a server takes weights from a folder, a Hub id has none"
            )
        try:
            check_engine(self.server.url, settings.temperature)
        except ValueError as error:
            raise UserError(str(error)) from None
        return FolderEngine(self, folder.absolute(), tokenizer, settings)

    def facts(self) -> dict[str, Any]:
        """What a report says of the engine."""
        return {"engine": "vllm", "version": self.model.version, "dtype": self.model.dtype, "drift": self.drifts}


@dataclass(frozen=True)
class FolderEngine:
    """Samples from the model of a folder on a server, in place of `engine.LocalEngine`."""

    served: ServedFolders
    folder: Path
    tokenizer: Any
    settings: SamplingSettings

    def sample(self, model: Any, prompt_ids: Sequence[Sequence[int]], uniforms: Tensor | None) -> list[SampledResponse]:
        """As `engine.LocalEngine.sample` but for its random numbers; `model` is the folder's, for comparing.

        Raises:
            ServerLost: it fails, or another's weights came between.
            UserError: it cannot load the folder, or computes something else than `model`.
        """
        served = self.served
        try:
            if served.loaded != self.folder or served.probe is None:
                served.loaded, served.probe = None, None
                served.probe = self._load(model, prompt_ids)
                served.loaded = self.folder
            responses = served.server.sample_all(prompt_ids, request_seeds(uniforms, len(prompt_ids)), self.settings)
            lost = served.probe.lost()
        except ServerFailure as failure:
            lost = str(failure)
        if lost is not None:
            served.loaded = None
            raise ServerLost(f"engine_url {served.server.url}: {lost}; start it by {START}, then this command again")
        return responses

    def _load(self, model: Any, prompt_ids: Sequence[Sequence[int]]) -> Probe:
        server, tokens = self.served.server, max(map(len, prompt_ids)) + self.settings.max_new_tokens
        check_server(server, self.tokenizer, tokens, "the longest prompt and its response", str(self.folder))
        _check_shapes(model, self.served.model.root, server.url)
        server.load_weights(self.folder, for_the_first_time=True)
        probe = Probe(server, list(prompt_ids[0]))
        response = probe.ask(self.settings)
        own = _logprobs(model, probe.prompt, response.ids, self.settings)
        drift = (own - torch.tensor(response.logprobs)).abs().mean().item()
        precision = "fp32" if self.served.model.dtype == "float32" else "bf16"
        check_drift(drift, DRIFT[precision], f"the weights of {self.folder}", server)
        self.served.drifts[self.folder.name] = drift
        return probe


Engine = LocalEngine | FolderEngine


def _check_shapes(model: Any, root: str, url: str) -> None:
    """Compare with the model that the server was started with: other sizes would end a vLLM server.

    Raises:
        UserError: they differ, or cannot be compared.
    """
    try:
        config = read_config(root)
        with torch.device("meta"):
            started: Any = AutoModelForCausalLM.from_config(config)
    except (UserError, *CONFIG_ERRORS):
        raise UserError(
            f"engine_url {url}: it was started with {root!r}, which cannot be read here, so nobody knows whether its sizes fit; "
            "start it with a folder of this run"
        ) from None
    if {n: p.shape for n, p in started.named_parameters()} != {n: p.shape for n, p in model.named_parameters()}:
        raise UserError(
            f"engine_url {url}: it was started with {root!r}, a model of other sizes, and cannot load this one"
        )


@torch.no_grad()
def _logprobs(model: Any, prompt: Sequence[int], response: Sequence[int], settings: SamplingSettings) -> Tensor:
    """(response_tokens,) of the distribution that is sampled, on the CPU."""
    device = next(model.parameters()).device
    ids = torch.tensor([[*prompt, *response]], device=device)
    forbidden = torch.tensor(list(settings.forbidden_ids), dtype=torch.long, device=device)
    logits = tempered_logits(model(input_ids=ids).logits[0, len(prompt) - 1 : -1], settings.temperature, forbidden)
    return token_logprobs(logits, ids[0, len(prompt) :], with_entropy=False)[0].cpu()

"""Samples responses on a vLLM server that holds a copy of the policy's weights, or of the reference's (docs/engines.md).

The weights go through a folder that trainer and server share: each version is written under a name of its own, loaded, and compared
on a probe prompt. Of adapters on a base, the base is sent once, and then the adapter alone, where the server takes it. A server that
restarts in between has the weights that it started with; the probe shows it, and they are sent again.
"""

from __future__ import annotations

import logging
import re
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.models.adapter_networks import AdapterNetworks
from pipeline.models.networks import Networks, response_batch
from pipeline.models.sharding import local
from pipeline.rollout.alarms import DRIFT
from pipeline.rollout.engine import SampledResponse, SamplingSettings
from pipeline.rollout.vllm_probe import SAME, Probe, check_drift
from pipeline.rollout.vllm_server import PAGE, START, ServedModel, ServerFailure, VLLMServer
from pipeline.training.identity import PROBES
from pipeline.training.processes import Processes

import torch
from torch import Tensor

logger = logging.getLogger("pipeline.ppo")
KEPT = 2  # versions of the weights: the newest, and the one that a slow reader may still have open
MOST_CONNECTIONS = 256
PAUSE = 2.0  # seconds between two questions whether the server is back
VERSION = re.compile(r"weights-(\d{6})")


def check_server(server: VLLMServer, tokenizer: Any, tokens: int, limits: str, whose: str) -> ServedModel:
    """Look at a server before it is sent weights.

    Args:
        tokens: of a prompt and its response at most. limits: what they are, and whose: what has the tokenizer, for errors.

    Raises:
        UserError: none answers, it is no vLLM, takes no weights, or serves a model of other tokens or a shorter context.
    """
    try:
        model = server.model()
        server.check_development_mode()
        others = [text for text in filter(None, PROBES) if server.tokenize(text) != _ids(tokenizer, text)]
    except ServerFailure as failure:
        raise UserError(f"engine_url {server.url}: no answer ({failure}); start the server by {START}") from None
    if model.context < tokens:
        raise UserError(
            f"engine_url {server.url}: its context of {model.context} tokens is less than {limits} ({tokens}); start it with "
            f"--max-model-len {tokens} or more"
        )
    if others:
        raise UserError(
            f"engine_url {server.url}: model {model.name!r} has another tokenizer than {whose} (tried on {others[0]!r}); "
            "serve that folder"
        )
    logger.info("vLLM %s at %s samples, model %r", model.version, server.url, model.name)
    return model


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@dataclass
class VLLMEngine:
    """Gives a server the weights of policy or reference, and asks it for responses.

    All processes call `sample` together: gathering sharded weights is an exchange. Each asks for its own prompts.

    Attributes:
        folder: of the weights' versions, seen by the server under the same path.
        probe: on its prompt trainer and server are compared.
        precision: "fp32" or "bf16", of the trainer's passes.
        wait: seconds that a server which fails may stay away.
        adapters: the networks, where their policy's adapter is sent alone; the reference is the base, which is sent once.
        reference: the reference is on the device inside `with` only (see `models.offload`).
        leave_if_interrupted: ends the run after a signal, in all processes; called while the server is waited for.
    """

    server: VLLMServer
    settings: SamplingSettings
    networks: Networks
    processes: Processes
    device: torch.device
    folder: Path
    probe: Probe
    precision: str
    wait: float
    adapters: AdapterNetworks | None
    reference: AbstractContextManager[None]
    leave_if_interrupted: Callable[[], None]
    _sent: list[float] | None = None  # sums of the weights that the server has; None: unknown
    _loaded: set[str] = field(default_factory=set)  # kinds of weights that the server has taken before

    @property
    def takes_reference(self) -> bool:
        """Whether a server of the policy's architecture can load the reference: it is the policy's base, or of its shapes."""
        frozen = [p.shape for network in self.networks.frozen() for p in network.parameters()]
        return not frozen or frozen == [p.shape for p in self.networks.policy.parameters()]

    def sample(
        self, prompt_ids: Sequence[Sequence[int]], uniforms: Tensor | None, network: str = "policy"
    ) -> list[SampledResponse]:
        """A response to each prompt, as `engine.LocalEngine.sample` but for its random numbers.

        Args:
            network: "policy" or "reference".

        Raises:
            UserError: in every process: the server has other weights, gives useless answers, or stays away too long.
        """
        until: float | None = None
        while True:
            responses: list[SampledResponse] = []
            failure = self._send_changed_weights(network)
            if failure is None:
                responses, failure = self._responses(prompt_ids, uniforms)
            if failure is None:
                return responses
            self._sent = None  # it may have restarted
            until = time.monotonic() + self.wait if until is None else until
            if self.processes.is_main:
                logger.warning("ppo: the server at %s failed: %s; its weights are sent again", self.server.url, failure)
            back = False
            while not back:
                back = self.processes.from_main(partial(self._is_back, failure, until))
                self.leave_if_interrupted()

    def remove_weights(self) -> None:
        """Delete what was written for the server."""
        if self.processes.is_main:
            for version in self._versions():
                shutil.rmtree(version)

    # -------------------------------------------------------------------------------------------- weights

    def _send_changed_weights(self, network: str) -> str | None:
        """Send a network's weights unless the server has them; returns why it could not take them."""
        with self.reference if network == "reference" else nullcontext():
            sums = _sums(self._parameters(network))
        if not self.processes.any(sums != self._sent):
            return None
        needed = [network]
        if self.adapters is not None:  # what an earlier run left on the server may be another base
            needed = [*(["reference"] if self._sent is None else []), *(["adapter"] if network == "policy" else [])]
        self.server.with_adapter = "adapter" in needed
        with self.reference:  # comparing measures it too
            for what in needed:
                newest = self.processes.from_main(self._next_version)
                self._write(what, newest.with_suffix(".part"))
                if failure := self.processes.from_main(partial(self._load, what, newest)):
                    return failure
            failure, response = self.processes.from_main(self._ask_probe)
            if response is None:
                return failure
            self._compare(response, network)
        self._sent = sums
        return None

    def _write(self, what: str, folder: Path) -> None:
        if what == "adapter" and self.adapters is not None:
            self.adapters.save_adapter(folder)
        elif what == "policy":
            self.networks.save_policy(folder)
        else:
            self.networks.save_reference(folder)

    def _parameters(self, network: str) -> list[torch.nn.Parameter]:
        """Those by which the weights of a network are told from others that were sent; of the base of adapters, none."""
        if network == "policy":
            return list(self.networks.trained["policy"])
        return [parameter for frozen in self.networks.frozen() for parameter in frozen.parameters()]

    def _next_version(self) -> Path:
        """The path of the next version; what an interrupted writer left is removed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for part in self.folder.glob("weights-*.part"):
            shutil.rmtree(part)
        versions = self._versions()
        number = int(versions[-1].name.removeprefix("weights-")) + 1 if versions else 1
        return self.folder / f"weights-{number:06d}"

    def _versions(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("weights-*") if VERSION.fullmatch(path.name))

    def _load(self, what: str, newest: Path) -> str | None:
        """Publish a version and have it loaded; returns why that failed."""
        newest.with_suffix(".part").rename(newest)  # whole or not there
        for old in self._versions()[:-KEPT]:
            shutil.rmtree(old)
        first = what not in self._loaded
        try:
            if what == "adapter":
                self.server.load_adapter(newest / "adapter", for_the_first_time=first)
            else:
                self.server.load_weights(newest, for_the_first_time=first)
        except ServerFailure as failure:
            return str(failure)
        self._loaded.add(what)
        return None

    def _ask_probe(self) -> tuple[str | None, SampledResponse | None]:
        try:
            return None, self.probe.ask(self.settings)
        except ServerFailure as failure:
            return str(failure), None

    def _compare(self, response: SampledResponse, network: str) -> None:
        """
        Raises:
            UserError: trainer and server give the probe's response other log-probabilities.
        """
        batch = response_batch(
            [self.probe.prompt],
            [response.ids],
            pad_id=self.settings.pad_id,
            packed=self.networks.packed,
            score_after_response=False,
            device=self.device,
        )
        measured = self.networks.compute_logprobs_and_values(batch, with_values=False)
        logprobs = measured.logprobs if network == "policy" else measured.ref_logprobs
        limit, what = DRIFT[self.precision], f"the {network}'s weights"
        if (
            self.server.with_adapter and self.precision == "fp32"
        ):  # a server that ignores an adapter is off by its effect
            effect = (measured.logprobs - measured.ref_logprobs).abs().mean().item()
            limit, what = min(limit, max(SAME, effect / 2)), "the policy's adapter"
        drift = (logprobs.cpu() - torch.tensor(response.logprobs)).abs().mean().item()
        check_drift(drift, limit, what, self.server)

    # -------------------------------------------------------------------------------------------- responses

    def _responses(
        self, prompt_ids: Sequence[Sequence[int]], uniforms: Tensor | None
    ) -> tuple[list[SampledResponse], str | None]:
        """This process's responses, and why any process got none or got them of other weights."""
        responses: list[SampledResponse] = []

        def ask() -> list[str]:
            try:
                seeds = request_seeds(uniforms, len(prompt_ids))
                responses.extend(self.server.sample_all(prompt_ids, seeds, self.settings))
            except ServerFailure as failure:
                return [str(failure)]
            return []

        failures = self.processes.gather(ask)
        failure = failures[0] if failures else self.processes.from_main(self._lost)
        return responses, failure

    def _lost(self) -> str | None:
        """Why the server's weights are no longer those that were sent, if so."""
        try:
            return self.probe.lost()
        except ServerFailure as failure:
            return str(failure)

    def _is_back(self, failure: str, until: float) -> bool:
        """Whether the server answers, after a pause.

        Raises:
            UserError: the time is over.
        """
        time.sleep(min(PAUSE, self.wait / 10))
        if time.monotonic() > until:
            raise UserError(
                f"engine_url {self.server.url}: {failure}; not back after {self.wait:g} s (engine_wait). Start the server, then "
                f"the same command again: it resumes from the last checkpoint ({PAGE})"
            )
        return self.server.answers()


def request_seeds(uniforms: Tensor | None, prompts: int) -> list[int | None]:
    """A seed per prompt from its row's uniform numbers, which depend on the rollout's seed and the row alone."""
    return [None] * prompts if uniforms is None else [int(row[0].item() * 2**53) for row in uniforms]


def _sums(parameters: Sequence[torch.nn.Parameter]) -> list[float]:
    """A sum per parameter, or of this process's part of it: an update changes at least one."""
    if not parameters:
        return []
    with torch.no_grad():
        return torch.stack([local(parameter).sum(dtype=torch.float64) for parameter in parameters]).tolist()  # type: ignore[no-any-return]

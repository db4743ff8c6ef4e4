"""What shows which weights a vLLM server has: a short answer to one prompt, compared with a model's own log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from pipeline.errors import UserError
from pipeline.rollout.engine import SampledResponse, SamplingSettings
from pipeline.rollout.vllm_server import START, VLLMServer

import torch

PROBE_TOKENS, PROBE_SEED = 16, 0
SAME = 1e-3  # nats per token between two answers of one server with the same weights


@dataclass
class Probe:
    """A prompt, and what the server answered to it after its weights were last loaded.

    Attributes:
        ids: the prompt and its response.
        logprobs: of these, as the server computed them.
    """

    server: VLLMServer
    prompt: Sequence[int]
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def ask(self, settings: SamplingSettings) -> SampledResponse:
        """The response of the weights that the server has now, by which they are known again."""
        short = replace(settings, max_new_tokens=min(PROBE_TOKENS, settings.max_new_tokens))
        response = self.server.sample(self.prompt, PROBE_SEED, short)
        self.ids = [*self.prompt, *response.ids[:-1]]
        self.logprobs = self.server.logprobs(self.ids)
        return response

    def lost(self) -> str | None:
        """Why the server's weights are no longer those that were asked, if so.

        Raises:
            ServerFailure: it does not answer.
        """
        apart = (torch.tensor(self.server.logprobs(self.ids)) - torch.tensor(self.logprobs)).abs()
        if apart.numel() and not apart.mean().item() <= SAME:
            return "it answers with other weights than it was sent: it restarted, or somebody else sent it some"
        return None


def check_drift(drift: float, limit: float, what: str, server: VLLMServer) -> None:
    """
    Args:
        drift: nats per token between the server's log-probabilities of the probe's response and those computed here.
        what: weights that it should have.

    Raises:
        UserError: it has others, or computes something else.
    """
    if not drift <= limit:
        raise UserError(
            f"engine_url {server.url}: after loading {what} its log-probabilities differ from those computed here by "
            f"{drift:.2g} nats per token (at most {limit:g}): another model, another --dtype than here, or no --logprobs-mode "
            f"processed_logprobs; start it by {START}"
        )

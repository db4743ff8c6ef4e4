"""A causal LM that computes log-probabilities of chosen tokens, without logits of all positions."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from pipeline.algorithms.logprobs import tempered_logits, token_logprobs
from pipeline.data.encoding import IGNORE
from pipeline.models.packed import SequenceBatch, body, hidden_states, model_inputs
from pipeline.models.sizes import CACHED_LOGITS, FEWEST_ROWS, LOGITS_BYTES, ROW_MULTIPLE

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

logger = logging.getLogger("pipeline")
LogitTransform = Callable[[Tensor], Tensor]


class LanguageModel(nn.Module):
    """A causal LM, the temperature of its distribution, and the ids that it never gives any probability.

    Hidden states are picked at the wanted positions before the LM head, and a large head runs in chunks that are recomputed
    in the backward pass, so a (batch, length, vocabulary) tensor never exists. A model whose logits cannot be computed from
    its last hidden states in a known way takes its own forward pass instead, which does compute them (`direct_head` False).
    """

    def __init__(self, model: PreTrainedModel, temperature: float, forbidden_ids: list[int]):
        super().__init__()
        self.model: Any = model
        self.forbidden: Tensor
        self.temperature = temperature
        self.register_buffer("forbidden", torch.tensor(forbidden_ids, dtype=torch.long), persistent=False)
        self.transform = logit_transform(model)
        self.direct_head = self.transform is not None

    def forward(
        self, batch: SequenceBatch, positions: Tensor, tokens: Tensor, with_entropy: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probability and, if asked for, entropy of chosen tokens under the sampled distribution.

        Args:
            positions: (n,) int64, where in the flattened input the state stands that predicts each token.
            tokens: (n,) int64.

        Returns:
            logprobs, entropy: (n,) fp32, nats; logprobs carry the gradient.
        """
        if self.direct_head:
            hidden = hidden_states(body(self.model), batch)[positions]
            return self._chunked(hidden, tokens, self.temperature, self.forbidden, with_entropy=with_entropy)
        logits = self.model(**model_inputs(batch)).logits.flatten(0, 1)[positions]
        return token_logprobs(tempered_logits(logits, self.temperature, self.forbidden), tokens, with_entropy)

    def hidden(self, batch: SequenceBatch) -> Tensor:
        """(tokens, width) last hidden states."""
        return hidden_states(body(self.model), batch)

    def logprobs_and_hidden(
        self, batch: SequenceBatch, positions: Tensor, tokens: Tensor, with_entropy: bool = True
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """As `forward`, and the (tokens, width) last hidden states, from one forward pass where `direct_head`."""
        hidden = hidden_states(body(self.model), batch)
        if not self.direct_head:  # its logits take a forward pass of their own
            return *self.forward(batch, positions, tokens, with_entropy), hidden
        states = hidden[positions]
        return *self._chunked(states, tokens, self.temperature, self.forbidden, with_entropy=with_entropy), hidden

    def text_nll(self, input_ids: Tensor, position_ids: Tensor | None, labels: Tensor) -> Tensor:
        """Summed negative log-likelihood of text, over all of the model's ids and without temperature.

        Args:
            input_ids, position_ids, labels: (rows, length); positions restart with each document (None: one document per
                row), labels are IGNORE where nothing is learnt and stand at their own token's place.
        """
        packed = {} if position_ids is None else {"position_ids": position_ids}
        targets = labels[:, 1:]
        counted = targets != IGNORE
        if not self.direct_head:
            logits = self.model(input_ids=input_ids, use_cache=False, **packed).logits[:, :-1][counted]
            return -token_logprobs(logits.float(), targets[counted], with_entropy=False)[0].sum()
        states = body(self.model)(input_ids=input_ids, use_cache=False, **packed).last_hidden_state
        logprobs, _ = self._chunked(states[:, :-1][counted], targets[counted], 1.0, None, with_entropy=False)
        return -logprobs.sum()

    def _chunked(
        self, hidden: Tensor, tokens: Tensor, temperature: float, forbidden: Tensor | None, *, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probability and entropy of `tokens` after hidden states (n, width), a bounded number of logits at a time."""
        vocabulary = self.model.get_output_embeddings().weight.shape[0]
        n, chunk = len(tokens), max(1, LOGITS_BYTES // (4 * vocabulary))
        recompute = n > chunk and torch.is_grad_enabled()
        if hidden.device.type == "cpu":
            spare = -n % ROW_MULTIPLE
            hidden, tokens = nn.functional.pad(hidden, (0, 0, 0, spare)), nn.functional.pad(tokens, (0, spare))
            chunk = min(chunk, max(FEWEST_ROWS, CACHED_LOGITS // vocabulary))

        def run(states: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor | None]:
            assert self.transform is not None
            logits = self.transform(self.model.get_output_embeddings()(states))
            return token_logprobs(tempered_logits(logits, temperature, forbidden), chosen, with_entropy)

        pieces = zip(hidden.split(chunk), tokens.split(chunk), strict=True)
        parts = [checkpoint(run, h, t, use_reentrant=False) if recompute else run(h, t) for h, t in pieces]
        entropies = [entropy for _, entropy in parts if entropy is not None]
        logprobs = torch.cat([logprobs for logprobs, _ in parts])[:n].clone()  # FSDP2 warns of a module's view
        return logprobs, torch.cat(entropies)[:n].clone() if with_entropy else None


@torch.no_grad()
def logit_transform(model: Any) -> LogitTransform | None:
    """The model's operation on its logits after the LM head: soft-capping (Gemma 2), scaling (Cohere, Granite) or nothing.

    Found in its config, and tried on the model itself.

    Returns:
        a function of logits; None if it does not give the model's own logits.
    """
    text = model.config.get_text_config()
    head = model.get_output_embeddings()
    if head is None:
        return None
    ids = torch.arange(4, device=next(model.parameters()).device)[None] % text.vocab_size
    training = model.training
    model.eval()
    own = model(input_ids=ids, use_cache=False).logits.float()
    try:
        direct = head(body(model)(input_ids=ids, use_cache=False).last_hidden_state)
    except RuntimeError:  # RemBERT: a layer of another width stands between
        direct = None
    model.train(training)
    transform = _configured_transform(text)
    if direct is not None and torch.allclose(transform(direct).float(), own, atol=1e-4, rtol=1e-4):
        return transform
    logger.info("%s changes its logits in a way that is not known here; they are computed whole", type(model).__name__)
    return None


def _configured_transform(config: Any) -> LogitTransform:
    cap = getattr(config, "final_logit_softcapping", None)
    factor = 1.0
    for name in ("logit_scale", "lm_head_multiplier"):
        if isinstance(value := getattr(config, name, None), int | float):
            factor *= value
    if isinstance(divisor := getattr(config, "logits_scaling", None), int | float) and divisor:
        factor /= divisor

    def transform(logits: Tensor) -> Tensor:
        logits = logits * factor if factor != 1.0 else logits
        return torch.tanh(logits / cap) * cap if cap else logits

    return transform

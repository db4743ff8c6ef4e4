"""PPO's policy and reference: log-probabilities of response tokens only, no logits elsewhere."""

from __future__ import annotations

from typing import Any

from pipeline.algorithms.logprobs import tempered_logits, token_logprobs
from pipeline.errors import UserError

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

LOGITS_BYTES = 256 * 2**20  # of fp32 logits alive at once


class PolicyModel(nn.Module):
    """A causal LM that answers with log-probabilities of given response tokens.

    Hidden states are picked at response positions before the LM head, and a large head runs in chunks that are
    recomputed in the backward pass, so a (batch, length, vocab) tensor never exists.
    """

    def __init__(self, model: PreTrainedModel, temperature: float, forbidden: list[int]):
        super().__init__()
        self.model: Any = model
        self.forbidden: Tensor
        self.temperature = temperature
        self.register_buffer("forbidden", torch.tensor(forbidden, dtype=torch.long), persistent=False)

    def forward(self, input_ids: Tensor, positions: Tensor, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy of response tokens.

        Args:
            input_ids: (batch, length), right-padded; causal, so padding needs no attention mask.
            positions: (batch, n) int64, position whose hidden state predicts each token.
            tokens: (batch, n) int64
            mask: (batch, n) bool, True counts.

        Returns:
            logprobs, entropy: (batch, n) fp32, 0 where masked; logprobs carry the gradient.
        """
        hidden = self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        picked = hidden.gather(1, positions[:, :, None].expand(-1, -1, hidden.shape[-1]))[mask]
        chunk = max(1, LOGITS_BYTES // (4 * self.model.get_output_embeddings().weight.shape[0]))
        pieces = list(zip(picked.split(chunk), tokens[mask].split(chunk), strict=True))
        parts = [self._chunk(h, t, recompute=len(pieces) > 1) for h, t in pieces]
        logprobs = torch.zeros(mask.shape, dtype=torch.float32, device=hidden.device)
        entropy = torch.zeros_like(logprobs)
        logprobs = logprobs.masked_scatter(mask, torch.cat([lp for lp, _ in parts]))
        entropy = entropy.masked_scatter(mask, torch.cat([e for _, e in parts]))
        return logprobs, entropy

    def _chunk(self, hidden: Tensor, tokens: Tensor, recompute: bool) -> tuple[Tensor, Tensor]:
        def run(hidden: Tensor) -> tuple[Tensor, Tensor]:
            logits = self.model.get_output_embeddings()(hidden)
            return token_logprobs(tempered_logits(logits, self.temperature, self.forbidden), tokens)

        if recompute and torch.is_grad_enabled():
            return checkpoint(run, hidden, use_reentrant=False)
        return run(hidden)

    @torch.no_grad()
    def refuse_transformed_logits(self) -> None:
        """Some architectures cap or scale logits after the head (Gemma 2, Cohere); those would be trained wrongly here."""
        device = next(self.parameters()).device
        ids = torch.arange(4, device=device)[None] % self.model.config.get_text_config().vocab_size
        hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        direct = self.model.get_output_embeddings()(hidden)
        if not torch.allclose(
            direct.float(), self.model(input_ids=ids, use_cache=False).logits.float(), atol=1e-4, rtol=1e-4
        ):
            raise UserError(
                f"{type(self.model).__name__} changes its logits after the LM head (soft-capping or scaling); "
                "PPO does not support that yet"
            )

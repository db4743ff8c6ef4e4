"""The likelihood of text under a causal language model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pipeline.data.encoding import IGNORE

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def token_nll(model: Any, batches: Iterable[dict[str, Tensor]], device: torch.device) -> tuple[float, int, int]:
    """Summed negative log-likelihood of labelled tokens.

    Args:
        model: a causal LM; called without attention mask and cache, so that packed documents stay apart.
        batches: input_ids, position_ids (where rows hold several documents), labels, each (rows, length).

    Returns:
        nll in nats, number of labelled tokens, number of them that the model ranks first.
    """
    nll, tokens, hits = 0.0, 0, 0
    for batch in batches:
        labels = batch["labels"][:, 1:].to(device)
        inputs = {key: batch[key].to(device) for key in ("input_ids", "position_ids") if key in batch}
        logits = model(**inputs, use_cache=False).logits[:, :-1]
        keep = labels != IGNORE
        logits, labels = logits[keep].float(), labels[keep]
        nll += F.cross_entropy(logits, labels, reduction="sum").double().item()
        tokens += labels.numel()
        hits += int((logits.argmax(-1) == labels).sum())
    return nll, tokens, hits

"""How well a language model predicts text."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from pipeline.data.encoding import IGNORE
from pipeline.evaluation.metric_info import metric_info

import evaluate
import torch
import torch.nn.functional as F
from torch import Tensor


class Perplexity(evaluate.Metric):
    """exp(total negative log-likelihood / total predicted tokens): every token weighs the same, whatever its batch."""

    def _info(self) -> evaluate.MetricInfo:
        return metric_info(
            self,
            "nll: summed negative log-likelihood of a text, nats; tokens: its predicted tokens",
            nll="float64",
            tokens="int64",
        )

    def _compute(self, nll: list[float], tokens: list[int]) -> dict[str, float]:
        loss = math.fsum(nll) / max(sum(tokens), 1)
        return {"perplexity": math.exp(min(loss, 700.0)), "loss": loss}


class BitsPerByte(evaluate.Metric):
    """Total negative log-likelihood in bits over the text's UTF-8 bytes: comparable between tokenizers."""

    def _info(self) -> evaluate.MetricInfo:
        return metric_info(
            self,
            "nll: summed negative log-likelihood of a text, nats; num_bytes: its length in UTF-8",
            nll="float64",
            num_bytes="int64",
        )

    def _compute(self, nll: list[float], num_bytes: list[int]) -> dict[str, float]:
        return {"bits_per_byte": math.fsum(nll) / math.log(2) / max(sum(num_bytes), 1)}


@torch.no_grad()
def token_nll(model: Any, batches: Iterable[dict[str, Tensor]], device: torch.device) -> tuple[float, int, int]:
    """Summed negative log-likelihood of labelled tokens.

    Args:
        model: a causal LM; called without attention mask and cache, so that packed documents stay apart.
        batches: input_ids, position_ids, labels, each (rows, length).

    Returns:
        nll in nats, number of labelled tokens, number of them that the model ranks first.
    """
    nll, tokens, hits = 0.0, 0, 0
    for batch in batches:
        labels = batch["labels"][:, 1:].to(device)
        inputs = {key: batch[key].to(device) for key in ("input_ids", "position_ids")}
        logits = model(**inputs, use_cache=False).logits[:, :-1]
        keep = labels != IGNORE
        logits, labels = logits[keep].float(), labels[keep]
        nll += F.cross_entropy(logits, labels, reduction="sum").double().item()
        tokens += labels.numel()
        hits += int((logits.argmax(-1) == labels).sum())
    return nll, tokens, hits

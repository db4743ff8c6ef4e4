"""Reward and value models: sequence classifiers of one label, whose scores are centred by an offset in the config.

A bias on the head would be dropped at reload (transformers' heads have none), so `config.score_offset` holds what is
subtracted from the raw logit; scoring and the value model both do so.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

from pipeline.data.batching import microbatches
from pipeline.data.collators import right_pad
from pipeline.errors import UserError
from pipeline.models.loading import load_classifier, read_config
from pipeline.models.packed import SequenceBatch, hidden_states, is_packed, pack
from pipeline.models.sizes import SCORING_TOKENS, attention_savings_worth_a_group

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

OFFSET = "score_offset"


def load_scalar_model(path: str, quantization: str | None = None) -> PreTrainedModel:
    """A sequence classifier with one label, fp32; a causal LM's folder gets a new head."""
    # Loading a causal LM as a classifier reports the unused LM head and the new score head, which are the point here, and
    # layers that tensor parallelism, which nobody asked for, would leave whole.
    loggers = [logging.getLogger(f"transformers.{name}") for name in ("modeling_utils", "distributed.tensor_parallel")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        return load_classifier(path, quantization)
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def check_one_score_head(path: str) -> None:
    """A reward model has exactly one label."""
    config = read_config(path)
    architectures = config.architectures or []
    if not any("SequenceClassification" in name for name in architectures):
        raise UserError(f"{path!r} is no reward model (its architecture is {', '.join(architectures) or 'unknown'})")
    if config.num_labels != 1:
        raise UserError(f"{path!r} has {config.num_labels} labels; a reward model has one")


def scalar_head(model: nn.Module) -> nn.Linear:
    """The linear layer with one output: `score` of decoders, `classifier`'s last layer of encoders."""
    heads = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1]
    if not heads:
        raise UserError(f"{type(model).__name__} has no linear head with one output; it cannot be a reward model")
    return heads[-1]


def init_head(model: nn.Module, std: float | None, seed: int) -> float:
    """Draw the head's weights from N(0, std²), std = 1/√(d + 1) by default (Stiennon et al. 2020); returns std."""
    head = scalar_head(model)
    if std is None:
        std = 1 / math.sqrt(head.in_features + 1)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator) * std)
        if head.bias is not None:
            head.bias.zero_()
    return std


def score_offset(model: nn.Module) -> float:
    return float(getattr(model.config, OFFSET, 0.0))


def set_offset(model: nn.Module, offset: float) -> None:
    setattr(model.config, OFFSET, offset)


def apply_head(model: nn.Module, hidden: Tensor) -> Tensor:
    """Raw scores of hidden states (…, width), computed in fp32: bf16 has eight bits, too few beside a large offset.

    Returns:
        (…,) fp32, the offset still in them.
    """
    head = scalar_head(model)
    with torch.autocast(hidden.device.type, enabled=False):
        return head(hidden.to(head.weight.dtype))[..., 0]  # type: ignore[no-any-return]


@torch.no_grad()
def score_ids(
    model: nn.Module,
    sequences: Sequence[Sequence[int]],
    pad_id: int,
    tokens_per_batch: int = SCORING_TOKENS,
    share: tuple[int, int] = (0, 1),
) -> Tensor:
    """Centred scores of token sequences, each read at its last token; packed if the model takes packed sequences.

    Args:
        sequences: token ids, prompt and response, the end token last where the response ended.
        tokens_per_batch: tokens of one forward pass.
        share: (i, n): every n-th pass from the i-th alone, equally many for each i. The sum over i is all scores.

    Returns:
        (sequences,) fp32 on the CPU; 0 where another share computes it.
    """
    scores = torch.zeros(len(sequences))
    device = next(model.parameters()).device
    lengths = [len(ids) for ids in sequences]
    for rows, counts in _shared(microbatches(lengths, range(len(sequences)), tokens_per_batch), *share):
        ends = torch.tensor([lengths[i] for i in rows], device=device)
        if is_packed(model):
            saving = attention_savings_worth_a_group(device.type)
            batch = pack([sequences[i] for i in rows], pad_id, saving).to(device)
            hidden = hidden_states(getattr(model, str(model.base_model_prefix)), batch)
            raw = apply_head(model, hidden[batch.starts + ends - 1])
        else:
            input_ids = right_pad([sequences[i] for i in rows], pad_id).to(device)
            raw = scores_at(model, input_ids, torch.arange(input_ids.shape[1], device=device) < ends[:, None])
        if counts:
            scores[rows] = raw.float().cpu() - score_offset(model)
    return scores


def _shared(batches: Sequence[list[int]], own: int, shares: int) -> Iterator[tuple[list[int], bool]]:
    """One share of the batches, and whether each counts: those that make shares equal are computed twice."""
    for start in range(0, len(batches), shares):
        counts = start + own < len(batches)
        yield batches[start + own if counts else start], counts


def forward_scores(model: nn.Module, input_ids: Tensor, mask: Tensor) -> Tensor:
    """Raw scores, the offset still in them.

    Args:
        input_ids: (rows, length), right-padded; mask: (rows, length) bool.

    Returns:
        (rows,)
    """
    logits: Tensor = model(input_ids=input_ids, attention_mask=mask.long(), **no_cache(model)).logits
    return logits[:, 0]


def no_cache(model: nn.Module) -> dict[str, bool]:
    """The argument that turns a decoder's cache off; encoders do not accept it."""
    config = getattr(model, "module", model).config  # in DistributedDataParallel or not
    return {"use_cache": False} if hasattr(config, "use_cache") else {}


def scores_at(model: nn.Module, input_ids: Tensor, mask: Tensor) -> Tensor:
    """Raw scores read at the mask's last token, whatever stands behind it.

    `forward_scores` reads at the last token that is not pad, as transformers' classifiers do.
    """
    if isinstance(model, ScoreReader):
        return model(input_ids, mask)  # type: ignore[no-any-return]
    if not hasattr(model, "score"):  # an encoder reads its first token, and attends to the mask's tokens alone
        return forward_scores(model, input_ids, mask)
    backbone = getattr(model, str(model.base_model_prefix))
    hidden = backbone(input_ids=input_ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
    last = mask.sum(1) - 1
    return apply_head(model, hidden[torch.arange(len(last), device=last.device), last])


class ScoreReader(nn.Module):
    """`scores_at` as the forward pass of a module, which can be sharded: that of the model itself reads elsewhere."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    @property
    def config(self) -> Any:
        return self.model.config

    def forward(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Raw scores; shapes as in `scores_at`."""
        return scores_at(self.model, input_ids, mask)


def scale_head(model: nn.Module, factor: float) -> None:
    """Multiply all scores by a factor."""
    head = scalar_head(model)
    with torch.no_grad():
        head.weight.mul_(factor)
        if head.bias is not None:
            head.bias.mul_(factor)


class ValueModel(nn.Module):
    """Per-token values from a scalar model: the head at every position, minus the offset."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        self.offset = score_offset(model)

    def forward(self, batch: SequenceBatch, positions: Tensor) -> Tensor:
        """Values at `positions`, (n,) int64 indices into the flattened input; returns (n,) fp32."""
        hidden = hidden_states(getattr(self.model, self.model.base_model_prefix), batch)
        return apply_head(self.model, hidden[positions]) - self.offset

"""Padding-free forward passes: sequences are concatenated, and attention is computed separately for each one.

Linear layers are nearly all of a step, so they should see no padding (a third of the tokens at PPO's lengths). transformers
does this for attention kernels that take lengths (flash attention). Here it is done around scaled dot-product attention:
its inputs are padded, and its output is packed again. The layout travels as a keyword argument of the model's forward, which
transformers hands down to attention, so that recomputation in a backward pass sees it too.

Private API (transformers 5.23): `AttentionInterface` and `AttentionMaskInterface` registration, `config._attn_implementation`,
`_supports_sdpa`. If any of them changes, `enable_packed_attention` returns False or tests/models/test_packed.py fails.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.data.collators import right_pad
from pipeline.models.sizes import LENGTH_MULTIPLE, TOKEN_MULTIPLE, attention_savings_worth_a_group, round_up

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

PACKED = "packed_sdpa"  # the name of our attention in a model's config
IGNORED_OPTIONS = ("dropout", "is_causal", "output_attentions", "position_ids", "use_cache", "cache_position")


@dataclass(frozen=True)
class PackingLayout:
    """Where attention finds the tokens of each sequence in a packed row.

    pad_index: per group of sequences of similar length, (sequences, length) index of a token in the packed row; the last
        token of the row (a filler) where a sequence is shorter.
    unpad_index: (tokens,) index of each packed token among the padded tokens of all groups, one group after the other.
    """

    pad_index: tuple[Tensor, ...]
    unpad_index: Tensor

    def to(self, device: torch.device) -> PackingLayout:
        return PackingLayout(tuple(index.to(device) for index in self.pad_index), self.unpad_index.to(device))


@dataclass(frozen=True)
class SequenceBatch:
    """Sequences of token ids as a model's input.

    input_ids, position_ids: (1, tokens) packed, or (sequences, length) padded on the right.
    starts: (sequences,) index of each sequence's first token in the flattened input.
    layout: of a packed row; None where sequences are padded.
    """

    input_ids: Tensor
    position_ids: Tensor
    starts: Tensor
    layout: PackingLayout | None = None

    def to(self, device: torch.device) -> SequenceBatch:
        layout = self.layout.to(device) if self.layout else None
        ids, positions, starts = (x.to(device) for x in (self.input_ids, self.position_ids, self.starts))
        return replace(self, input_ids=ids, position_ids=positions, starts=starts, layout=layout)


def pad(sequences: Sequence[Sequence[int]], pad_id: int) -> SequenceBatch:
    """Sequences padded on the right, which causal models need no mask for."""
    longest = round_up(max(map(len, sequences)), LENGTH_MULTIPLE)
    ids = F.pad(right_pad(sequences, pad_id), (0, longest - max(map(len, sequences))), value=pad_id)
    positions = torch.arange(longest).expand(len(sequences), -1)
    return SequenceBatch(ids, positions, torch.arange(len(sequences)) * longest)


def pack(sequences: Sequence[Sequence[int]], pad_id: int, min_saving: int | None = None) -> SequenceBatch:
    """Sequences concatenated into one row, with at least one filler last.

    Args:
        min_saving: attention scores per head that one more group of sequences must save; default: a CPU's.
    """
    lengths = torch.tensor([len(ids) for ids in sequences])
    starts = lengths.cumsum(0) - lengths
    total = int(lengths.sum())
    # Many tokens are rounded to an eighth of their power of two, which adds one in 28 on average.
    whole = round_up(total + 1, max(TOKEN_MULTIPLE, 2 ** (total.bit_length() - 4)))
    ids = torch.tensor([[*(token for row in sequences for token in row), *([pad_id] * (whole - total))]])
    positions, unpad_index = torch.zeros(whole, dtype=torch.long), torch.empty(total, dtype=torch.long)
    groups, before = [], 0
    saving = attention_savings_worth_a_group("cpu") if min_saving is None else min_saving
    for bucket in length_buckets(lengths.tolist(), saving):
        columns = torch.arange(round_up(len(sequences[bucket[-1]]), LENGTH_MULTIPLE))
        real = columns < lengths[bucket, None]
        index = torch.where(real, starts[bucket, None] + columns, whole - 1)
        positions[index[real]] = columns.expand_as(index)[real]
        unpad_index[index[real]] = before + real.flatten().nonzero()[:, 0]
        groups.append(index)
        before += index.numel()
    return SequenceBatch(ids, positions[None], starts, PackingLayout(tuple(groups), unpad_index))


def length_buckets(lengths: Sequence[int], min_saving: int) -> list[list[int]]:
    """Positions in groups of similar length, the longest last; a group is halved while that saves `min_saving` scores."""

    def halve(group: list[int]) -> list[list[int]]:
        halves = [group[: len(group) // 2], group[len(group) // 2 :]]
        if len(group) < 2 or scores(group) - sum(map(scores, halves)) < min_saving:
            return [group]
        return [part for half in halves for part in halve(half)]

    def scores(group: list[int]) -> int:
        return len(group) * round_up(lengths[group[-1]], LENGTH_MULTIPLE) ** 2

    return halve(sorted(range(len(lengths)), key=lambda i: lengths[i]))


def model_inputs(batch: SequenceBatch) -> dict[str, Any]:
    """The keyword arguments of a causal model's forward pass.

    A packed row comes with a mask of four dimensions: transformers takes such a mask for prepared and builds none of its own,
    and our attention does not read it.
    """
    if batch.layout is None:
        return {"input_ids": batch.input_ids, "use_cache": False}
    return {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch.input_ids.device),
        "packing": batch.layout,
        "use_cache": False,
    }


def body(model: Any) -> Any:
    """A language model without its head. Llama 4's text model has another name than its class says."""
    if model.base_model is not model:
        return model.base_model
    return next((child for child in model.children() if isinstance(child, PreTrainedModel)), model)


def hidden_states(backbone: Any, batch: SequenceBatch) -> Tensor:
    """(tokens, width) last hidden states. Those of fillers and padding have no meaning."""
    states: Tensor = backbone(**model_inputs(batch)).last_hidden_state.flatten(0, 1)
    return states


def is_packed(model: Any) -> bool:
    return getattr(model.config, "_attn_implementation", None) == PACKED


# ------------------------------------------------------------------------------------------------ attention


class _Pad(torch.autograd.Function):
    """(tokens, …) to (sequences, length, …) per group. Both directions are gathers: each position has one token, each token one position."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, unpad_index: Tensor, *pad_index: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(unpad_index)
        ctx.tokens = len(x)
        return tuple(x.index_select(0, index.flatten()).view(*index.shape, *x.shape[1:]) for index in pad_index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _concatenate(gradients, ctx.saved_tensors[0], ctx.tokens), None, *(None for _ in gradients)


class _Unpad(torch.autograd.Function):
    """The groups back to (tokens, …). Padding takes the last filler's gradient, which is 0 because nothing reads it."""

    @staticmethod
    def forward(ctx: Any, pad_index: tuple[Tensor, ...], unpad_index: Tensor, tokens: int, *groups: Tensor) -> Tensor:
        ctx.save_for_backward(*pad_index)
        return _concatenate(groups, unpad_index, tokens)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        back = (gradient.index_select(0, i.flatten()).view(*i.shape, *gradient.shape[1:]) for i in ctx.saved_tensors)
        return None, None, None, *back


def _concatenate(groups: Sequence[Tensor], unpad_index: Tensor, tokens: int) -> Tensor:
    """(tokens, …) from (sequences, length, …) of each group; fillers are 0."""
    flat = torch.cat([group.flatten(0, 1) for group in groups]) if len(groups) > 1 else groups[0].flatten(0, 1)
    packed = flat.new_zeros(tokens, *flat.shape[1:])
    torch.index_select(flat, 0, unpad_index, out=packed[: len(unpad_index)])
    return packed


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    packing: PackingLayout | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: (batch, heads, length, size) in, (batch, length, heads, size) out."""
    if packing is None:
        options |= {"sliding_window": sliding_window} if sliding_window is not None else {}
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    unknown = [name for name, option in options.items() if option is not None and name not in IGNORED_OPTIONS]
    if unknown:  # soft-capped scores, attention sinks, position biases: this attention does not compute them
        raise ValueError(f"packed attention does not know {', '.join(unknown)}")
    padded = (_Pad.apply(x[0].transpose(0, 1), packing.unpad_index, *packing.pad_index) for x in (query, key, value))
    groups = []
    for group in zip(*padded, strict=True):
        q, k, v = (x.transpose(1, 2) for x in group)
        window = sliding_window if sliding_window is not None and sliding_window < q.shape[2] else None
        groups.append(_attend(q, k, v, scaling, window).transpose(1, 2))
    return _Unpad.apply(packing.pad_index, packing.unpad_index, query.shape[2], *groups)[None], None


def _attend(q: Tensor, k: Tensor, v: Tensor, scaling: float | None, window: int | None) -> Tensor:
    """Causal attention of (sequences, heads, length, size), padded on the right, which therefore needs no other mask."""
    grouped = q.shape[1] > k.shape[1]
    visible = None
    if window is not None:
        visible = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
        visible &= ~torch.ones_like(visible).tril(-window)
    dtype = v.dtype
    # On a CPU torch's backward pass of bf16 attention is several times slower than that of fp32.
    upcast = q.device.type == "cpu" and dtype == torch.bfloat16
    with torch.autocast(q.device.type, enabled=False) if upcast else contextlib.nullcontext():
        q, k, v = (x.float() for x in (q, k, v)) if upcast else (q, k, v)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, is_causal=visible is None, scale=scaling, enable_gqa=grouped
        )
    return out.to(dtype)


AttentionInterface.register(PACKED, _attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)

"""Forward passes without padding: rows lie end to end in one sequence, and attention alone sees them apart.

Linear layers are nearly all of a step, so they should see no padding (a third of the tokens at PPO's lengths). transformers
does this for kernels that take lengths (flash attention); here it is done around any: attention lays its inputs out in
padded rows, and the outputs end to end again. It works for every architecture that takes its attention from
`AttentionInterface`; for others rows stay padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

from pipeline.data.collators import right_pad

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "rows_apart"
# Sizes are rounded up to multiples: oneDNN makes a kernel for each new shape, tensor cores want eights.
TOKENS, LENGTH = 64, 16
Batch = dict[str, Tensor]

_layout: ContextVar[tuple[Tensor, Tensor] | None] = ContextVar("layout", default=None)  # slots and places of `lay_out`


def lay_out(rows: Sequence[Sequence[int]], pad_id: int, packed: bool) -> Batch:
    """Rows of token ids as a model's input.

    Returns:
        input_ids, position_ids: (1, tokens) end to end, at least one filler last; or (rows, length), padded on the right.
        starts: (rows,) where each row begins in the flattened input.
        slots: (rows, length) the token that stands there in padded rows (the last filler, where none does), and
        places: (tokens of rows,) the slot of each token; where packed.
    """
    lengths = torch.tensor([len(row) for row in rows])
    longest = _up(int(lengths.max()), LENGTH)
    columns = torch.arange(longest)
    starts = lengths.cumsum(0) - lengths
    if not packed:
        ids = F.pad(right_pad(rows, pad_id), (0, longest - int(lengths.max())), value=pad_id)
        positions = columns.expand(len(rows), -1)
        return {"input_ids": ids, "position_ids": positions, "starts": torch.arange(len(rows)) * longest}
    total = int(lengths.sum())
    whole = _up(total + 1, TOKENS)
    ids = torch.tensor([[*(token for row in rows for token in row), *([pad_id] * (whole - total))]])
    real = columns[None] < lengths[:, None]
    positions = F.pad(columns.expand(len(rows), -1)[real], (0, whole - total))
    return {
        "input_ids": ids,
        "position_ids": positions[None],
        "starts": starts,
        "slots": torch.where(real, starts[:, None] + columns, whole - 1),
        "places": real.flatten().nonzero()[:, 0],
    }


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def hidden_states(trunk: Any, batch: Batch) -> Tensor:
    """(tokens, width) last hidden states of `lay_out`'s input. Those of fillers mean nothing and may not be read."""
    token = _layout.set((batch["slots"], batch["places"]) if "slots" in batch else None)
    try:
        found = trunk(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    finally:
        _layout.reset(token)
    states: Tensor = found.last_hidden_state.flatten(0, 1)
    return states


def prepare(model: Any) -> bool:
    """Let a model's attention keep packed rows apart; whether it does, found out by a trial.

    Where it does not (its attention is its own, or it carries a state along the sequence), the model is left as it was.
    """
    before = model.config._attn_implementation
    if not (model._supports_sdpa and model._can_set_attn_implementation()):
        return False
    vocabulary = model.config.get_text_config().vocab_size
    rows = [[i % vocabulary for i in range(n, 2 * n)] for n in (3, 7, 5)]
    apart = _trial(model, rows, lay_out(rows, 0, packed=False))  # by the model's own attention
    model.set_attn_implementation(NAME)
    packed = _trial(model, rows, lay_out(rows, 0, packed=True))
    quantised = getattr(model, "quantization_method", None) is not None
    tolerance = 2e-2 if quantised else 1e-4  # a quantised base computes in bf16
    same = bool((packed - apart).norm() <= tolerance * apart.norm())
    if not same:
        model.set_attn_implementation(before)
    return same


@torch.no_grad()
def _trial(model: Any, rows: list[list[int]], batch: Batch) -> Tensor:
    device = next(model.parameters()).device
    states = hidden_states(model.base_model, {key: value.to(device) for key, value in batch.items()}).float()
    starts = batch["starts"].tolist()
    return torch.cat([states[start : start + len(row)] for start, row in zip(starts, rows, strict=True)])


class _Pad(torch.autograd.Function):
    """(tokens, …) to (rows, length, …); a gather both ways, for each slot has one token and each token one slot."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slots: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.tokens = len(x)
        return x.index_select(0, slots.flatten()).view(*slots.shape, *x.shape[1:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _in_place(gradient, ctx.saved_tensors[0], ctx.tokens), None, None


class _Unpad(torch.autograd.Function):
    """(rows, length, …) back to (tokens, …). Padding slots take the last filler's gradient, which is 0: nobody reads it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slots: Tensor, places: Tensor, tokens: int) -> Tensor:
        ctx.save_for_backward(slots)
        return _in_place(x, places, tokens)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (slots,) = ctx.saved_tensors
        return gradient.index_select(0, slots.flatten()).view(*slots.shape, *gradient.shape[1:]), None, None, None


def _in_place(x: Tensor, places: Tensor, tokens: int) -> Tensor:
    """(tokens, …) from (rows, length, …); fillers are 0."""
    flat = x.new_zeros(tokens, *x.shape[2:])
    torch.index_select(x.flatten(0, 1), 0, places, out=flat[: len(places)])
    return flat


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: (batch, heads, length, size) in, (batch, length, heads, size) out."""
    layout = _layout.get()
    if layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, sliding_window=sliding_window, **options
        )
    slots, places = layout
    q, k, v = (_Pad.apply(x[0].transpose(0, 1), slots, places).transpose(1, 2) for x in (query, key, value))
    window = sliding_window if sliding_window is not None and sliding_window < slots.shape[1] else None
    out = _attend(q, k, v, scaling, window)
    return _Unpad.apply(out.transpose(1, 2), slots, places, query.shape[2])[None], None


def _attend(q: Tensor, k: Tensor, v: Tensor, scaling: float | None, window: int | None) -> Tensor:
    """Causal attention of rows padded on the right, which therefore need no other mask: (rows, heads, length, size)."""
    groups = q.shape[1] // k.shape[1]
    unfused = v.device.type == "cpu" and v.dtype == torch.bfloat16
    if window is None and not unfused:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=groups > 1)
    length = q.shape[2]
    seen = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    if window is not None:
        seen &= ~torch.ones_like(seen).tril(-window)
    if not unfused:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scaling, enable_gqa=groups > 1)
    # torch's fused backward is several times slower in bf16 on a CPU at PPO's lengths
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.transpose(2, 3)) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    bias = torch.zeros(seen.shape, dtype=scores.dtype, device=q.device).masked_fill(
        ~seen, torch.finfo(scores.dtype).min
    )
    return torch.softmax(scores + bias, -1, dtype=torch.float32).to(v.dtype) @ v


def _mask(*args: Any, **options: Any) -> Tensor | None:
    return sdpa_mask(*args, **options) if _layout.get() is None else None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)

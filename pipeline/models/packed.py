"""Forward passes without padding: rows lie end to end in one sequence, and attention alone sees them apart.

Linear layers are nearly all of a step, so they should see no padding (a third of the tokens at PPO's lengths). transformers
does this for kernels that take lengths (flash attention); here it is done around any: attention lays its inputs out in
padded rows, and the outputs end to end again. It works for every architecture that takes its attention from
`AttentionInterface`; for others rows stay padded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

from pipeline.data.collators import right_pad

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "rows_apart"
# Sizes are rounded up to multiples: oneDNN makes a kernel for each new shape, tensor cores want eights. Many tokens are
# rounded to an eighth of their power of two, which adds one in 28 on average.
TOKENS, LENGTH = 64, 16
# Attention scores a head that one more group of rows must save: on a CPU as measured; on a GPU a group costs launches,
# and the number is what its arithmetic does in their time (not measured).
WORTH = {"cpu": 2**14, "cuda": 2**22}
Batch = dict[str, Any]  # of tensors; `slots` is a tuple of them

_layout: ContextVar[tuple[tuple[Tensor, ...], Tensor] | None] = ContextVar("layout", default=None)  # slots and places


def lay_out(rows: Sequence[Sequence[int]], pad_id: int, packed: bool, worth: int = WORTH["cpu"]) -> Batch:
    """Rows of token ids as a model's input.

    Args:
        worth: see `WORTH`; `worth_on` the device that will attend.

    Returns:
        input_ids, position_ids: (1, tokens) end to end, at least one filler last; or (rows, length), padded on the right.
        starts: (rows,) where each row begins in the flattened input.
        slots: for each group of rows of similar length, (rows of it, length) the token that stands there in padded rows
            (the last filler, where none does), and
        places: (tokens of rows,) the slot of each token, the groups' slots counted end to end; where packed.
    """
    lengths = torch.tensor([len(row) for row in rows])
    starts = lengths.cumsum(0) - lengths
    if not packed:
        longest = _up(int(lengths.max()), LENGTH)
        ids = F.pad(right_pad(rows, pad_id), (0, longest - int(lengths.max())), value=pad_id)
        positions = torch.arange(longest).expand(len(rows), -1)
        return {"input_ids": ids, "position_ids": positions, "starts": torch.arange(len(rows)) * longest}
    total = int(lengths.sum())
    whole = _up(total + 1, max(TOKENS, 2 ** (total.bit_length() - 4)))
    ids = torch.tensor([[*(token for row in rows for token in row), *([pad_id] * (whole - total))]])
    positions, places = torch.zeros(whole, dtype=torch.long), torch.empty(total, dtype=torch.long)
    slots, before = [], 0
    for group in alike(lengths.tolist(), worth):
        columns = torch.arange(_up(len(rows[group[-1]]), LENGTH))
        real = columns < lengths[group, None]
        slot = torch.where(real, starts[group, None] + columns, whole - 1)
        positions[slot[real]] = columns.expand_as(slot)[real]
        places[slot[real]] = before + real.flatten().nonzero()[:, 0]
        slots.append(slot)
        before += slot.numel()
    return {
        "input_ids": ids,
        "position_ids": positions[None],
        "starts": starts,
        "slots": tuple(slots),
        "places": places,
    }


def worth_on(device: torch.device) -> int:
    return WORTH.get(device.type, WORTH["cuda"])


def alike(lengths: Sequence[int], worth: int) -> list[list[int]]:
    """Rows in groups of similar length, the longest last: halved as long as that saves `worth` attention scores a head."""

    def halve(group: list[int]) -> list[list[int]]:
        halves = [group[: len(group) // 2], group[len(group) // 2 :]]
        if len(group) < 2 or scores(group) - sum(map(scores, halves)) < worth:
            return [group]
        return [part for half in halves for part in halve(half)]

    def scores(group: list[int]) -> int:
        return len(group) * _up(lengths[group[-1]], LENGTH) ** 2

    return halve(sorted(range(len(lengths)), key=lambda i: lengths[i]))


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


def is_prepared(model: Any) -> bool:
    return getattr(model.config, "_attn_implementation", None) == NAME


@torch.no_grad()
def _trial(model: Any, rows: list[list[int]], batch: Batch) -> Tensor:
    device = next(model.parameters()).device
    states = hidden_states(model.base_model, send_to_device(batch, device)).float()
    starts = batch["starts"].tolist()
    return torch.cat([states[start : start + len(row)] for start, row in zip(starts, rows, strict=True)])


class _Pad(torch.autograd.Function):
    """(tokens, …) to (rows, length, …) of each group; a gather both ways, for each slot has one token and each token one slot."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, *slots: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(places)
        ctx.tokens = len(x)
        return tuple(x.index_select(0, slot.flatten()).view(*slot.shape, *x.shape[1:]) for slot in slots)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _end_to_end(gradients, ctx.saved_tensors[0], ctx.tokens), None, *(None for _ in gradients)


class _Unpad(torch.autograd.Function):
    """The groups back to (tokens, …). Padding slots take the last filler's gradient, which is 0: nobody reads it."""

    @staticmethod
    def forward(ctx: Any, slots: tuple[Tensor, ...], places: Tensor, tokens: int, *groups: Tensor) -> Tensor:
        ctx.save_for_backward(*slots)
        return _end_to_end(groups, places, tokens)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        back = (gradient.index_select(0, s.flatten()).view(*s.shape, *gradient.shape[1:]) for s in ctx.saved_tensors)
        return None, None, None, *back


def _end_to_end(groups: Sequence[Tensor], places: Tensor, tokens: int) -> Tensor:
    """(tokens, …) from (rows, length, …) of each group; fillers are 0."""
    slots = torch.cat([group.flatten(0, 1) for group in groups]) if len(groups) > 1 else groups[0].flatten(0, 1)
    found = slots.new_zeros(tokens, *slots.shape[1:])
    torch.index_select(slots, 0, places, out=found[: len(places)])
    return found


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
    parts = (_Pad.apply(x[0].transpose(0, 1), places, *slots) for x in (query, key, value))
    groups = []
    for part in zip(*parts, strict=True):
        q, k, v = (x.transpose(1, 2) for x in part)
        window = sliding_window if sliding_window is not None and sliding_window < q.shape[2] else None
        groups.append(_attend(q, k, v, scaling, window).transpose(1, 2))
    return _Unpad.apply(slots, places, query.shape[2], *groups)[None], None


def _attend(q: Tensor, k: Tensor, v: Tensor, scaling: float | None, window: int | None) -> Tensor:
    """Causal attention of rows padded on the right, which therefore need no other mask: (rows, heads, length, size)."""
    grouped = q.shape[1] > k.shape[1]
    seen = None
    if window is not None:
        seen = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
        seen &= ~torch.ones_like(seen).tril(-window)
    dtype = v.dtype
    # On a CPU torch's backward pass of bf16 attention is several times slower than that of fp32.
    upcast = q.device.type == "cpu" and dtype == torch.bfloat16
    with torch.autocast(q.device.type, enabled=False) if upcast else contextlib.nullcontext():
        q, k, v = (x.float() for x in (q, k, v)) if upcast else (q, k, v)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, is_causal=seen is None, scale=scaling, enable_gqa=grouped
        )
    return out.to(dtype)


def _mask(*args: Any, **options: Any) -> Tensor | None:
    return sdpa_mask(*args, **options) if _layout.get() is None else None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)

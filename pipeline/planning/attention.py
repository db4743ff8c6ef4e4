"""What attention computes and caches, from a config: heads of any size, latent attention, sliding windows, other layers."""

from __future__ import annotations

from typing import Any

from pipeline.planning.parameters import layers_of

FULL, WINDOWED = "full_attention", ("sliding_attention", "chunked_attention")


def attention_flops(config: Any, tokens: float, length: float, passes: float) -> float:
    """Floating-point operations of attention's two products, QKᵀ and AV, under a causal mask.

    Args:
        tokens: in sequences of `length` tokens each.
        passes: forward passes; a backward pass counts as two.
    """
    text = config.get_text_config()
    heads = int(text.num_attention_heads)
    query_width, value_width = (heads * size for size in _head_sizes(text))
    attended = sum(_mean_attended(length, window) for window in _windows(text))
    return passes * 2.0 * (query_width + value_width) * attended * tokens


def cache_bytes(config: Any, rows: int, length: int, bytes_each: int) -> int:
    """The key-value cache of rows of a length, as transformers keeps it.

    Grouped queries share keys and values; latent attention (DeepSeek) keeps `kv_lora_rank` + `qk_rope_head_dim` numbers per
    token and layer; a layer with a window keeps no more than that; layers without attention keep a state of constant size,
    which is left out.
    """
    text = config.get_text_config()
    if rank := getattr(text, "kv_lora_rank", None):
        width = int(rank) + int(text.qk_rope_head_dim)
    else:
        groups = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        width = int(groups) * sum(_head_sizes(text))
    tokens = sum(length if window is None else min(length, window) for window in _windows(text))
    return rows * width * tokens * bytes_each


def _head_sizes(text: Any) -> tuple[int, int]:
    """Numbers of a head's query (and key), and of its value."""
    if getattr(text, "kv_lora_rank", None):
        return int(text.qk_nope_head_dim) + int(text.qk_rope_head_dim), int(text.v_head_dim)
    size = int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    return size, size


def _windows(text: Any) -> list[int | None]:
    """The window of every layer that attends; None where it sees everything before it."""
    window = getattr(text, "sliding_window", None) or getattr(text, "attention_chunk_size", None)
    kinds = getattr(text, "layer_types", None)
    if not kinds:
        everywhere = window if getattr(text, "use_sliding_window", True) else None
        return [everywhere] * layers_of(text)
    return [window if kind in WINDOWED else None for kind in kinds if kind == FULL or kind in WINDOWED]


def _mean_attended(length: float, window: int | None) -> float:
    """Tokens that a token attends to, on average over a sequence."""
    if window is None or window >= length:
        return length / 2
    return window * (1 - window / (2 * length))

"""Small models of the same architecture, on which an assumption can be tried within a second."""

from __future__ import annotations

import contextlib
import copy
import math
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

LAYER_NAMES = ("num_hidden_layers", "n_layer", "num_layers")
WINDOW = 4  # tokens of a small copy's attention windows
WINDOW_NAMES = (
    "sliding_window",
    "attention_window_size",
    "sliding_window_size",
    "window_size",
    "attention_chunk_size",  # Llama 4
)
WIDTH, HEADS, LAYERS = 64, 4, 2
SMALL_VOCABULARY = 64
MOST_PARAMETERS = 60_000_000  # of a copy that keeps its widths; a larger one is narrowed


def narrow(config: PreTrainedConfig) -> PreTrainedConfig:
    """The same architecture with few, narrow layers; vocabulary and context stay."""
    small = copy.deepcopy(config)
    text = small.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    groups = getattr(text, "num_key_value_heads", None)
    changes = dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size"), WIDTH)
    changes |= dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "d_ff"), 2 * WIDTH)
    changes |= dict.fromkeys(LAYER_NAMES, LAYERS)
    changes |= dict.fromkeys(("num_attention_heads", "n_head", "num_heads"), HEADS)
    changes |= {"num_key_value_heads": HEADS if groups in (None, heads) else HEADS // 2, "head_dim": WIDTH // HEADS}
    for name, value in changes.items():
        if getattr(text, name, None) is not None:
            setattr(text, name, value)
    if getattr(text, "layer_types", None):
        with contextlib.suppress(AttributeError):  # Jamba's follow from its periods
            text.layer_types = text.layer_types[:LAYERS]
    return small


def has_window(config: PreTrainedConfig) -> bool:
    """Whether some layer attends to a limited number of tokens only."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or []
    if kinds:
        return any("sliding" in kind or "chunked" in kind for kind in kinds)
    return any(getattr(text, name, None) for name in WINDOW_NAMES)


def with_few_layers(config: PreTrainedConfig, window: int) -> PreTrainedConfig:
    """The text model's config with as few layers as show every kind of layer, a short attention window, a small vocabulary."""
    text = copy.deepcopy(config.get_text_config())
    kinds = list(getattr(text, "layer_types", None) or [])
    depth = min(max([2, *(kinds.index(kind) + 1 for kind in set(kinds))]), 8)
    for name in LAYER_NAMES:
        if getattr(text, name, None) is not None:
            setattr(text, name, min(depth, getattr(text, name)))
            break
    if kinds:
        with contextlib.suppress(AttributeError):
            text.layer_types = kinds[:depth]
    for name in WINDOW_NAMES:
        if getattr(text, name, None):
            setattr(text, name, window)
    text.vocab_size = SMALL_VOCABULARY
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(text, name, None) is not None:
            setattr(text, name, 0)
    return text


def small_copy(config: PreTrainedConfig, pad_id: int | None = None) -> PreTrainedModel | None:
    """A random fp32 model of the same architecture on the CPU, its attention windows WINDOW tokens long.

    Its weights have about unit gain, so that what one layer does shows in the output. The global random state is not used.

    Args:
        pad_id: its pad token.

    Returns:
        the model in evaluation mode; None if the architecture cannot be made small, whatever it raises.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for candidate in (with_few_layers, lambda c, w: narrow(with_few_layers(c, w))):
            try:
                small = candidate(config, WINDOW)
                if pad_id is not None:
                    small.get_text_config().pad_token_id = pad_id
                with torch.device("meta"):
                    size = AutoModelForCausalLM.from_config(small).num_parameters()
                if size > MOST_PARAMETERS:
                    continue
                model: Any = AutoModelForCausalLM.from_config(small, dtype=torch.float32).eval()
            except (
                TypeError,
                ValueError,
                AttributeError,
                RuntimeError,
                KeyError,
                IndexError,
                AssertionError,
                ZeroDivisionError,
            ):
                continue
            _set_unit_gain(model)
            return model  # type: ignore[no-any-return]
    return None


@torch.no_grad()
def _set_unit_gain(model: PreTrainedModel) -> None:
    for parameter in model.parameters():
        if parameter.dim() >= 2 and (std := parameter.std().item()) > 0:
            fan_in = parameter.shape[-1] if parameter.dim() == 2 else math.prod(parameter.shape[1:])
            parameter.mul_(max(1.0, 1 / (math.sqrt(fan_in) * std)))

"""What one training step holds in memory, and how much it computes, from a config alone.

A step is run on fake tensors (shapes and no data) under torch's own memory tracker, with four and with six layers; what a
layer adds is then counted for all of them. So no model has to fit anywhere, and 96 layers take as long as six.
"""

from __future__ import annotations

import copy
import functools
import warnings
from dataclasses import dataclass
from typing import Any

from pipeline.models.lora import linear_module_names

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedConfig

LAYERS = (4, 6)  # few, but enough that the peak lies where it lies in a deep model
LAYER_NAMES = ("num_hidden_layers", "n_layer", "num_layers")


@dataclass(frozen=True)
class Parameters:
    """Parameters of a model: all, those of its embedding tables, those in linear layers, those of the largest layer."""

    total: int
    embedding: int
    linear: int
    largest_layer: int


def build(config: PreTrainedConfig, scalar: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    """A model of the config, on whatever device or fake mode is active."""
    config = copy.deepcopy(config)
    for name in ("attn_pdrop", "attention_dropout", "attention_probs_dropout_prob"):
        if hasattr(config, name):
            setattr(config, name, 0.0)  # else a CPU keeps whole attention matrices, which a GPU's kernel does not
    if scalar:
        config.num_labels = 1
        config.get_text_config().pad_token_id = (
            0  # a classifier of several rows asks for one; which, is no matter of size
        )
        return AutoModelForSequenceClassification.from_config(config, dtype=dtype)
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def parameters(config: PreTrainedConfig, scalar: bool = False) -> Parameters:
    """Counted on the meta device: shapes are made, nothing is allocated."""
    return _parameters(_key(config), scalar)


def lora_parameters(config: PreTrainedConfig, rank: int, targets: list[str] | None, scalar: bool = False) -> int:
    """Parameters of LoRA adapters of a rank on a model's linear layers."""
    return rank * _lora_width(_key(config), tuple(targets) if targets else None, scalar)


class _key:
    """A config that a cache can hold: equal configs are one."""

    def __init__(self, config: PreTrainedConfig):
        self.config, self.text = config, type(config).__name__ + config.to_json_string()

    def __hash__(self) -> int:
        return hash(self.text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _key) and other.text == self.text


def _uniform(config: PreTrainedConfig) -> bool:
    """Whether every layer is like every other, so that two models of few layers tell what each adds."""
    kinds = getattr(config.get_text_config(), "layer_types", None) or ["all alike"]
    experts = any("expert" in name for name in config.to_dict())
    return len(set(kinds)) == 1 and not experts and any(hasattr(config, name) for name in LAYER_NAMES)


@functools.lru_cache(maxsize=64)
def _parameters(key: _key, scalar: bool) -> Parameters:
    if _uniform(key.config) and (depth := layers_of(key.config)) > LAYERS[1]:
        one, two = (_parameters(_key(with_layers(key.config, n)), scalar) for n in (1, 2))
        added = {name: getattr(two, name) - getattr(one, name) for name in ("total", "embedding", "linear")}
        return Parameters(
            **{n: getattr(one, n) + (depth - 1) * more for n, more in added.items()}, largest_layer=one.largest_layer
        )
    with torch.device("meta"):
        model = build(key.config, scalar)
    table = model.get_input_embeddings().weight
    total = sum(p.numel() for p in model.parameters())
    head = None if scalar else model.get_output_embeddings()
    tied = head is not None and head.weight is table
    positions = sum(
        m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Embedding) and m.weight is not table
    )
    blocks = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    largest = max((sum(p.numel() for p in layer.parameters()) for block in blocks for layer in block), default=0)
    names = set(linear_module_names(model))
    linear = sum(
        p.numel()
        for name, module in model.named_modules()
        if name.split(".")[-1] in names
        for p in module.parameters(recurse=False)
    )
    return Parameters(total, (0 if tied else table.numel()) + positions, linear, largest)


@functools.lru_cache(maxsize=64)
def _lora_width(key: _key, targets: tuple[str, ...] | None, scalar: bool) -> int:
    if _uniform(key.config) and (depth := layers_of(key.config)) > LAYERS[1]:
        one, two = (_lora_width(_key(with_layers(key.config, n)), targets, scalar) for n in (1, 2))
        return one + (depth - 1) * (two - one)
    with torch.device("meta"):
        model = build(key.config, scalar)
    names = set(targets or linear_module_names(model))
    return sum(sum(module.weight.shape) for name, module in model.named_modules() if name.split(".")[-1] in names)


def layers_of(config: PreTrainedConfig) -> int:
    return int(next(getattr(config, name) for name in LAYER_NAMES if hasattr(config, name)))


def with_layers(config: PreTrainedConfig, number: int) -> PreTrainedConfig:
    """The same model with so many layers."""
    changed = copy.deepcopy(config)
    name = next(name for name in LAYER_NAMES if hasattr(changed, name))
    kinds = getattr(changed, "layer_types", None)
    if kinds:
        changed.layer_types = kinds[:number]
    setattr(changed, name, number)
    return changed


def step_memory(
    config: PreTrainedConfig,
    rows: int,
    length: int,
    *,
    head: str = "causal",
    response: int | None = None,
    precision: str = "fp32",
    checkpointing: bool = False,
    logits_bytes: int | None = None,
) -> int:
    """Bytes that a forward and backward pass of (rows, length) tokens adds to weights, gradients and optimizer at its peak.

    Args:
        head: "causal" (logits of all positions, as transformers' Trainer makes them), "tiles" (none at once, as TRL's fused head
            in SFT; its tiles are left out), "score" (one a row), "value" (one a position), or "response" (logits of the last `response` positions of each row, in chunks of `logits_bytes`).
        precision: "fp32"; "autocast" (bf16 over fp32 weights: the bf16 copies of all weights count); "bf16" (weights gathered in
            bf16 a layer at a time, as sharded backends do).

    LoRA keeps the same activations: every adapter needs its layer's input, as the layer's own weight would.
    """
    return _step_memory(_key(config), rows, length, head, response, precision, checkpointing, logits_bytes)


@functools.lru_cache(maxsize=256)
def _step_memory(key: _key, rows: int, length: int, head: str, *rest: Any) -> int:
    depth = layers_of(key.config)
    if depth <= LAYERS[1]:
        return fake_step(key.config, rows, length, head, *rest)
    few, more = (fake_step(with_layers(key.config, n), rows, length, head, *rest) for n in LAYERS)
    return max(0, few + (more - few) * (depth - LAYERS[0]) // (LAYERS[1] - LAYERS[0]))


def fake_step(
    config: PreTrainedConfig,
    rows: int,
    length: int,
    head: str = "causal",
    response: int | None = None,
    precision: str = "fp32",
    checkpointing: bool = False,
    logits_bytes: int | None = None,
) -> int:
    """The same with exactly the config's layers."""
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        model = build(config, head in ("score", "value"), dtype).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        ids = torch.zeros(rows, length, dtype=torch.long)
        positions = torch.arange(length)[None].expand(rows, length)
        tracker = peak_tracker()
        tracker.track_external(model)
        with tracker:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
                loss = _loss(model, head, ids, positions, response, logits_bytes)
            loss.backward()
        peak = by_part(tracker)
    return peak["Total"] - sum(peak.get(part, 0) for part in ("PARAM", "GRAD", "BUFFER", "OPT"))


def peak_tracker() -> Any:
    """torch's tracker without its peaks of each module, which take half of its time; the peak of all is what we read."""
    from torch.distributed._tools.mem_tracker import MemTracker

    class Peak(MemTracker):
        def _update_peak_stats(
            self, peak_state: Any
        ) -> None:  # were it renamed, modules would be tracked again, no more
            kept, self.memory_tracking = self.memory_tracking, type(self.memory_tracking)()
            super()._update_peak_stats(peak_state)
            self.memory_tracking = kept

    return Peak()


def by_part(tracker: Any) -> dict[str, int]:
    """Bytes at the peak by torch's names: PARAM, GRAD, ACT, TEMP, OPT, BUFFER."""
    peak: dict[str, int] = {}
    for sizes in tracker.get_tracker_snapshot("peak").values():
        for kind, size in sizes.items():
            name = getattr(kind, "name", str(kind))
            peak[name] = peak.get(name, 0) + size
    return peak


def _loss(model: Any, head: str, ids: Any, positions: Any, response: int | None, logits_bytes: int | None) -> Any:
    if head == "score":
        return model(input_ids=ids, use_cache=False).logits.float().sum()
    if head == "value":
        trunk = getattr(model, model.base_model_prefix)
        hidden = trunk(input_ids=ids, use_cache=False).last_hidden_state
        return model.score(hidden[:, -(response or ids.shape[1]) :])[..., 0].float().sum()
    if head == "tiles":
        return model.base_model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state.float().sum()
    if head == "causal":
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), ids.flatten())
    from torch.utils.checkpoint import checkpoint

    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    picked = hidden[:, -(response or ids.shape[1]) :].flatten(0, 1)
    table = model.get_output_embeddings()
    chunk = max(1, (logits_bytes or 2**62) // (4 * table.weight.shape[0]))

    def run(states: Any) -> Any:
        return torch.log_softmax(F.linear(states, table.weight).float(), -1)[:, 0].sum()

    pieces = picked.split(chunk)
    many = len(pieces) > 1
    return sum(checkpoint(run, piece, use_reentrant=False) if many else run(piece) for piece in pieces)


def cache_bytes(config: PreTrainedConfig, rows: int, length: int, bytes_each: int) -> int:
    """The KV cache of rows of a length, all layers."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    groups = getattr(text, "num_key_value_heads", None) or heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return 2 * layers_of(text) * rows * length * groups * size * bytes_each

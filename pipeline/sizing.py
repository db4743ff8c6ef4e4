"""What one training step holds in memory, and how much it computes, from a config alone.

A step is run on fake tensors (shapes and no data) under torch's own memory tracker, with two and with three layers; what a
layer adds is then counted for all of them. So no model has to fit anywhere, and 96 layers take as long as three.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from pipeline.models.loading import linear_module_names

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedConfig

LAYERS = (2, 3)  # few, but enough that the peak lies where it lies in a deep model
LAYER_NAMES = ("num_hidden_layers", "n_layer", "num_layers")


@dataclass(frozen=True)
class Parameters:
    """Parameters of a model: all, those of its embedding tables, those in linear layers, those of the largest layer."""

    total: int
    embedding: int
    linear: int
    largest_layer: int

    @property
    def matmul(self) -> int:
        """What takes part in a matrix product for each token: all but the table that tokens are looked up in."""
        return self.total - self.embedding


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one forward and backward pass beyond weights, gradients and optimizer."""

    activations: int
    temporary: int

    @property
    def total(self) -> int:
        return self.activations + self.temporary


def build(config: PreTrainedConfig, scalar: bool = False) -> Any:
    """A model of the config, on whatever device or fake mode is active."""
    config = copy.deepcopy(config)
    for name in ("attn_pdrop", "attention_dropout", "attention_probs_dropout_prob"):
        if hasattr(config, name):
            setattr(config, name, 0.0)  # else a CPU keeps whole attention matrices, which a GPU's kernel does not
    if scalar:
        config.num_labels = 1
        return AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def parameters(config: PreTrainedConfig, scalar: bool = False) -> Parameters:
    """Counted on the meta device: shapes are made, nothing is allocated."""
    with torch.device("meta"):
        model = build(config, scalar)
    table = model.get_input_embeddings().weight
    total = sum(p.numel() for p in model.parameters())
    head = None if scalar else model.get_output_embeddings()
    tied = head is not None and head.weight is table
    positions = sum(
        m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Embedding) and m.weight is not table
    )
    blocks = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    largest = max((sum(p.numel() for p in layer.parameters()) for block in blocks for layer in block), default=0)
    linear = sum(
        p.numel()
        for name, module in model.named_modules()
        if name.split(".")[-1] in linear_module_names(model)
        for p in module.parameters(recurse=False)
    )
    return Parameters(total, (0 if tied else table.numel()) + positions, linear, largest)


def lora_parameters(config: PreTrainedConfig, rank: int, targets: list[str] | None, scalar: bool = False) -> int:
    """Parameters of LoRA adapters of a rank on a model's linear layers."""
    with torch.device("meta"):
        model = build(config, scalar)
        names = set(targets or linear_module_names(model))
        return sum(
            rank * sum(module.weight.shape) for name, module in model.named_modules() if name.split(".")[-1] in names
        )


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
    bf16: bool = False,
    checkpointing: bool = False,
    frozen: bool = False,
    logits_bytes: int | None = None,
) -> StepMemory:
    """Peak bytes that a forward and backward pass of (rows, length) tokens adds.

    Args:
        head: "causal" (logits of all positions, as the Trainers make them), "score" (one a row), "value" (one a position),
            or "response" (logits of the last `response` positions of each row, in chunks of `logits_bytes`).
        frozen: the base's weights need no gradient (LoRA): the pass still stores what the adapters' inputs need.
    """
    few = [
        _fake_step(with_layers(config, n), rows, length, head, response, bf16, checkpointing, frozen, logits_bytes)
        for n in LAYERS
    ]
    depth = layers_of(config)

    def extended(a: int, b: int) -> int:
        return max(0, a + (b - a) * (depth - LAYERS[0]) // (LAYERS[1] - LAYERS[0]))

    return StepMemory(extended(few[0].activations, few[1].activations), max(few[0].temporary, few[1].temporary))


def _fake_step(
    config: PreTrainedConfig,
    rows: int,
    length: int,
    head: str,
    response: int | None,
    bf16: bool,
    checkpointing: bool,
    frozen: bool,
    logits_bytes: int | None,
) -> StepMemory:
    from torch.distributed._tools.mem_tracker import MemTracker

    with FakeTensorMode():
        model = build(config, scalar=head in ("score", "value")).train()
        if frozen:  # inputs of every layer need gradients, weights do not: as LoRA leaves it
            model.requires_grad_(False)
            model.enable_input_require_grads()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        ids = torch.zeros(rows, length, dtype=torch.long)
        positions = torch.arange(length)[None].expand(rows, length)
        tracker = MemTracker()
        tracker.track_external(model)
        with tracker:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = _loss(model, head, ids, positions, response, logits_bytes)
            loss.backward()
        peak = by_part(tracker)
    return StepMemory(peak.get("ACT", 0), peak.get("TEMP", 0))


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
    if head == "causal":
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), ids.flatten())
    from torch.utils.checkpoint import checkpoint

    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    picked = hidden[:, -(response or ids.shape[1]) :].flatten(0, 1)
    table = model.get_output_embeddings()
    chunk = max(1, (logits_bytes or 2**62) // (4 * table.weight.shape[0]))

    def run(states: Any) -> Any:
        return torch.log_softmax(table(states).float(), -1)[:, 0].sum()

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

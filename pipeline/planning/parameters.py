"""Numbers of a model's parameters, from its config alone: shapes are made on the meta device, nothing is allocated."""

from __future__ import annotations

import copy
import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

from pipeline.models.lora import linear_module_names
from pipeline.models.sharding import transformer_blocks
from pipeline.models.shrink import LAYER_NAMES

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedConfig

FEW_LAYERS = (1, 2)  # a deeper model is counted on from these, where its layers are alike
EXPERTS = "experts"  # how transformers names the routed experts of a layer; shared ones have another name
EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k")


@dataclass(frozen=True)
class Parameters:
    """Parameters of a model.

    total: all. active: those that one token passes through, less than all in a mixture of experts.
    linear: in linear layers. largest_layer: of the largest layer. outside_layers: in none: embeddings, last norm, head.
    """

    total: int
    active: int
    linear: int
    largest_layer: int
    outside_layers: int


def build(config: PreTrainedConfig, scalar: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    """A model of the config, on whatever device or fake mode is active."""
    config = copy.deepcopy(config)
    for name in ("attn_pdrop", "attention_dropout", "attention_probs_dropout_prob"):
        if hasattr(config, name):
            setattr(config, name, 0.0)  # else a CPU keeps whole attention matrices, which a GPU's kernel does not
    if scalar:
        config.num_labels = 1
        config.get_text_config().pad_token_id = (
            0  # a classifier needs one for several rows; it does not change the size
        )
        return AutoModelForSequenceClassification.from_config(config, dtype=dtype)
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def parameters(config: PreTrainedConfig, scalar: bool = False) -> Parameters:
    """The parameters of a causal LM of the config, or of a classifier with one label."""
    return _parameters(ConfigKey(config), scalar)


def lora_parameters(config: PreTrainedConfig, rank: int, targets: list[str] | None, scalar: bool = False) -> int:
    """Parameters of LoRA adapters of a rank on a model's linear layers."""
    return rank * _lora_width(ConfigKey(config), tuple(targets) if targets else None, scalar)


class ConfigKey:
    """A config that a cache can hold: equal configs are one."""

    def __init__(self, config: PreTrainedConfig):
        self.config, self.text = config, type(config).__name__ + config.to_json_string()

    def __hash__(self) -> int:
        return hash(self.text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ConfigKey) and other.text == self.text


def _uniform(config: PreTrainedConfig) -> bool:
    """Whether all layers are alike, so that two models of few layers show what each layer adds."""
    kinds = getattr(config.get_text_config(), "layer_types", None) or ["all alike"]
    return len(set(kinds)) == 1 and not has_experts(config) and any(hasattr(config, name) for name in LAYER_NAMES)


@functools.lru_cache(maxsize=64)
def _parameters(key: ConfigKey, scalar: bool) -> Parameters:
    if _uniform(key.config) and (depth := layers_of(key.config)) > FEW_LAYERS[1]:
        one, two = (_parameters(ConfigKey(with_layers(key.config, n)), scalar) for n in FEW_LAYERS)
        added = {name: getattr(two, name) - getattr(one, name) for name in ("total", "active", "linear")}
        return dataclasses.replace(one, **{n: getattr(one, n) + (depth - 1) * more for n, more in added.items()})
    with torch.device("meta"):
        model = build(key.config, scalar)
    total = sum(p.numel() for p in model.parameters())
    routed = sum(p.numel() for name, p in model.named_parameters() if EXPERTS in name.split("."))
    layers = [sum(p.numel() for p in layer.parameters()) for layer in transformer_blocks(model)]
    return Parameters(
        total=total,
        active=round(total - routed * (1 - share_of_experts(key.config))),
        linear=_linear_parameters(model),
        largest_layer=max(layers, default=0),
        outside_layers=total - sum(layers),
    )


def share_of_experts(config: PreTrainedConfig) -> float:
    """The share of a layer's routed experts that one token passes through; 1 without experts."""
    text = config.get_text_config()
    count, used = (
        next((value for name in names if isinstance(value := getattr(text, name, None), int) and value > 0), None)
        for names in (EXPERT_COUNTS, EXPERTS_PER_TOKEN)
    )
    return min(1.0, used / count) if count and used else 1.0


def has_experts(config: PreTrainedConfig) -> bool:
    return any(EXPERTS in name for name in config.get_text_config().to_dict())


def _linear_parameters(model: Any) -> int:
    names = set(linear_module_names(model))
    modules = (module for name, module in model.named_modules() if name.split(".")[-1] in names)
    return sum(p.numel() for module in modules for p in module.parameters(recurse=False))


@functools.lru_cache(maxsize=64)
def _lora_width(key: ConfigKey, targets: tuple[str, ...] | None, scalar: bool) -> int:
    if _uniform(key.config) and (depth := layers_of(key.config)) > FEW_LAYERS[1]:
        one, two = (_lora_width(ConfigKey(with_layers(key.config, n)), targets, scalar) for n in FEW_LAYERS)
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

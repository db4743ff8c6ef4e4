"""LoRA for SFT and reward: peft's configuration, and merged weights at the end."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.models.experts import expert_counts
from pipeline.models.loading import fit_embeddings, keep_router_logits_off, read_config, set_pad
from pipeline.models.precision import is_linear
from pipeline.models.reward_model import no_cache
from pipeline.models.shrink import MOST_PARAMETERS, small_copy

import torch
from peft import LoraConfig, PeftModel
from peft.utils import transformers_weight_conversion
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

ALL_LINEAR = "all-linear"  # peft's own word for the default
# Mamba's layers: its fast kernels read these weights without calling the layers, so that an adapter would train nothing.
MAMBA_TYPES = (
    "mamba",
    "mamba2",
    "falcon_mamba",
    "falcon_h1",
    "jamba",
    "bamba",
    "zamba",
    "zamba2",
    "nemotron_h",
    "granitemoehybrid",
)
MAMBA_UNCALLED = frozenset({"conv1d", "x_proj", "dt_proj", "out_proj"})
_convert = transformers_weight_conversion.convert_peft_adapter_state_dict_for_transformers


@functools.wraps(_convert)
def _keep_known_names(
    model: torch.nn.Module, peft_config: Any, adapter_state_dict: dict[str, torch.Tensor], adapter_name: str = "default"
) -> dict[str, torch.Tensor]:
    known = {name.replace(f".{adapter_name}", "") for name, _ in model.named_parameters() if ".lora_" in name}
    if all(name in known for name in adapter_state_dict if ".lora_" in name):
        return adapter_state_dict
    return _convert(model, peft_config, adapter_state_dict, adapter_name)


# Private API (peft 0.21). peft renames an adapter's weights as transformers renames those of older checkpoints, also where they
# have the new names already: Laguna's `shared_experts` were then left out of a merged model, with a warning.
transformers_weight_conversion.convert_peft_adapter_state_dict_for_transformers = _keep_known_names


def lora_config(
    model: PreTrainedModel, options: Any, task_type: str, tokenizer: PreTrainedTokenizerBase | None = None
) -> LoraConfig:
    """peft's LoRA configuration from the recipe's `lora:`; a reward model trains its head whole.

    Args:
        tokenizer: tokens of it that the base's folder has no rows for are trained as rows of their own; pad is not.

    Raises:
        UserError: a target that the model does not have, or that is tied to another table.
    """
    targets = [name for name in options.target_modules or [] if name != ALL_LINEAR]
    _check_targets(model, targets)
    config = LoraConfig(
        r=options.r,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=targets
        or [n for n in linear_module_names(model) if n.split(".")[-1] not in _never_called(model)],
        modules_to_save=_new_modules(model) if task_type == "SEQ_CLS" else None,
        task_type=task_type,
    )
    if tokenizer is not None and (rows := _new_rows(model, tokenizer)):
        head = model.get_output_embeddings()
        tables = [model.get_input_embeddings(), *([] if head is None or _is_tied(model) else [head])]
        names = {name: rows for name, module in model.named_modules() if any(module is table for table in tables)}
        config.trainable_token_indices = names
    return config


def linear_module_names(model: PreTrainedModel) -> list[str]:
    """LoRA's default targets: the model's linear layers by type, without its heads and routers.

    Returns:
        the last part of their names where it names linear layers alone, else whole names.
    """
    text, output = model.config.get_text_config(), model.get_output_embeddings()
    experts = expert_counts(model.config)
    uncalled = MAMBA_UNCALLED if text.model_type in MAMBA_TYPES else frozenset()
    heads = [
        name for name, child in model.named_children() if child is not getattr(model, model.base_model_prefix, child)
    ]
    modules = dict(model.named_modules())
    shared = _shared_weights(model)
    names = [
        name
        for name, module in modules.items()
        if is_linear(module)
        and module is not output
        and id(module.weight) not in shared
        and name.split(".")[0] not in heads
        and name.split(".")[-1] not in uncalled
        and not (_named_like_a_router(name) and getattr(module, "out_features", None) in experts)  # it stays as it is
    ]
    ambiguous = {name.split(".")[-1] for name in modules.keys() - set(names)}
    targets = {name if (part := name.split(".")[-1]) in ambiguous or part.isdigit() else part for name in names}
    return sorted(targets)


def _shared_weights(model: PreTrainedModel) -> set[int]:
    """Ids of the weights that several linear layers hold (Zamba 2): merging an adapter on one would change the others."""
    held = Counter(id(module.weight) for module in model.modules() if is_linear(module))
    return {weight for weight, layers in held.items() if layers > 1}


def _named_like_a_router(name: str) -> bool:
    """A width alone does not tell: a key projection may be as wide as there are experts."""
    return any(part == "gate" or "router" in part for part in name.split("."))


def _never_called(model: PreTrainedModel) -> set[str]:
    """Last name parts of linear layers that a forward pass never calls, tried on a small copy of the model; and of those
    that are called but compute something else (DeepSeek V4's `o_a_proj`, one product per group of heads)."""
    tried: Any = small_copy(model.config) or (model if model.num_parameters() < MOST_PARAMETERS else None)
    if tried is None:
        return set()
    called: dict[str, bool] = {}
    hooks = []
    for name, module in tried.named_modules():
        if is_linear(module):
            part = name.split(".")[-1]
            called.setdefault(part, False)
            hooks.append(module.register_forward_hook(functools.partial(_note_call, called, part)))
    ids = torch.arange(16)[None] % tried.config.get_text_config().vocab_size
    with torch.no_grad():
        tried(input_ids=ids.to(next(tried.parameters()).device), **no_cache(tried))
    for hook in hooks:
        hook.remove()
    return {part for part, was in called.items() if not was}


def _note_call(called: dict[str, bool], part: str, module: Any, given: tuple[Any, ...], output: Any) -> None:
    width = getattr(module, "out_features", None) or getattr(module, "nf", None)  # GPT-2's
    called[part] |= not given or getattr(output, "shape", None) == (*given[0].shape[:-1], width)


def _check_targets(model: PreTrainedModel, targets: list[str]) -> None:
    layers = {n: m for n, m in model.named_modules() if is_linear(m) or isinstance(m, torch.nn.Embedding)}
    uncalled = _never_called(model) if targets else set()
    shared = _shared_weights(model)
    for target in targets:
        if target.split(".")[-1] in uncalled:
            raise UserError(
                f"lora: target_modules: {type(model).__name__} reads the weights of {target!r} without calling the layer as a "
                "linear one; an adapter on it would not train what it computes, leave it out"
            )
        hit = [module for name, module in layers.items() if name == target or name.endswith("." + target)]
        if not hit:
            raise UserError(
                f"lora: target_modules: {type(model).__name__} has no linear layer {target!r}; it has "
                f"{', '.join(linear_module_names(model)[:12])}; leave target_modules out for all of them"
            )
        tables = (model.get_input_embeddings(), model.get_output_embeddings())
        if _is_tied(model) and any(module is table for module in hit for table in tables):
            raise UserError(
                f"lora: target_modules: {target!r} is tied in this model (embedding and head are one table), and an adapter "
                "on one would change both when merged; leave it out"
            )
        if any(id(module.weight) in shared for module in hit):
            raise UserError(
                f"lora: target_modules: {target!r} is one weight that several layers of {type(model).__name__} share, and an "
                "adapter on one would change them all when merged; leave it out"
            )


def _is_tied(model: PreTrainedModel) -> bool:
    one, other = model.get_input_embeddings(), model.get_output_embeddings()
    return other is not None and one.weight is other.weight


def _new_modules(model: PreTrainedModel) -> list[str]:
    """A classifier's modules beyond its body, and an encoder's pooler, which a language model's folder lacks."""
    body = getattr(model, model.base_model_prefix)
    new = [name for name, m in model.named_children() if m is not body and any(True for _ in m.parameters())]
    pooled = [
        name
        for name, m in body.named_children()
        if name == "pooler" and m is not None and any(True for _ in m.parameters())
    ]
    return sorted({*new, *pooled})


def _new_rows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    base = read_config(str(model.name_or_path)).get_text_config().vocab_size
    return sorted(i for i in tokenizer.get_vocab().values() if i >= base and i != tokenizer.pad_token_id)


def read_adapter(path: str) -> tuple[LoraConfig, dict[str, torch.Tensor], torch.Tensor] | None:
    """A reward model's own adapter (configuration, weights, head), or None where it was trained whole.

    Args:
        path: the output folder of a reward stage with `lora:`.

    Returns:
        config: for a causal LM's trunk; weights: by peft's names; head: (1, hidden).
    """
    folder = Path(path) / "adapter"
    if not (folder / "adapter_config.json").is_file():
        return None
    config = LoraConfig.from_pretrained(str(folder))
    config.modules_to_save, config.task_type, config.inference_mode = None, "CAUSAL_LM", False
    weights = load_file(folder / "adapter_model.safetensors")
    heads = [name for name in weights if name.endswith("score.weight")]
    if not heads:  # an encoder's: no causal LM could carry it
        return None
    head = weights.pop(heads[0])
    return config, weights, head


def scale_adapter_head(folder: Path, factor: float) -> None:
    """Multiply the head that a reward model's adapter carries, as `scale_head` does the merged one's."""
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    for name in weights:
        if name.endswith(("score.weight", "classifier.weight", "classifier.bias", "out_proj.weight", "out_proj.bias")):
            weights[name] = weights[name] * factor
    save_file(weights, file, metadata={"format": "pt"})


def save_merged(
    trained: PeftModel,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    adapter: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """The adapter to `folder/adapter`; to `folder` the fp32 base with the adapter merged in; tokenizer too.

    Args:
        trained: the trained adapter on its (possibly 4-/8-bit) base.
        adapter: its trained parameters by name, gathered, where `trained` is sharded.
        base: the same base, freshly loaded in fp32: quantised weights would merge with their rounding.
    """
    fit_embeddings(base, trained.config.get_text_config().vocab_size)  # the run may have added tokens
    set_pad(base, tokenizer.pad_token_id)
    # Never the embedding, which peft would save whole where pad was added: new rows are the adapter's own.
    trained.save_pretrained(str(folder / "adapter"), save_embedding_layers=False, state_dict=adapter)
    tokenizer.save_pretrained(folder / "adapter")
    with torch.no_grad():
        merged = PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload()
    if getattr(base, "generation_config", None) is not None:
        whole: Any = base
        whole.generation_config = trained.get_base_model().generation_config
    keep_router_logits_off(merged)
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

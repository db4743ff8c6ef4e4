"""LoRA for SFT and reward: peft's configuration, and merged weights at the end."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.models.loading import fit_embeddings, set_pad
from pipeline.models.precision import is_linear

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def lora_config(model: PreTrainedModel, options: Any, task_type: str) -> LoraConfig:
    """peft's LoRA configuration from the recipe's `lora:`; a reward model trains its head whole."""
    return LoraConfig(
        r=options.r,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=options.target_modules or linear_module_names(model),
        modules_to_save=["classifier" if hasattr(model, "classifier") else "score"] if task_type == "SEQ_CLS" else None,
        task_type=task_type,
    )


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


def save_merged(trained: PeftModel, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """The adapter to `folder/adapter`; to `folder` the fp32 base with the adapter merged in; tokenizer too.

    Args:
        trained: the trained adapter on its (possibly 4-/8-bit) base.
        base: the same base, freshly loaded in fp32: quantised weights would merge with their rounding.
    """
    fit_embeddings(base, len(tokenizer))  # the run may have added a pad token
    set_pad(base, tokenizer.pad_token_id)
    trained.save_pretrained(str(folder / "adapter"))
    with torch.no_grad():
        merged = PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload()
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def linear_module_names(
    model: PreTrainedModel, leave_out: Iterable[str] = ("lm_head", "score", "classifier", "embed_out")
) -> list[str]:
    """Last name parts of a model's linear layers, without its heads: LoRA's default targets."""
    names = {name.split(".")[-1] for name, module in model.named_modules() if is_linear(module)}
    return sorted(names - set(leave_out))

"""Models and tokenizers from folders, or from nothing; fp32 master weights; pad apart from EOS."""

from __future__ import annotations

import difflib
import logging
from typing import Any

from pipeline.errors import UserError

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
# Parts of the names of rates of randomness in transformers' modules.
NOISE = ("drop", "jitter", "router_noise")


def load_causal_lm(path: str, quantization: str | None = None) -> PreTrainedModel:
    """A causal LM with fp32 weights (A35), or with a frozen 4-/8-bit base."""
    return _load(AutoModelForCausalLM, path, quantization)


def _load(auto: Any, path: str, quantization: str | None, **options: Any) -> PreTrainedModel:
    if quantization is not None:
        options["quantization_config"] = quantization_config(quantization)
    try:
        model = auto.from_pretrained(path, dtype=torch.float32, **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"no model can be loaded from {path!r}: {str(error).splitlines()[0]}") from error
    for module in model.modules():
        # bitsandbytes' packed CPU layout rounds the scales to bf16 and breaks on widths that are no multiple of 64.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def quantization_config(bits: str) -> transformers.BitsAndBytesConfig:
    """bitsandbytes: NF4 with double quantisation (Dettmers et al. 2023), or LLM.int8()."""
    if bits == "8bit":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def new_causal_lm(
    config_class: str, sizes: dict[str, Any], tokenizer: PreTrainedTokenizerBase, block_tokens: int
) -> PreTrainedModel:
    """A randomly initialised model: `config_class` of transformers with the recipe's sizes and the tokenizer's ids."""
    cls = getattr(transformers, config_class, None)
    if cls is None or not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedConfig)):
        raise UserError(f"config_class: transformers has no {config_class!r}; e.g. LlamaConfig, GPT2Config")
    known = set(cls().to_dict()) | set(getattr(cls, "attribute_map", {}))
    for name in sizes:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"see the documentation of {config_class}"
            raise UserError(f"model_config: {config_class} has no {name!r}; {hint}")
    ids = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    try:
        config = cls(**{**ids, **sizes})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"model_config: {config_class} refuses these sizes: {error}") from error
    refuse_beyond_context(config, block_tokens, "block_tokens")
    return model


def refuse_beyond_context(config: Any, tokens: int, key: str) -> None:
    """More tokens than the model has positions is an error, before training finds out."""
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    if limit is not None and "roberta" in text.model_type:  # its positions count from behind the pad's
        limit -= text.pad_token_id + 1
    if limit is not None and tokens > limit:
        raise UserError(
            f"{key}: {tokens} tokens exceed the model's context of {limit}; lower it or take a longer context"
        )


def fit_embeddings(model: PreTrainedModel, tokens: int) -> None:
    """More rows for new tokens; never fewer (some models keep spare rows)."""
    table: Any = model.get_input_embeddings()
    if tokens > table.weight.shape[0]:
        model.resize_token_embeddings(tokens)


def set_pad(model: PreTrainedModel, pad_id: int | None) -> None:
    """Pad in both of a model's configurations; classifiers have no generation config."""
    model.config.get_text_config().pad_token_id = pad_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = pad_id


def disable_noise(model: torch.nn.Module) -> None:
    """Nothing random in training mode either: dropout modules, rates that are plain attributes, the jitter of routers."""
    from trl.trainer import disable_dropout_in_model

    disable_dropout_in_model(model)
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and any(word in name for word in NOISE):
                setattr(module, name, 0.0)
        config = getattr(module, "config", None)
        for name in type(module).forward.__code__.co_names if config is not None else ():
            # Some layers (Falcon's) read a rate from the configuration at each pass.
            if any(word in name for word in NOISE) and isinstance(getattr(config, name, None), float):
                setattr(config, name, 0.0)

"""Models and tokenizers from folders, or from nothing; fp32 master weights; pad apart from EOS."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.data.encoding import ENCODER_TEMPLATE, PLAIN_TEMPLATE
from pipeline.errors import UserError

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
PAD_NAMES = ("<|pad|>", "<pad>", "[PAD]", "<|padding|>", "<|finetune_right_pad_id|>", "<|endoftext|>")


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"no tokenizer can be loaded from {path!r}: {str(error).splitlines()[0]}") from error
    return tokenizer


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


def require_pad(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Past SFT, pad must exist and differ from EOS (A1): else stopping cannot be learnt, nor the score placed."""
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise UserError(
            f"{path!r} has no pad token apart from EOS; run SFT (or reward) from it, which assigns one and saves it"
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


def assign_pad(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> str | None:
    """Give an external model a pad token apart from EOS; returns what was done, or None if it had one."""
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        set_pad(model, tokenizer.pad_token_id)
        return None
    vocabulary = tokenizer.get_vocab()
    taken = {tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token}
    existing = next((name for name in PAD_NAMES if name in vocabulary and name not in taken), None)
    tokenizer.add_special_tokens({"pad_token": existing or "<|pad|>"})
    fit_embeddings(model, len(tokenizer))
    set_pad(model, tokenizer.pad_token_id)
    kind = "an existing, unused token" if existing else "a new token"
    return f"pad was missing or equal to EOS; {tokenizer.pad_token!r} ({kind}, id {tokenizer.pad_token_id}) is pad now"


def assign_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Give an external tokenizer what it lacks to hold a dialogue; returns what was done, or None.

    An encoder's reads its first token and ends at its separator; a decoder's is plain text.
    """
    if tokenizer.chat_template:
        return None
    if tokenizer.cls_token is not None and tokenizer.sep_token is not None:
        if tokenizer.eos_token is None:
            tokenizer.eos_token = tokenizer.sep_token
        tokenizer.chat_template = ENCODER_TEMPLATE
    else:
        tokenizer.chat_template = PLAIN_TEMPLATE
    return "the parent has no chat template; a plain one was assigned and is saved"


def resolve_precision(precision: str) -> bool:
    """Whether to autocast to bf16; `auto` asks the hardware."""
    if precision != "auto":
        return precision == "bf16"
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return re.search(r"\b(avx512_bf16|amx_bf16)\b", flags) is not None


def hold_in_bf16(model: torch.nn.Module) -> None:
    """Weights of a frozen model's linear layers in bf16: half the memory. For use under bf16 autocast alone, which casts
    them at each pass, so the results are the same to the bit. A head tied to the embedding stays as it is."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    for module in model.modules():
        if _is_linear(module) and id(module.weight) not in tables:
            module.to(torch.bfloat16)
    for parameter in model.parameters():
        if parameter.dtype != torch.bfloat16:  # a view of the file's mapping, which would keep all of it in memory
            parameter.data = parameter.data.clone()


def _is_linear(module: torch.nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, torch.nn.Linear | Conv1D) or "Linear" in type(module).__name__


def linear_module_names(
    model: PreTrainedModel, leave_out: Iterable[str] = ("lm_head", "score", "classifier", "embed_out")
) -> list[str]:
    """Last name parts of a model's linear layers, without its heads: LoRA's default targets."""
    names = {name.split(".")[-1] for name, module in model.named_modules() if _is_linear(module)}
    return sorted(names - set(leave_out))


def disable_dropout(model: torch.nn.Module) -> None:
    """No dropout in training mode either (A16): modules, and attention's own rates, which are plain attributes."""
    from trl.trainer import disable_dropout_in_model

    disable_dropout_in_model(model)
    for module in model.modules():
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)

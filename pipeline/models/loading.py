"""Models and tokenizers from folders, or from nothing; fp32 master weights; pad apart from EOS."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import logging
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.models.classifiers import classifier_class

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

CHECKPOINTED = "gradient_checkpointing"  # transformers' attribute of layers
logger = logging.getLogger(__name__)
CONFIG_ERRORS = (  # what transformers and torch raise at a configuration that makes no model
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AssertionError,
    AttributeError,
    ImportError,
    StrictDataclassError,
    ArithmeticError,
)
SAMPLING_VALUES = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")
# Parts of the names of rates of randomness in transformers' modules.
NOISE = ("drop", "jitter", "router_noise")


def load_causal_lm(path: str, quantization: str | None = None) -> PreTrainedModel:
    """A causal LM with fp32 weights, or with a frozen 4-/8-bit base.

    Raises:
        UserError: no such folder, a configuration that makes no model, or weights that are missing or of other shapes.
    """
    read_config(path)
    return _load(AutoModelForCausalLM, path, quantization)


def load_classifier(path: str, quantization: str | None = None) -> PreTrainedModel:
    """A sequence classifier of one label, fp32. A language model's folder gets a new head, a classifier's must hold its own.

    Raises:
        UserError: as `load_causal_lm`; the classifier has another number of labels.
    """
    config = read_config(path)
    kind = classifier_class(config)
    if not any("SequenceClassification" in str(name) for name in config.architectures or []):
        return _load(kind, path, quantization, new_head=True, num_labels=1)
    if config.num_labels != 1:
        raise UserError(f"{path!r} has {config.num_labels} labels; a reward model has one")
    return _load(kind, path, quantization, num_labels=1)


def read_config(path: str) -> PreTrainedConfig:
    """A model's configuration.

    Raises:
        UserError: it is a LoRA adapter's folder, or quantised already, or transformers refuses it.
    """
    folder = Path(path)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise UserError(
            f"{path!r} is a LoRA adapter without its base; merge it (merge_and_unload of peft, then save_pretrained) "
            "and give that folder"
        )
    try:
        config = AutoConfig.from_pretrained(path)
    except CONFIG_ERRORS as error:
        raise UserError(f"no model can be loaded from {path!r}: {one_line(error)}") from error
    quantized = getattr(config, "quantization_config", None)
    if quantized is not None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else type(quantized).__name__
        raise UserError(
            f"{path!r} holds quantised weights ({method}), which cannot be trained or merged; give the model in full "
            "precision, and `quantization: 4bit` or `8bit` with `lora:` where memory is short"
        )
    return config


def _load(auto: Any, path: str, quantization: str | None, *, new_head: bool = False, **options: Any) -> PreTrainedModel:
    if quantization is not None:
        options["quantization_config"] = quantization_config(quantization)
    try:
        model, report = auto.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path!r} has weights in a pickle that holds more than tensors, and reading it could run code; "
            "convert the weights to safetensors where you trust them"
        ) from error
    except (*CONFIG_ERRORS, SafetensorError, RuntimeError, EOFError) as error:
        raise UserError(f"no model can be loaded from {path!r}: {one_line(error)}") from error
    _check_weights(model, path, report, new_head)
    keep_router_logits_off(model)
    _mend_generation_config(model, path)
    for module in model.modules():
        # bitsandbytes' packed CPU layout rounds the scales to bf16 and breaks on widths that are no multiple of 64.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    loaded: PreTrainedModel = model
    return loaded


def _check_weights(model: PreTrainedModel, path: str, report: dict[str, Any], new_head: bool) -> None:
    """Refuse a folder that lacks weights, which transformers would draw at random; only a new head may be missing."""
    body = str(model.base_model_prefix) + "."
    missing = sorted(
        name for name in report["missing_keys"] if not new_head or (name.startswith(body) and ".pooler." not in name)
    )
    if missing:
        raise UserError(
            f"{path!r} lacks {len(missing)} of the {len(model.state_dict())} weights that its config.json asks for "
            f"({_some(missing)}); they would be random: restore the folder or correct its config"
        )
    shapes = [
        f"{name} is {tuple(stored)}, expected {tuple(expected)}" for name, stored, expected in report["mismatched_keys"]
    ]
    if shapes:
        raise UserError(
            f"{path!r} has {len(shapes)} weights of other shapes than its config.json says ({_some(sorted(shapes))}); "
            "restore the folder or correct its config"
        )
    unused = sorted(name for name in report["unexpected_keys"] if name.startswith(body) or not new_head)
    if unused:
        logger.warning("%r: %d weights are not used by its config (%s)", path, len(unused), _some(unused))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def one_line(error: BaseException, limit: int = 300) -> str:
    """The first line of an error of a library, for a message of one line."""
    text = f"no entry {error}" if isinstance(error, KeyError) else str(error)  # a KeyError's text is the key alone
    line = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    return line if len(line) <= limit else line[: limit - 1] + "…"


def keep_router_logits_off(model: PreTrainedModel) -> None:
    """Set `output_router_logits: false` in a configuration; true would add the router's loss in the next stage."""
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "output_router_logits", False):
            config.output_router_logits = False


def _mend_generation_config(model: PreTrainedModel, path: str) -> None:
    """Sampling values beside `do_sample: false`, as several published models have them, cannot be saved again."""
    config: Any = getattr(model, "generation_config", None)
    if config is None:
        return
    try:
        config.validate(strict=True)
        return
    except ValueError:
        pass
    token_ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id", "max_length")}
    if config.do_sample is None:  # values were given to sample with
        config.do_sample = True
        what = "sampling is on now"
    else:
        for name in SAMPLING_VALUES:
            setattr(config, name, None)
        what = "they are taken out"
    try:
        config.validate(strict=True)
    except ValueError:
        model.generation_config = transformers.GenerationConfig(**token_ids)
        what = "only its token ids are kept"
    logger.warning("%r: generation_config.json has values that cannot stand together; %s", path, what)


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


def new_config(config_class: str, sizes: dict[str, Any], **ids: int | None) -> PreTrainedConfig:
    """A `config_class` of transformers with the recipe's sizes, and `ids` where the sizes do not name them.

    Raises:
        UserError: no such class or size, or a value that the class refuses.
    """
    cls = getattr(transformers, config_class, None)
    if cls is None or not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedConfig)):
        raise UserError(f"config_class: transformers has no {config_class!r}; e.g. LlamaConfig, GPT2Config")
    with refusing_sizes(config_class):
        known = set(cls().to_dict()) | set(getattr(cls, "attribute_map", {}))
    for name in sizes:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"see the documentation of {config_class}"
            raise UserError(f"model_config: {config_class} has no {name!r}; {hint}")
    with refusing_sizes(config_class):
        return cls(**{**ids, **sizes})


@contextlib.contextmanager
def refusing_sizes(config_class: str) -> Iterator[None]:
    """Whatever transformers or torch raises at a model's sizes becomes one line."""
    try:
        yield
    except (*CONFIG_ERRORS, RuntimeError) as error:
        raise UserError(f"model_config: {config_class} refuses these sizes: {one_line(error)}") from error


def new_causal_lm(
    config_class: str, sizes: dict[str, Any], tokenizer: PreTrainedTokenizerBase, block_tokens: int
) -> PreTrainedModel:
    """A randomly initialised model with the recipe's sizes and the tokenizer's ids."""
    config = new_config(
        config_class,
        sizes,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with refusing_sizes(config_class):
        rows = config.get_text_config().vocab_size
        if rows < len(tokenizer):
            raise UserError(
                f"model_config: vocab_size ({rows}) is less than the tokenizer's {len(tokenizer)} tokens; leave it out"
            )
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    check_context_length(config, block_tokens, "block_tokens")
    return model


def context_length(config: Any) -> int | None:
    """The most tokens that a model reads at once, where its configuration says."""
    text = config.get_text_config()
    limit: int | None = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    if limit is not None and "roberta" in text.model_type:  # its positions count from behind the pad's
        limit -= text.pad_token_id + 1
    return limit


def check_context_length(config: Any, tokens: int, key: str) -> None:
    """Refuse more tokens than the model has positions."""
    limit = context_length(config)
    if limit is not None and tokens > limit:
        raise UserError(
            f"{key}: {tokens} tokens exceed the model's context of {limit}; lower it or take a longer context"
        )


def check_batched_length(config: PreTrainedConfig, tokens: int, key: str) -> None:
    """`check_context_length` of sequences that share batches, and a warning where long ones change the others.

    Phi-3's `longrope` takes its short or its long factors by the longest position of a forward pass, for all of its rows.
    """
    check_context_length(config, tokens, key)
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings")
    if rope.get("rope_type") == "longrope" and original and tokens > original:
        logger.warning(
            "%s: in this model (longrope) a sequence of more than %d tokens changes the positions of shorter ones in its batch; "
            "with at most %d tokens each is as it is alone",
            key, original, original,
        )  # fmt: skip


def fit_embeddings(model: PreTrainedModel, tokens: int) -> None:
    """More rows for new tokens, each the mean of the old ones; never fewer (some models keep spare rows)."""
    before = [table.weight.shape[0] for table in _tables(model)]
    if tokens <= before[0]:
        return
    model.resize_token_embeddings(tokens, mean_resizing=False)
    with torch.no_grad():
        for rows, table in zip(before, _tables(model), strict=True):
            table.weight[rows:] = table.weight[:rows].mean(0)


def _tables(model: PreTrainedModel) -> list[Any]:
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    return [table for table in tables if table is not None]


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
        code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
        for name in code.co_names if code is not None and config is not None else ():
            # Some layers (Falcon's) read a rate from the configuration at each pass.
            if any(word in name for word in NOISE) and isinstance(getattr(config, name, None), float):
                setattr(config, name, 0.0)


def checkpoint_activations(model: Any) -> None:
    """Recompute a model's activations, layer by layer, in the backward pass.

    Raises:
        UserError: its architecture cannot.
    """
    try:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:
        raise UserError(f"gradient_checkpointing: {type(model).__name__} does not support it; drop the key") from error


@contextlib.contextmanager
def without_checkpointing(network: torch.nn.Module) -> Iterator[None]:
    """Inside, a network that recomputes activations may use its cache, which transformers would take from it."""
    layers = [module for module in network.modules() if getattr(module, CHECKPOINTED, False) is True]
    try:
        for layer in layers:
            setattr(layer, CHECKPOINTED, False)
        yield
    finally:
        for layer in layers:
            setattr(layer, CHECKPOINTED, True)

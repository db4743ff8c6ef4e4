"""Keys of the stages that transformers' Trainer runs: pretrain, SFT, reward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.config.keys import key
from pipeline.config.stage import StageArguments

SECRET_WORDS = ("token", "secret", "password", "api_key")
NO_SECRETS = ("use_hub_token", "include_tokens_per_second", "include_num_input_tokens_seen")  # TrainingArguments' own


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """LoRA adapters (Hu et al. 2021) on the linear layers; the finished run leaves adapter and merged weights."""

    r: int = key(16, "rank", 1, 4096)
    alpha: int = key(32, "scale: alpha / r", 1, 65536)
    dropout: float = key(0.0, "dropout on the adapter's input", 0, 0.99)
    target_modules: list[str] | None = key(None, "module names; default: all linear layers but the head")


@dataclass(frozen=True, kw_only=True)
class TrainerArguments(StageArguments):
    """The keys that pretrain, SFT and reward share."""

    optimizer: Literal["adamw", "adamw_8bit"] = key(
        "adamw", "adamw_8bit: bitsandbytes' 8-bit states", group="Optimization"
    )
    learning_rate: float = key(1e-4, "peak learning rate", 0, 10)
    lr_schedule: Literal["cosine", "linear", "constant"] = key("cosine", "shape after the warm-up")
    min_lr_fraction: float = key(0.1, "cosine ends at this share of the peak (InstructGPT: 0.1)", 0, 1)
    warmup_steps: int = key(0, "steps of linear warm-up from 0", 0, 1e9)
    weight_decay: float = key(0.0, "AdamW's decoupled weight decay, not on biases and norms", 0, 10)
    adam_beta2: float = key(0.95, "Adam's second beta (InstructGPT: 0.95)", 0, 0.99999)
    max_grad_norm: float = key(1.0, "clip of the gradient's global norm", 1e-12, 1e9)
    epochs: float = key(1.0, "passes over the training data", 1e-6, 1e5)
    max_steps: int | None = key(None, "optimizer steps, instead of epochs", 1, 1e9)
    examples_per_step: int = key(32, "examples in one optimizer step, over all processes", 1, 1e7, group="Batches")
    examples_per_device: int = key(8, "examples in one forward pass of one process", 1, 1e6)
    eval_examples_per_device: int = key(16, "the same in evaluations", 1, 1e6)
    gradient_checkpointing: bool = key(False, "recompute activations in the backward pass")
    eval_steps: int | None = key(
        None, "steps between two evaluations; default: only at the end", 1, 1e9, group="Evaluation"
    )
    trainer_options: dict[str, Any] | None = key(
        None, "further TrainingArguments by their own names", group="Further options"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in _names(self.trainer_options or {}):
            if name not in NO_SECRETS and any(word in name.lower() for word in SECRET_WORDS):
                raise ValueError(
                    f"trainer_options: {name!r} would be written to lineage.json; drop it, and log in with "
                    "`hf auth login` or set HF_TOKEN"
                )


def _names(options: Any) -> Iterator[str]:
    """Every key of nested options."""
    if isinstance(options, dict):
        for name, value in options.items():
            yield str(name)
            yield from _names(value)
    elif isinstance(options, list):
        for value in options:
            yield from _names(value)


@dataclass(frozen=True, kw_only=True)
class AdapterArguments(TrainerArguments):
    """The keys that SFT and reward share: a parent, its template, and ways to save memory."""

    parent: str = key("", "folder or Hub id of the model to start from", group="Model", path=True)
    chat_template: str | None = key(
        None, "chat template: a file, its text, `chatml` or `plain`; default: the parent's, or plain where it has none"
    )
    max_tokens: int = key(1024, "longest prompt and response together; longer examples are counted and dropped", 8, 1e7)
    lora: LoraOptions | None = key(None, "train LoRA adapters instead of all weights")
    quantization: Literal["4bit", "8bit"] | None = key(None, "load the frozen base in 4 or 8 bit (needs lora)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.parent:
            raise ValueError("parent is missing; name the folder or Hub id of the model to start from")
        if self.quantization and self.lora is None:
            raise ValueError("quantization needs `lora:`; 4-/8-bit weights are frozen")

"""Keys of the pretrain stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.config.keys import key
from pipeline.config.trainer import TrainerArguments


@dataclass(frozen=True, kw_only=True)
class TokenizerOptions:
    """A byte-level BPE trained on the corpora; special tokens are pad, eos and one per role, all distinct."""

    vocab_size: int = key(1024, "size, special tokens included", 270, 1_000_000)


@dataclass(frozen=True, kw_only=True)
class PretrainArguments(TrainerArguments):
    """Causal language model from nothing, or further training of a checkpoint, on plain text."""

    parent: str | None = key(
        None, "checkpoint to continue from; without one the model starts from nothing", group="Model", path=True
    )
    config_class: str = key("LlamaConfig", "transformers config class of a new model, e.g. LlamaConfig, GPT2Config")
    model_config: dict[str, Any] = key({}, "sizes of a new model, by the config class's own names")
    tokenizer: str | None = key(None, "existing tokenizer (folder or Hub id) instead of training one", path=True)
    train_tokenizer: TokenizerOptions | None = key(None, "train a byte-level BPE on the corpora")
    block_tokens: int = key(256, "tokens in one packed block; documents are kept apart inside it", 8, 1e7)
    router_aux_loss: float = key(0.0, "weight of the load-balancing loss of a mixture of experts", 0, 10)
    held_out_documents: int = key(
        256, "documents of a streamed dataset to evaluate: the first that are held out", 1, 1e7
    )
    learning_rate: float = key(1e-3, "peak learning rate", 0, 10)
    epochs: float = key(1.0, "passes over the mixture", 1e-6, 1e5)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.parent is None and self.tokenizer is None and self.train_tokenizer is None:
            raise ValueError("a new model needs `train_tokenizer:` (trains one) or `tokenizer:` (takes one)")
        if self.parent is not None and (self.train_tokenizer is not None or self.tokenizer is not None):
            raise ValueError(
                "a continued checkpoint keeps its tokenizer; drop `tokenizer:`/`train_tokenizer:` or `parent:`"
            )
        if any(entry.streaming for entry in self.datasets):
            self._check_stream()

    def _check_stream(self) -> None:
        if len(self.datasets) > 1:
            raise ValueError("datasets: a streamed dataset is not mixed with others; name it alone")
        if self.datasets[0].hub is None:
            raise ValueError("datasets: `streaming: true` reads a `hub:` dataset; drop it, files are read without it")
        if self.max_steps is None:
            raise ValueError("datasets: a streamed dataset has no known length; say `max_steps:`")
        if self.train_tokenizer is not None:
            raise ValueError("train_tokenizer: not trained on a streamed dataset; name one as `tokenizer:`")
        if not self.held_out_fraction:
            raise ValueError("held_out_fraction: 0 leaves no document of a streamed dataset to evaluate; raise it")
        if (self.trainer_options or {}).get("dataloader_num_workers"):
            raise ValueError(
                "trainer_options: a streamed dataset is read in one process; drop `dataloader_num_workers`"
            )

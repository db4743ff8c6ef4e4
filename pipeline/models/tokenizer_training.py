"""Trains a byte-level BPE with the special tokens and chat template of the later stages."""

from __future__ import annotations

import re
from collections.abc import Iterable

from pipeline.data.chat_template import ROLE_TEMPLATE, ROLE_TOKENS

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

# A run without white space is one word to BPE, whose training takes a pass over it for every merge; a file without any
# space would take hours. Longer runs are broken here, for training only.
LONG_RUN = re.compile(r"\S{1000}")
EOS, PAD = "<|endoftext|>", "<|pad|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE of `vocab_size`: EOS (also the start of a document, as in GPT-2), pad and one token per role."""
    return with_roles(train_bpe(texts, vocab_size))


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = [EOS, PAD, *ROLE_TOKENS]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((LONG_RUN.sub(r"\g<0>\n", text) for text in texts), trainer)
    return backend


def with_roles(backend: Tokenizer) -> PreTrainedTokenizerBase:
    """The tokenizer of a BPE from `train_bpe`, with its special tokens and the template of roles."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens=list(ROLE_TOKENS),
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = ROLE_TEMPLATE
    return tokenizer

"""Tokenizers of models: loading, pad tokens, chat templates; which tokens end a response, and which are never sampled."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

from pipeline.data.control_tokens import opened_markup_ids, special_token_ids, turn_token_ids
from pipeline.data.encoding import ENCODER_TEMPLATE, PLAIN_TEMPLATE, ChatEncoder
from pipeline.errors import UserError
from pipeline.models.loading import fit_embeddings, set_pad

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
PAD_NAMES = ("<|pad|>", "<pad>", "[PAD]", "<|padding|>", "<|finetune_right_pad_id|>", "<|endoftext|>")


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"no tokenizer can be loaded from {path!r}: {str(error).splitlines()[0]}") from error
    return tokenizer


# ---------------------------------------------------------------------------------------------- stopping


def stop_token_ids(encoder: ChatEncoder, generation_config: Any = None, stop_tokens: Iterable[str] = ()) -> list[int]:
    """Ids that end a response: EOS, the template's end of turn, the parent's own list, and the recipe's.

    Args:
        generation_config: the model's; its `eos_token_id` is an id, a list or None.
        stop_tokens: the recipe's `stop_tokens`.

    Raises:
        UserError: a stop token of the recipe is not one token of this tokenizer.
    """
    listed = getattr(generation_config, "eos_token_id", None)
    listed = [] if listed is None else [listed] if isinstance(listed, int) else list(listed)
    known = set(encoder.tokenizer.get_vocab().values())
    named = [_token_id(encoder.tokenizer, token) for token in stop_tokens]
    return list(dict.fromkeys([encoder.eos_id, encoder.end_id, *(i for i in listed if i in known), *named]))


def _token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    ids: list[int] = tokenizer(token, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise UserError(f"stop_tokens: {token!r} is {len(ids)} tokens of this tokenizer; a stop token is one")
    return int(ids[0])


def forbidden_token_ids(tokenizer: PreTrainedTokenizerBase, logits_size: int, stop_ids: Sequence[int]) -> list[int]:
    """Ids that are never sampled: pad, special tokens, turn tokens of the template, and rows past the vocabulary.

    A token that the template writes around a user's turn would let the policy speak for the user, so it is forbidden
    whether or not it is special. Control tokens that belong inside an answer (`<think>`, tool calls) stay allowed
    unless the tokenizer calls them special.

    Args:
        logits_size: rows of the LM head; may exceed the vocabulary.
        stop_ids: of `stop_token_ids`; never forbidden.
    """
    special = special_token_ids(tokenizer) - opened_markup_ids(tokenizer)
    unused = set(range(logits_size)) - set(tokenizer.get_vocab().values())
    return sorted((special | turn_token_ids(tokenizer) | unused) - set(stop_ids))


def set_stop_tokens(model: PreTrainedModel, stop_ids: Sequence[int]) -> None:
    """Every stop token in the model's generation config, so that plain transformers and vLLM stop there too."""
    config: Any = getattr(model, "generation_config", None)
    if config is not None:
        config.eos_token_id = stop_ids[0] if len(stop_ids) == 1 else list(stop_ids)


# ---------------------------------------------------------------------------------------------- pad and template


def require_pad(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Past SFT, pad must exist and differ from EOS: else stopping cannot be learnt, nor the score placed."""
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise UserError(
            f"{path!r} has no pad token apart from EOS; run SFT (or reward) from it, which assigns one and saves it"
        )


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

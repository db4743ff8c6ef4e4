"""Tokenizers of models: loading, pad tokens, chat templates; which tokens end a response, and which are never sampled."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pipeline.data.chat_template import (
    CHATML_TEMPLATE,
    CHATML_TOKENS,
    ENCODER_TEMPLATE,
    PLAIN_TEMPLATE,
    ChatTemplate,
    freeze_date,
    prints_date,
)
from pipeline.data.control_tokens import opened_markup_ids, special_token_ids, turn_token_ids
from pipeline.data.encoding import ChatEncoder
from pipeline.errors import UserError, shorten
from pipeline.models.loading import fit_embeddings, set_pad
from pipeline.models.trials import positions_follow_pad, require_token

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

PAD_NAMES = ("<|pad|>", "<pad>", "[PAD]", "<|padding|>", "<|finetune_right_pad_id|>", "<|endoftext|>")
# A folder with none of these holds no tokenizer.
TOKENIZER_FILES = frozenset(
    (
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
        "spiece.model",
        "config.json",
    )
)


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """A model's tokenizer.

    Raises:
        UserError: there is none, or its files are damaged.
    """
    folder = Path(path)
    if not folder.exists() and (path.startswith((".", "~", "/", "runs/")) or path.count("/") > 1):  # no Hub id
        raise UserError(f"no model can be loaded from {path!r}: there is no such folder")
    if folder.is_dir() and not TOKENIZER_FILES.intersection(file.name for file in folder.iterdir()):
        raise UserError(f"no tokenizer can be loaded from {path!r}: the folder holds none; name a model's folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # damaged files: of any type, and the tokenizers library raises Exception itself
        reason = str(error).splitlines()[:1] if isinstance(error, OSError | ValueError) else []
        what = reason[0] if reason else f"its files are damaged ({type(error).__name__}: {shorten(str(error))})"
        raise UserError(f"no tokenizer can be loaded from {path!r}: {what}") from error
    return tokenizer


# ---------------------------------------------------------------------------------------------- stopping


def stop_token_ids(encoder: ChatEncoder, generation_config: Any = None, stop_tokens: Iterable[str] = ()) -> list[int]:
    """Ids that end a response: EOS, the template's end of turn, the parent's own list without pad, and the recipe's.

    Several published models (Qwen) list pad as an end. It is none here: the masks and scores of plain transformers take a
    pad behind an answer for padding.

    Args:
        generation_config: the model's; its `eos_token_id` is an id, a list or None.
        stop_tokens: the recipe's `stop_tokens`.

    Raises:
        UserError: a stop token of the recipe is not one token of this tokenizer, or is pad.
    """
    listed = getattr(generation_config, "eos_token_id", None)
    listed = [] if listed is None else [listed] if isinstance(listed, int) else list(listed)
    known = set(encoder.tokenizer.get_vocab().values()) - {encoder.tokenizer.pad_token_id}
    named = [_token_id(encoder.tokenizer, token) for token in stop_tokens]
    return list(dict.fromkeys([encoder.eos_id, encoder.end_id, *(i for i in listed if i in known), *named]))


def _token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    ids: list[int] = tokenizer(token, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise UserError(f"stop_tokens: {token!r} is {len(ids)} tokens of this tokenizer; a stop token is one")
    if ids[0] == tokenizer.pad_token_id:
        raise UserError(f"stop_tokens: {token!r} is this tokenizer's pad, which is never sampled; name another token")
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
    never = special_token_ids(tokenizer) | (set(range(logits_size)) - set(tokenizer.get_vocab().values()))
    if tokenizer.chat_template:
        template = ChatTemplate(tokenizer)
        never = (never | turn_token_ids(template)) - opened_markup_ids(template)
    return sorted(never - set(stop_ids))


def set_stop_tokens(model: PreTrainedModel, stop_ids: Sequence[int]) -> None:
    """Every stop token in the model's generation config, so that plain transformers and vLLM stop there too."""
    config: Any = getattr(model, "generation_config", None)
    if config is not None:
        config.eos_token_id = stop_ids[0] if len(stop_ids) == 1 else list(stop_ids)
        suppressed = [i for i in config.suppress_tokens or [] if i not in stop_ids]  # an earlier PPO stage's
        config.suppress_tokens = suppressed or None


# ---------------------------------------------------------------------------------------------- pad and template


def require_pad(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Require a pad token that ends no answer; otherwise stopping cannot be learned, and the score is read at a wrong token."""
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise UserError(
            f"{path!r} has no pad token apart from EOS; run SFT (or reward) from it, which assigns one and saves it"
        )
    if tokenizer.chat_template and ChatEncoder(tokenizer).end_id == tokenizer.pad_token_id:
        raise UserError(
            f"{path!r} pads with {tokenizer.pad_token!r}, which ends an answer in its chat template; "
            "run SFT (or reward) from it, which assigns another pad and saves it"
        )


def add_missing_rows(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> str | None:
    """Rows for tokens that were added to a tokenizer without resizing its model; returns what was done, or None.

    The rows start at the mean of the others and are trained (with LoRA too). A stage that trains no embedding cannot use
    this: it asks `require_rows`.
    """
    table: Any = model.get_input_embeddings()
    rows = table.weight.shape[0]
    beyond = sorted(token for token, i in tokenizer.get_vocab().items() if i >= rows)
    if not beyond:
        return None
    fit_embeddings(model, max(tokenizer.get_vocab().values()) + 1)
    require_token(model, max(tokenizer.get_vocab().values()))
    return f"the tokenizer knows {len(beyond)} tokens that the model has no rows for ({_some(beyond)}); rows were added"


def require_rows(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, path: str) -> None:
    """Every token of the tokenizer has a row in the model's embedding."""
    table: Any = model.get_input_embeddings()
    rows = table.weight.shape[0]
    beyond = sorted(token for token, i in tokenizer.get_vocab().items() if i >= rows)
    if beyond:
        raise UserError(
            f"the tokenizer of {path!r} knows {len(beyond)} tokens that the model has no rows for ({_some(beyond)}); "
            "run SFT from it, which adds and trains them"
        )


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (", …" if len(names) > 3 else "")


def assign_pad(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, end_id: int | None = None) -> str | None:
    """Give an external model a pad token apart from EOS; returns what was done, or None if it had one.

    Args:
        end_id: the token that ends an answer, if that is another one: no pad either.

    Raises:
        UserError: a model that counts its positions from the pad that it had, or cannot read a new token.
    """
    if tokenizer.pad_token_id not in (None, tokenizer.eos_token_id, end_id):
        set_pad(model, tokenizer.pad_token_id)
        return None
    vocabulary = tokenizer.get_vocab()
    ends = {tokenizer.eos_token_id, end_id, tokenizer.bos_token_id, tokenizer.unk_token_id} - {None}
    taken = set(tokenizer.convert_ids_to_tokens(sorted(ends)))
    what = "ended answers too" if tokenizer.pad_token_id == end_id is not None else "was missing or equal to EOS"
    existing = next((name for name in PAD_NAMES if name in vocabulary and name not in taken), None)
    tokenizer.add_special_tokens({"pad_token": existing or "<|pad|>"})
    before = model.config.get_text_config().pad_token_id
    if before not in (None, tokenizer.pad_token_id) and positions_follow_pad(model.config):
        raise UserError(
            f"{type(model).__name__} counts positions from its pad token (id {before}), which is also EOS or ends answers here; "
            "another pad would move all positions: give its tokenizer the pad that it was trained with"
        )
    fit_embeddings(model, len(tokenizer))
    require_token(model, tokenizer.pad_token_id)
    set_pad(model, tokenizer.pad_token_id)
    kind = "an existing, unused token" if existing else "a new token"
    return f"pad {what}; {tokenizer.pad_token!r} ({kind}, id {tokenizer.pad_token_id}) is pad now"


def assign_template(
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel | None = None,
    chat_template: str | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> str | None:
    """Give a tokenizer the template that the stage trains with and saves; returns what was done, or None.

    Args:
        model: resized where `chatml` adds its two tokens; None where only ids matter.
        chat_template: the recipe's: a file, "plain", "chatml", or the template's text; None keeps the parent's, and gives
            plain text to a tokenizer that has none (an encoder's reads its first token and ends at its separator).
        folder: the stage's output folder. A template that prints today's date is frozen to the date of the folder's first
            start, so that a resumed run and later stages see the same prompts.

    Raises:
        UserError: `chat_template` names no file and is no template, or does not parse.
    """
    notes = []
    if chat_template is not None:
        tokenizer.chat_template = _named_template(tokenizer, model, chat_template)
        notes.append(f"the chat template is {shorten(chat_template)}, as the recipe says")
    elif not tokenizer.chat_template:
        tokenizer.chat_template = _plain_template(tokenizer)
        notes.append("the parent has no chat template; a plain one was assigned and is saved")
    if isinstance(tokenizer.chat_template, dict):
        tokenizer.chat_template = tokenizer.get_chat_template()
        notes.append("the parent has several chat templates; the default one is taken")
    if prints_date(tokenizer.chat_template):
        date = _date_of(folder)
        tokenizer.chat_template = freeze_date(tokenizer.chat_template, date)
        notes.append(f"the chat template prints today's date; it is frozen to {date:%Y-%m-%d} and saved so")
    return "; ".join(notes) or None


def _plain_template(tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.cls_token is not None and tokenizer.sep_token is not None:
        if tokenizer.eos_token is None:
            tokenizer.eos_token = tokenizer.sep_token
        return ENCODER_TEMPLATE
    starts = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] and tokenizer.bos_token_id is not None
    return ("{{ bos_token }}" if starts else "") + PLAIN_TEMPLATE


def _named_template(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | None, name: str) -> str:
    if name == "plain":
        return _plain_template(tokenizer)
    if name == "chatml":
        missing = [token for token in CHATML_TOKENS if token not in tokenizer.added_tokens_encoder]
        tokenizer.add_special_tokens({"extra_special_tokens": missing}, replace_extra_special_tokens=False)
        if model is not None:
            fit_embeddings(model, len(tokenizer))
        return CHATML_TEMPLATE
    return _read_template(name)


def template_identity(chat_template: str | None) -> str | None:
    """What identifies the recipe's `chat_template`: the text, where it names a file.

    Raises:
        UserError: it names no file and is no template.
    """
    return chat_template if chat_template in (None, "plain", "chatml") else _read_template(str(chat_template))


def _read_template(name: str) -> str:
    if "{" in name or "\n" in name:
        return name
    path = Path(name)
    if not path.is_file():
        raise UserError(
            f"chat_template: there is no file {name!r}; give a file, `chatml`, `plain` or the template's text"
        )
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read as a chat template ({error}); save it as UTF-8", file=path) from error


def _date_of(folder: str | os.PathLike[str] | None) -> datetime.date:
    """Today, or the date of the folder's first start."""
    today = datetime.date.today()
    if folder is None:
        return today
    path = Path(folder) / "template_date.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():  # the first process writes it, whole, and all read it
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        temporary.write_text(today.isoformat() + "\n", encoding="utf-8")
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass
        except OSError:  # a filesystem without hard links
            os.replace(temporary, path)
        temporary.unlink(missing_ok=True)
    try:
        return datetime.date.fromisoformat(path.read_text(encoding="utf-8").strip())
    except ValueError as error:
        raise UserError("no date like 2026-11-25; delete the file", file=path) from error


def complete_chat_model(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, template: str | None, folder: str
) -> tuple[ChatEncoder, list[str]]:
    """Give an external parent what it lacks to hold dialogues: a chat template, rows for its tokens, a pad token.

    Args:
        template: the recipe's `chat_template`. folder: the stage's output, where the template is kept.

    Returns:
        the encoder of the completed tokenizer, and what was done or differs, one line each.
    """
    done = [assign_template(tokenizer, model, template, folder), add_missing_rows(tokenizer, model)]
    done.append(assign_pad(tokenizer, model, ChatEncoder(tokenizer).end_id))
    encoder = ChatEncoder(tokenizer)
    return encoder, [note for note in (*done, *encoder.notes) if note]

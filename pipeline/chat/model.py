"""A model that chats: it is loaded from whatever a name stands for, and its answers can be read while they are written."""

from __future__ import annotations

import copy
import functools
import json
import queue
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.data.encoding import ChatEncoder, Message
from pipeline.errors import UserError
from pipeline.evaluation.answers import load_finite_model
from pipeline.models.loading import (
    CONFIG_ERRORS,
    SAMPLING_VALUES,
    context_length,
    fit_embeddings,
    load_causal_lm,
    one_line,
)
from pipeline.models.precision import accelerator_type
from pipeline.models.tokenizers import assign_template, forbidden_token_ids, load_tokenizer, stop_token_ids
from pipeline.training.checkpoints import checkpoint_folders
from pipeline.training.lineage import COMPLETE, read_lineage
from pipeline.training.parent_names import is_hub_id

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

MAX_TOKENS = 512  # of an answer, where neither the user nor the model's generation config says


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled.

    Attributes:
        temperature: 0 takes the likeliest token; None: as the model's generation config samples, else 1.
        max_tokens: of an answer; None: the generation config's, else MAX_TOKENS.
    """

    temperature: float | None = None
    max_tokens: int | None = None


@dataclass(frozen=True)
class ChatModel:
    """A model that is ready to answer. notes: what was assigned to it for want of its own."""

    name: str
    model: Any
    encoder: ChatEncoder
    notes: tuple[str, ...] = ()

    @functools.cached_property
    def stop_ids(self) -> list[int]:
        return stop_token_ids(self.encoder, self.model.generation_config)

    def generation_config(self, sampling: Sampling, room: int | None) -> GenerationConfig:
        """The model's own, with the stop and forbidden tokens of training.

        Args:
            room: tokens that the context leaves for the answer, where it has an end.
        """
        config: Any = copy.deepcopy(self.model.generation_config)
        rows = self.model.get_output_embeddings().weight.shape[0]
        config.eos_token_id = self.stop_ids
        config.pad_token_id = self.encoder.tokenizer.pad_token_id or self.stop_ids[0]
        config.suppress_tokens = forbidden_token_ids(self.encoder.tokenizer, rows, self.stop_ids) or None
        most = sampling.max_tokens or config.max_new_tokens or MAX_TOKENS
        config.max_new_tokens = most if room is None else min(most, room)
        config.max_length = None
        if sampling.temperature is not None or not config.do_sample:
            for name in SAMPLING_VALUES:
                setattr(config, name, None)
            config.do_sample = sampling.temperature != 0
            config.temperature = sampling.temperature or (1.0 if config.do_sample else None)
        if config.do_sample and config.top_k is None:
            config.top_k = 0  # transformers would take 50
        return config  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------------------------ loading


def load_chat_model(source: str) -> ChatModel:
    """A model from a stage's folder, a folder of transformers' layout, a LoRA adapter's folder or a Hub id.

    Raises:
        UserError: there is none, it did not finish, or it writes no text.
    """
    folder = Path(source)
    if folder.is_file():
        raise UserError(f"{source!r} is a file; name a model's folder")
    if not folder.is_dir() and not is_hub_id(source):
        raise UserError(f"{source!r} is no folder; name a run's, a stage's or a model's folder, or a Hub id")
    _check_stage(folder, source)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        model, tokenizer = _load_adapter(folder)
    else:
        try:
            model, tokenizer = load_finite_model(folder), load_tokenizer(source)
        except UserError as error:
            raise UserError(str(error) if repr(source) in str(error) else f"{source!r}: {error}") from error
    note = assign_template(tokenizer)
    return ChatModel(source, model.to(accelerator_type()), ChatEncoder(tokenizer), (note,) if note else ())


def _check_stage(folder: Path, source: str) -> None:
    """Refuse a stage that did not finish, and a reward model."""
    lineage = read_lineage(folder)
    if checkpoint_folders(folder) or (lineage is not None and lineage.get("status") != COMPLETE):
        raise UserError(f"{source!r}: this stage did not finish; run it again, it will resume")
    if lineage is not None and lineage["stage"] == "reward":
        raise UserError(f"{source!r} is a reward model, which scores answers and writes none; name another stage")


@torch.no_grad()
def _load_adapter(folder: Path) -> tuple[Any, PreTrainedTokenizerBase]:
    """A LoRA adapter merged into its base, and the tokenizer beside it (or beside its merged model), else the base's."""
    from peft import PeftModel

    try:
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError("names no base model (base_model_name_or_path)", file=folder / "adapter_config.json") from error
    if not isinstance(base, str) or not (Path(base).is_dir() or is_hub_id(base)):
        raise UserError(
            f"its base {base!r} is not there; correct base_model_name_or_path", file=folder / "adapter_config.json"
        )
    own = next((f for f in (folder, folder.parent) if (f / "tokenizer_config.json").is_file()), None)
    tokenizer, model = load_tokenizer(str(own or base)), load_causal_lm(base)
    fit_embeddings(model, max(tokenizer.get_vocab().values()) + 1)
    try:
        merged = PeftModel.from_pretrained(model, folder).merge_and_unload()
    except (*CONFIG_ERRORS, RuntimeError) as error:
        raise UserError(f"{str(folder)!r} is no adapter of {base!r}: {one_line(error)}") from error
    return merged.eval(), tokenizer


# ------------------------------------------------------------------------------------------------ answering


class Reply:
    """An answer to a dialogue. Iterate over it for its text, in pieces, while the model writes it.

    Attributes:
        ended: once it has: "stop" at a stop token, "length" at the limit, "interrupted" by `stop`.

    Raises:
        UserError: the template refuses the dialogue, or it leaves no room in the model's context.
    """

    def __init__(self, chat: ChatModel, messages: Sequence[Message], sampling: Sampling, seed: int = 0):
        self.chat, self.seed, self.ended = chat, seed, ""
        self.prompt_ids = chat.encoder.prompt_ids(messages)
        limit = context_length(chat.model.config)
        if limit is not None and len(self.prompt_ids) >= limit:
            raise UserError(
                f"the conversation has {len(self.prompt_ids)} tokens, and {chat.name!r} reads at most {limit}; begin a new one"
            )
        self.config = chat.generation_config(sampling, None if limit is None else limit - len(self.prompt_ids))
        self.ids: list[int] = []
        self._tokens = _TokenQueue()
        self._interrupted = threading.Event()
        self._thread = threading.Thread(target=self._generate, daemon=True)

    @property
    def text(self) -> str:
        """What was written so far."""
        return self.chat.encoder.texts([self.ids])[0]

    def stop(self) -> None:
        """End the answer after the token that is being written."""
        self._interrupted.set()

    def __iter__(self) -> Generator[str]:
        self._thread.start()
        try:
            yield from text_pieces(self._written(), self.chat.encoder)
        finally:
            self.stop()
            self._thread.join()
        self.ended = "stop" if self.ids and self.ids[-1] in self.chat.stop_ids else self.ended or "length"

    def _written(self) -> Iterator[int]:
        while (token := self._tokens.get()) is not None:
            self.ids.append(token)
            yield token

    @torch.no_grad()
    def _generate(self) -> None:
        model = self.chat.model
        ids = torch.tensor([self.prompt_ids], device=next(model.parameters()).device)
        try:
            torch.manual_seed(self.seed)
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=self.config,
                streamer=self._tokens,
                stopping_criteria=StoppingCriteriaList([_Interruption(self)]),
            )
        except BaseException as error:
            self._tokens.fail(error)

    def interrupted(self) -> bool:
        """Whether `stop` was called."""
        if self._interrupted.is_set():
            self.ended = "interrupted"
        return self._interrupted.is_set()


def text_pieces(tokens: Iterable[int], encoder: ChatEncoder) -> Iterator[str]:
    """The text of tokens as they come, in pieces that no later token changes: characters of several tokens stay whole."""
    ids: list[int] = []
    shown, text = 0, ""
    for token in tokens:
        ids.append(token)
        (text,) = encoder.texts([ids])
        begins = text and encoder.template.answer_prefix.startswith(text)  # what comes before each answer is not shown
        if not text.endswith("\ufffd") and not begins:
            yield text[shown:]
            shown = max(shown, len(text))
    yield text[shown:]


class _Interruption(StoppingCriteria):
    """Ends `generate` when its reader has gone."""

    def __init__(self, reply: Reply):
        self.reply = reply

    def __call__(self, input_ids: Any, scores: Any, **options: Any) -> Any:
        return torch.full((input_ids.shape[0],), self.reply.interrupted(), device=input_ids.device)


class _TokenQueue(BaseStreamer):
    """Tokens from the thread that generates. transformers puts the prompt first, then one token at a time."""

    def __init__(self) -> None:
        self.queue: queue.Queue[int | BaseException | None] = queue.Queue()
        self.prompted = False

    def put(self, value: Any) -> None:
        if self.prompted:
            for token in value.flatten().tolist():
                self.queue.put(token)
        self.prompted = True

    def end(self) -> None:
        self.queue.put(None)

    def fail(self, error: BaseException) -> None:
        self.queue.put(error)

    def get(self) -> int | None:
        """The next token, None after the last.

        Raises:
            what `generate` raised.
        """
        item = self.queue.get()
        if isinstance(item, BaseException):
            raise item
        return item

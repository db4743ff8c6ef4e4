"""Text to token ids, one function for SFT, reward training, PPO and the report.

A dialogue is tokenised as serving does it: the chat template's whole text at once. Control tokens come from the template
only: such text inside data stays text. A response follows the prompt that serving gives, and ends at `end_id`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.data.chat_template import (
    ENCODER_TEMPLATE,
    PLAIN_TEMPLATE,
    ROLE_TEMPLATE,
    ROLE_TOKENS,
    ChatTemplate,
    Message,
    TemplateRefusal,
)
from pipeline.data.control_tokens import Part, TextTokenizer, TokenizedParts, special_token_ids, turn_token_ids
from pipeline.data.hashing import sha256_json
from pipeline.errors import UserError, shorten

from transformers import PreTrainedTokenizerBase

__all__ = [
    "ENCODER_TEMPLATE",
    "IGNORE",
    "PLAIN_TEMPLATE",
    "ROLE_TEMPLATE",
    "ROLE_TOKENS",
    "ChatEncoder",
    "Message",
    "TemplateRefusal",
    "document_ids",
    "tokenizer_identity",
]
IGNORE = -100


@dataclass(frozen=True)
class DialogueParts:
    """A dialogue that ends with an answer, as text that the tokenizer has not seen yet.

    prompt: up to where the last answer begins. answer: its header and its content. learnt: positions among the prompt's
    parts of the earlier answers that are learnt. learns_answer: whether the last one is; learns_all: every token.
    """

    prompt: list[Part]
    answer: list[Part]
    learnt: list[int]
    learns_answer: bool
    learns_all: bool


class ChatEncoder:
    """Encodes prompts, responses and dialogues with a tokenizer's chat template.

    Attributes:
        eos_id: the tokenizer's EOS.
        end_id: the token that a trained answer ends with: the template's own end of turn, else EOS.

    Raises:
        UserError: the tokenizer has no EOS or no template, or a template that cannot be taken apart.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        if tokenizer.eos_token_id is None:
            raise UserError(f"the tokenizer of {tokenizer.name_or_path!r} has no EOS token; responses could not end")
        self.template = ChatTemplate(tokenizer)
        self.text = TextTokenizer(tokenizer)
        self.eos_id: int = tokenizer.eos_token_id
        self.end_id = self._end_of_answer()
        # What `decode(skip_special_tokens=True)` would still show of the template.
        self.unreadable = special_token_ids(tokenizer) | turn_token_ids(self.template) | {self.end_id}
        # Whether an earlier answer of a dialogue follows the header that serving prompts with.
        self.trains_earlier = self.template.history_header == self.template.header + self.template.answer_prefix

    def text_ids(self, text: str) -> list[int]:
        """Ids of plain text; control tokens inside it stay text."""
        return self.text.encode([(text, True)])[0]

    def prompt_ids(self, prompt: Sequence[Message]) -> list[int]:
        """A prompt up to where the response begins."""
        return self.text.tokenize([self.prompt_parts(prompt)])[0].ids

    def response_ids(self, response: str) -> list[int]:
        """A response, `end_id` last."""
        return self.finish_response(self.text.tokenize([self.response_parts(response)])[0])

    # For many rows: parts of each, all of them to `text.tokenize`, and ids of each.

    def prompt_parts(self, prompt: Sequence[Message]) -> list[Part]:
        """The text whose ids are `prompt_ids`."""
        return self._parts(self.template.adapt(prompt))

    def response_parts(self, response: str) -> list[Part]:
        """The text of which `finish_response` makes `response_ids`."""
        content = self.template.answer_prefix + self.template.strip("assistant", response)
        return [(self.template.header, False), (content, True)]

    def finish_response(self, tokenized: TokenizedParts) -> list[int]:
        return [*self.text.continuation(tokenized), self.end_id]

    def finished_ids(self, response_ids: Sequence[int], stop_ids: Iterable[int]) -> list[int]:
        """A response that ended at any stop token, ending at `end_id`: where a reward model reads; others unchanged."""
        ids = list(response_ids)
        return [*ids[:-1], self.end_id] if ids and ids[-1] in set(stop_ids) else ids

    def texts(self, response_ids: Sequence[Sequence[int]]) -> list[str]:
        """What readers and judges see of responses: their text without control tokens."""
        prefix = self.template.answer_prefix
        shown = [[i for i in ids if i not in self.unreadable] for ids in response_ids]
        texts = [str(self.tokenizer.decode(ids, skip_special_tokens=True)) for ids in shown]
        return [text.removeprefix(prefix) for text in texts]

    def dialogue(
        self, messages: Sequence[Message], trained: Sequence[bool] | None = None, loss_on: str = "responses"
    ) -> tuple[list[int], list[int]]:
        """A dialogue that ends with an answer, and its labels.

        Args:
            messages: the last one from the assistant.
            trained: of each message, whether it is learnt; default: every answer.
            loss_on: "responses" (each with its end), or "all" tokens.

        Returns:
            input_ids, labels: of one length; labels are IGNORE where nothing is learnt.
        """
        return next(self.encode_dialogues([self._dialogue(messages, trained, loss_on)]))

    def examples(
        self, messages: Sequence[Message], trained: Sequence[bool] | None = None, loss_on: str = "responses"
    ) -> list[tuple[list[int], list[int]]]:
        """`dialogue`, as one example; or one example per trained answer where the template writes another header before
        earlier answers than serving prompts with (reasoning templates)."""
        return list(self.encode_dialogues(self.dialogues(messages, trained, loss_on)))

    def dialogues(
        self, messages: Sequence[Message], trained: Sequence[bool] | None = None, loss_on: str = "responses"
    ) -> list[DialogueParts]:
        """The dialogues of which `encode_dialogues` makes `examples`."""
        if loss_on == "all" or (self.trains_earlier and not self.template.rewrites_answers(messages)):
            return [self._dialogue(messages, trained, loss_on)]
        learnt = [m["role"] == "assistant" for m in messages] if trained is None else trained
        answers = [i for i, flag in enumerate(learnt) if flag]
        return [self._dialogue(messages[: i + 1], [False] * i + [True], loss_on) for i in answers]

    def encode_dialogues(self, dialogues: Sequence[DialogueParts]) -> Iterator[tuple[list[int], list[int]]]:
        """Input ids and labels of each; the tokenizer is called once for all of them."""
        rows = [parts for dialogue in dialogues for parts in (dialogue.prompt, dialogue.answer)]
        tokenized = iter(self.text.tokenize(rows))
        for dialogue, prompt, answer in zip(dialogues, tokenized, tokenized, strict=True):
            ids, response = prompt.ids, self.finish_response(answer)
            if dialogue.learns_all:
                yield ids + response, ids + response
                continue
            labels = [IGNORE] * len(ids)
            spans = prompt.spans() if dialogue.learnt else []
            for start, end in [spans[part] for part in dialogue.learnt]:
                labels[start:end] = ids[start:end]
                while end < len(ids) and ids[end] not in self.text.control and self._is_space(ids[end]):
                    end += 1  # some templates write white space before the end of an answer
                if end < len(ids) and ids[end] in (self.end_id, self.eos_id):
                    labels[end] = ids[end]
            yield ids + response, labels + (response if dialogue.learns_answer else [IGNORE] * len(response))

    # ------------------------------------------------------------------------------------------ inside

    def _dialogue(self, messages: Sequence[Message], trained: Sequence[bool] | None, loss_on: str) -> DialogueParts:
        prompt = self.template.adapt(messages[:-1])
        merged = len(messages) - 1 - len(prompt)  # 1 where the system message was merged
        learnt = [
            1 + 2 * index
            for index, message in enumerate(prompt)
            if message["role"] == "assistant" and (trained is None or trained[index + merged])
        ]
        return DialogueParts(
            prompt=self._parts(prompt),
            answer=self.response_parts(messages[-1]["content"]),
            learnt=learnt if self.trains_earlier else [],
            learns_answer=trained is None or trained[-1],
            learns_all=loss_on == "all",
        )

    def _parts(self, messages: Sequence[Message]) -> list[Part]:
        """Adapted messages with the header of the next answer: the template's text and contents in turn."""
        if messages:
            pieces = self.template.pieces(tuple(m["role"] for m in messages), True)
        else:  # a dialogue that opens with an answer
            pieces = self.template.pieces(("assistant",), False)[:1]
        parts = [(pieces[0], False)]
        for message, piece in zip(messages, pieces[1:], strict=True):
            parts += [(message["content"], True), (piece, False)]
        return parts

    def _end_of_answer(self) -> int:
        """The first control token that the template writes after the last answer, white space apart; else EOS."""
        tail = self.text.encode([(self.template.answer_tail, False)])[0]
        first = next((token for token in tail if token in self.text.control or not self._is_space(token)), None)
        return first if first in self.text.control else self.eos_id

    def _ends_earlier_answers(self) -> bool:
        """Whether the template ends an answer that another turn follows; where none can, there is nothing to end."""
        try:
            tail = self.template.pieces(("user", "assistant", "user"), True)[2]
        except TemplateRefusal:
            return True
        return not {self.end_id, self.eos_id}.isdisjoint(self.text.encode([(tail, False)])[0])

    def _is_space(self, token: int) -> bool:
        return not str(self.tokenizer.decode([token])).strip()

    @functools.cached_property
    def notes(self) -> list[str]:
        """What a stage says at its start about this template: where training differs from serving, tried on dialogues."""
        notes = []
        if self.end_id != self.eos_id:
            end = self.tokenizer.convert_ids_to_tokens(self.end_id)
            notes.append(
                f"answers end with {end!r}, as the chat template ends a turn (EOS is {self.tokenizer.eos_token!r})"
            )
        earlier = self._ends_earlier_answers()
        if self.end_id not in self.text.encode([(self.template.answer_tail, False)])[0]:
            notes.append(
                f"the chat template writes no token that ends an answer; answers are trained to end with EOS "
                f"({self.tokenizer.eos_token!r})"
                + (", which earlier answers of a dialogue lack" if not earlier else "")
            )
        elif not earlier and self.trains_earlier:
            notes.append(
                "the chat template ends the last answer of a dialogue only; earlier ones are trained without an end"
            )
        if not self.trains_earlier:
            notes.append(
                f"the chat template writes {self.template.history_header!r} before earlier answers but prompts with "
                f"{self.template.header!r}; each answer is an example of its own"
            )
        if difference := self._serving_difference():
            notes.append(difference)
        return notes

    def _serving_difference(self) -> str | None:
        """One line on the first probe whose ids are not those of `apply_chat_template(tokenize=True)`, or None."""
        for contents in PROBES:
            for system in [True, False][self.template.merges_system :]:
                messages = [{"role": "system", "content": "Be kind."}] if system else []
                for index, content in enumerate(contents):
                    messages.append({"role": "assistant" if index % 2 else "user", "content": content})
                try:
                    difference = self._difference(messages)
                except TemplateRefusal:
                    continue  # this template takes no such dialogue; a row that has one is refused
                if difference:
                    return difference
        return None

    def _difference(self, messages: list[Message]) -> str | None:
        ours = self.prompt_ids(messages)
        theirs = self._served(messages, generation=True)
        if ours != theirs:
            return self._shown("prompts", messages, ours, theirs)
        answered = [*messages, {"role": "assistant", "content": "Yes, of course."}]
        ours, theirs = self.dialogue(answered)[0], self._served(answered, generation=False)
        if self.trains_earlier and ours[:-1] != theirs[: len(ours) - 1]:
            return self._shown("answers", answered, ours, theirs)
        return None

    def _served(self, messages: list[Message], generation: bool) -> list[int]:
        shown: Any = messages
        if self.template.as_parts:
            shown = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        ids = self.tokenizer.apply_chat_template(
            shown, tokenize=True, add_generation_prompt=generation, return_dict=False
        )
        return list(ids)

    def _shown(self, what: str, messages: list[Message], ours: list[int], theirs: list[int]) -> str:
        at = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
        )
        one, other = (self.tokenizer.convert_ids_to_tokens(ids[at : at + 4]) for ids in (ours, theirs))
        return (
            f"ids of {what} differ from apply_chat_template's: {shorten(messages[-1]['content'])} gives {one} "
            f"in training and {other} in serving"
        )


# Contents of the dialogues on which ids at training and at serving are compared: user, assistant, user, …
PROBES: tuple[tuple[str, ...], ...] = (
    ("my kettle is broken",),
    ("Hello, 12345 and 3.14!", "Sorry.", "And now?\n"),
    ("  two spaces", "A line\nand another", "\n\nlines", "ok", "x"),
    ("Straße, 日本語, 🙂\té", "…", "<b>&amp;</b>"),
)


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of all of a tokenizer that decides its ids, its chat template included."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        model = json.loads(backend.to_str())
        model.pop("truncation"), model.pop("padding")  # set anew by each call
    else:
        added = {str(i): repr(token) for i, token in tokenizer.added_tokens_decoder.items()}
        model = {"vocabulary": tokenizer.get_vocab(), "added": added, "options": repr(tokenizer.init_kwargs)}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return sha256_json([type(tokenizer).__name__, model, special, tokenizer.chat_template])


def document_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Documents for language modelling: a start token, the text, EOS. The start token is BOS, or EOS where there is none."""
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no EOS token; documents could not end: name one as "
            "`eos_token` in its tokenizer_config.json"
        )
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    encoded = TextTokenizer(tokenizer).encode_texts(texts)
    return [[start, *ids, tokenizer.eos_token_id] for ids in encoded]

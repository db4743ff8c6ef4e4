"""Text to token ids, one function for SFT, reward training, PPO and the report.

The chat template's pieces and the messages' contents are tokenised apart: control tokens come from the template only,
and text such as `<|im_end|>` inside data stays text. Every response ends at EOS, never at a template's trailing newline.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from pipeline.errors import UserError

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

Message = dict[str, str]
IGNORE = -100

# For tokenizers that bring none: plain text, no new tokens.
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% else %}{{ 'Assistant: ' + message['content'] + eos_token + '\n\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)
ENCODER_TEMPLATE = "{{ cls_token }}" + PLAIN_TEMPLATE
# For tokenizers that pretraining makes: one control token a turn.
ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>")
ROLE_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


class ChatEncoder:
    """Encodes prompts, responses and dialogues with a tokenizer's chat template.

    Raises:
        UserError: the tokenizer has no EOS or no template, pad = EOS, or a template that cannot be taken apart.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        name = tokenizer.name_or_path
        if tokenizer.eos_token_id is None:
            raise UserError(f"the tokenizer of {name!r} has no EOS token; responses could not end")
        if not tokenizer.chat_template:
            raise UserError(f"the tokenizer of {name!r} has no chat template; run SFT first, it assigns one")
        self.eos_id: int = tokenizer.eos_token_id
        probe: list[Message] = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]
        before_answer = self._pieces(("user", "assistant"), False)[1]
        generation = self._pieces(("user",), True)[1]
        if before_answer != generation:
            raise UserError(
                f"the chat template of {name!r} writes {before_answer!r} before an answer but prompts with "
                f"{generation!r}; training and sampling would differ, give another template"
            )
        padded = self._render([{**probe[0], "content": " x "}], True)
        self.strips = " x " not in padded  # some templates trim contents; then so must we

    def text_ids(self, text: str) -> list[int]:
        """Ids of plain text; control tokens inside it stay text."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return ids

    def prompt_ids(self, prompt: Sequence[Message]) -> list[int]:
        """A prompt up to where the response begins."""
        pieces = self._piece_ids(tuple(m["role"] for m in prompt), True)
        ids = list(pieces[0])
        for message, piece in zip(prompt, pieces[1:], strict=True):
            ids += self._content_ids(message) + piece
        return ids

    def response_ids(self, response: str) -> list[int]:
        """A response, EOS last."""
        return [*self._content_ids({"role": "assistant", "content": response}), self.eos_id]

    def texts(self, response_ids: Sequence[Sequence[int]]) -> list[str]:
        """What readers and judges see of responses: their text without control tokens."""
        return [str(self.tokenizer.decode(list(ids), skip_special_tokens=True)) for ids in response_ids]

    def dialogue(
        self, messages: Sequence[Message], first_trained: int = 0, loss_on: str = "responses"
    ) -> tuple[list[int], list[int]]:
        """A dialogue that ends with an answer, and its labels.

        Args:
            messages: the last one from the assistant.
            first_trained: answers from this index on are trained.
            loss_on: "responses" (each with its EOS), or "all" tokens.

        Returns:
            input_ids, labels: of one length; labels are IGNORE where nothing is learnt.
        """
        pieces = self._piece_ids(tuple(m["role"] for m in messages), False)
        ids = list(pieces[0])
        labels = [IGNORE] * len(ids)
        last = len(messages) - 1
        for index, (message, piece) in enumerate(zip(messages, pieces[1:], strict=True)):
            content = self._content_ids(message)
            trained = message["role"] == "assistant" and index >= first_trained
            after = [self.eos_id] if index == last else piece
            ends = trained and after[:1] == [self.eos_id]
            ids += content + after
            labels += content if trained else [IGNORE] * len(content)
            labels += [self.eos_id] * ends + [IGNORE] * (len(after) - ends)
        if loss_on == "all":
            labels = list(ids)
        return ids, labels

    def _content_ids(self, message: Message) -> list[int]:
        return self.text_ids(message["content"].strip() if self.strips else message["content"])

    @functools.lru_cache(maxsize=4096)  # noqa: B019 - an encoder lives as long as its stage
    def _piece_ids(self, roles: tuple[str, ...], generation: bool) -> list[list[int]]:
        return [
            self.tokenizer(piece, add_special_tokens=False)["input_ids"] if piece else []
            for piece in self._pieces(roles, generation)
        ]

    def _pieces(self, roles: tuple[str, ...], generation: bool) -> list[str]:
        """The template's own text before, between and after the contents of messages of these roles."""
        marks = [f"\ue000{index}\ue001" for index in range(len(roles))]
        rest = self._render([{"role": r, "content": m} for r, m in zip(roles, marks, strict=True)], generation)
        pieces = []
        for mark in marks:
            before, found, rest = rest.partition(mark)
            if not found:
                raise UserError(
                    f"the chat template of {self.tokenizer.name_or_path!r} drops or reorders messages of roles {roles}"
                )
            pieces.append(before)
        return [*pieces, rest]

    def _render(self, messages: list[Message], generation: bool) -> str:
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
        except TemplateError as error:
            roles = [m["role"] for m in messages]
            raise UserError(
                f"the chat template of {self.tokenizer.name_or_path!r} refuses messages of roles {roles}: {error}"
            ) from error
        assert isinstance(text, str)
        return text


def document_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Documents for language modelling: a start token, the text, EOS. The start token is BOS, or EOS where there is none."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    encoded = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [[start, *ids, tokenizer.eos_token_id] for ids in encoded]


def forbidden_ids(tokenizer: PreTrainedTokenizerBase, logits_size: int) -> list[int]:
    """Ids that must never be sampled (A2): pad, special tokens other than EOS, and rows past the vocabulary."""
    special: set[Any] = set(tokenizer.all_special_ids) - {tokenizer.eos_token_id}
    known = set(tokenizer.get_vocab().values())
    return sorted({i for i in special if i is not None} | (set(range(logits_size)) - known))

"""A tokenizer's chat template, taken apart: the text that it writes around the contents of messages.

What is assumed about a template is tried on it: which roles it takes, what it strips from contents, how it opens and
ends an answer. A template that changes contents or loses messages is refused.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

from pipeline.data.records import current_row
from pipeline.errors import UserError, shorten

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
Message = dict[str, str]

_REFUSE_ROLES = (
    "{% if message['role'] not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('only the roles system, user and assistant are known') }}{% endif %}"
)
# For tokenizers that bring none: plain text, no new tokens. Contents follow a line break, so that their ids are the same
# alone and after the template's text.
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    + _REFUSE_ROLES
    + "{% if message['role'] == 'user' %}{{ 'User:\n' + message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% else %}{{ 'Assistant:\n' + message['content'] + eos_token + '\n\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}"
)
# An encoder reads its first token.
ENCODER_TEMPLATE = "{{ cls_token }}" + PLAIN_TEMPLATE
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
CHATML_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# For tokenizers that pretraining makes: one control token per turn.
ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>")
ROLE_TEMPLATE = (
    "{% for message in messages %}" + _REFUSE_ROLES + "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# What templates are seen to do to the ends of a content, tried in this order.
STRIPS: tuple[Callable[[str], str], ...] = (
    lambda text: text,
    str.strip,
    str.lstrip,
    str.rstrip,
    lambda text: text.strip("\n"),
    lambda text: text.lstrip("\n"),
    lambda text: text.rstrip("\n"),
)
# Contents that a template which escapes, folds case, cuts or looks inside would change.
PROBE = "aBc <b>&'\"é ß Ü ﬁ</b> {{ x }} 10%\n\n  two" + " three" * 2000
RENDER_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


def prints_date(template: str) -> bool:
    """Whether a template asks transformers for the current time."""
    return re.search(r"\bstrftime_now\b", template) is not None and not template.startswith(FROZEN)


def freeze_date(template: str, date: datetime.date) -> str:
    """The template with its own `strftime_now`, which knows one day alone."""
    formats = sorted({text for _, text in re.findall(r"""(['"])([^'"]*%[^'"]*)\1""", template)})
    known = ", ".join(f"{form!r}: {date.strftime(form)!r}" for form in formats)
    unknown = "raise_exception('a date in a format that the template does not spell out cannot be frozen')"
    day = "{% set day = {" + known + "} %}{{ day[format] if format in day else " + unknown + " }}"
    return FROZEN + day + "{%- endmacro %}{{ '' }}" + template


FROZEN = "{% macro strftime_now(format) -%}"


def _marks(count: int) -> list[str]:
    """Contents that no template writes itself, each another."""
    return [f"\ue000{index}\ue001" for index in range(count)]


class TemplateRefusal(UserError):
    """The chat template cannot hold these messages; whoever knows the row adds its file and line."""


class ChatTemplate:
    """The text that a chat template writes before, between and after the contents of messages.

    Attributes:
        header: what an answer is prompted with, `add_generation_prompt` of transformers.
        answer_prefix: white space that the template writes between the header and an answer; the model writes it.
        history_header: what stands before an earlier answer.
        answer_tail: what follows the last answer.
        merges_system: there is no system role; its text is put before the first user turn.
        system_separator: what follows the system text where the template writes it before the last user turn, else None.

    Raises:
        UserError: no template, or one that loses, reorders or changes messages.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.name = tokenizer.name_or_path
        template = tokenizer.chat_template
        if isinstance(template, str) and prints_date(template):  # no stage froze it; within this process it is one day
            tokenizer.chat_template = freeze_date(template, datetime.date.today())
        if not tokenizer.chat_template:
            raise UserError(f"the tokenizer of {self.name!r} has no chat template; run SFT first, it assigns one")
        self.as_parts = self._wants_parts()
        self.header = self.pieces(("user",), generation=True)[1]
        self.history_header = self._history_header()
        self.answer_tail = self.pieces(("user", "assistant"), generation=False)[2]
        rest = self.history_header.removeprefix(self.header)
        self.answer_prefix = rest if self.history_header.startswith(self.header) and not rest.strip() else ""
        self._check_headers()
        self.merges_system = self._lacks_system_role()
        self.system_separator = None if self.merges_system else self._separator_before_last_turn()
        self._said: set[str] = set()
        self.strips = self._find_strips()
        quoted = re.findall(r"""'((?:[^'\\]|\\.)*)'|"((?:[^"\\]|\\.)*)\"""", str(tokenizer.chat_template))
        self.literals = {text.replace("\\n", "\n") for pair in quoted for text in pair if len(text.strip()) > 2}

    # ------------------------------------------------------------------------------------------ rendering

    def adapt(self, messages: Sequence[Message]) -> list[Message]:
        """Messages as the template can hold them: system text merged where there is no such role, ends stripped."""
        adapted = [dict(message) for message in messages]
        if self.merges_system and adapted and adapted[0]["role"] == "system":
            if len(adapted) < 2 or adapted[1]["role"] != "user":
                raise TemplateRefusal(
                    f"the chat template of {self.name!r} has no system role and no user turn follows to take its text"
                )
            system = adapted.pop(0)
            adapted[0]["content"] = system["content"] + "\n\n" + adapted[0]["content"]
            self._say_once("has no system role; system messages are put before the first user turn")
        elif self.system_separator is not None and adapted and adapted[0]["role"] == "system":
            system = adapted.pop(0)
            turn = next((m for m in reversed(adapted) if m["role"] == "user"), None)
            if turn is None:
                raise TemplateRefusal(
                    f"the chat template of {self.name!r} writes system text before the last user turn; there is none"
                )
            turn["content"] = system["content"] + self.system_separator + turn["content"]
        for message in adapted:
            message["content"] = self.strip(message["role"], message["content"])
        return self._as_written(adapted)

    def rewrites_answers(self, messages: Sequence[Message]) -> bool:
        """Whether the template writes an earlier answer otherwise than it was given: a thought is left out."""
        given = [self.strip("assistant", m["content"]) for m in messages[:-1] if m["role"] == "assistant"]
        if not given:
            return False
        return given != [m["content"] for m in self.adapt(messages[:-1]) if m["role"] == "assistant"]

    def _as_written(self, messages: list[Message]) -> list[Message]:
        """Contents as the template writes them where they hold a text that it may look for (`</think>`)."""
        roles = tuple(m["role"] for m in messages)
        for index, message in enumerate(messages):
            held = [text for text in self.literals if text in message["content"]]
            if not held:
                continue
            pieces = self.pieces(roles, True)
            marks = _marks(len(roles))
            parts = [part for pair in zip(pieces, marks, strict=False) for part in pair]
            before, after = "".join(parts[: 2 * index + 1]), "".join([*parts[2 * index + 2 :], pieces[-1]])
            shown = [{**m, "content": mark} for m, mark in zip(messages, marks, strict=True)]
            shown[index] = message
            text = self._render(shown, True)
            written = text[len(before) : len(text) - len(after)]
            if text != before + written + after or not written.strip():
                raise TemplateRefusal(
                    f"the chat template of {self.name!r} writes other text around a {message['role']} message that "
                    f"holds {shorten(max(held, key=len))}; leave such messages out, or give another template"
                )
            if written != message["content"]:
                self._say_once(f"rewrites {message['role']} messages that hold text such as {max(held, key=len)!r}")
                messages[index] = {**message, "content": written}
        return messages

    def _say_once(self, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            row = f" (first in {current_row.get()})" if current_row.get() else ""
            logger.warning("the chat template of %r %s%s", self.name, what, row)

    def strip(self, role: str, content: str) -> str:
        """A content as the template would write it."""
        return self.strips.get(role, STRIPS[0])(content)

    @functools.lru_cache(maxsize=4096)  # noqa: B019 - a template lives as long as its stage
    def pieces(self, roles: tuple[str, ...], generation: bool) -> tuple[str, ...]:
        """The template's own text before, between and after the contents of messages of these roles."""
        marks = _marks(len(roles))
        rest = self._render([{"role": r, "content": m} for r, m in zip(roles, marks, strict=True)], generation)
        pieces = []
        for mark in marks:
            before, found, rest = rest.partition(mark)
            if not found or mark in rest:
                raise TemplateRefusal(
                    f"the chat template of {self.name!r} drops or reorders messages of roles {roles}; "
                    "leave such messages out, or give another template"
                )
            pieces.append(before)
        return (*pieces, rest)

    def _render(self, messages: list[Message], generation: bool) -> str:
        shown: list[Any] = list(messages)
        if self.as_parts:
            shown = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        try:
            text = self.tokenizer.apply_chat_template(shown, tokenize=False, add_generation_prompt=generation)
        except RENDER_ERRORS as error:
            roles = [m["role"] for m in messages]
            raise TemplateRefusal(
                f"the chat template of {self.name!r} refuses messages of roles {roles}: {str(error).splitlines()[0]}"
            ) from error
        assert isinstance(text, str)
        return text

    # ------------------------------------------------------------------------------------------ what is tried

    as_parts = False

    def _wants_parts(self) -> bool:
        """Templates of models that see pictures may take contents as lists of parts only."""
        try:
            self.pieces(("user",), generation=True)
        except UserError:
            self.as_parts = True
            try:
                self.pieces(("user",), generation=True)
            except UserError:
                self.as_parts = False
        return self.as_parts

    def _history_header(self) -> str:
        """What stands before an answer that another turn follows; before the only answer where turns cannot follow."""
        try:
            return self.pieces(("user", "assistant", "user"), generation=True)[1]
        except TemplateRefusal:
            return self.pieces(("user", "assistant"), generation=False)[1]

    def _check_headers(self) -> None:
        """An answer is trained after the header that serving prompts with; history must open answers alike."""
        one, other = self.header, self.history_header
        common = next(
            (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
        )
        if one != other and not one[:common].strip():
            raise UserError(
                f"the chat template of {self.name!r} writes {other!r} before an answer but prompts with {one!r}; "
                "training and sampling would differ, give another template"
            )
        rest = other.removeprefix(one)
        if rest.strip() and other.startswith(one) and self.pieces(("user",), True) == self.pieces(("user",), False):
            raise UserError(
                f"the chat template of {self.name!r} ignores add_generation_prompt but writes {rest!r} before an answer; "
                "no prompt would end so: write it where add_generation_prompt is true, and give that as `chat_template`"
            )

    def _separator_before_last_turn(self) -> str | None:
        """What the template writes between system text and the last user turn, where it moves the one to the other."""
        roles = ("system", "user", "assistant", "user")
        try:
            self.pieces(roles, generation=True)
        except TemplateRefusal:
            pass
        else:
            return None
        try:
            separator = self.pieces(("system", "user"), True)[1]
            system, *others = [{"role": r, "content": c} for r, c in zip(roles, _marks(4), strict=True)]
            moved = self._render([system, *others], True)
            others[-1]["content"] = system["content"] + separator + others[-1]["content"]
            merged = self._render(others, True)
        except TemplateRefusal:
            return None
        return separator if moved == merged and not separator.strip() else None

    def _lacks_system_role(self) -> bool:
        try:
            self.pieces(("system", "user"), generation=True)
        except TemplateRefusal:
            return True
        return False

    def _find_strips(self) -> dict[str, Callable[[str], str]]:
        """How each role's contents are stripped; refuses a template that changes anything else of them."""
        strips = {}
        if not self.merges_system and self.system_separator is None:
            strips["system"] = self._strip_of(("system", "user"), 0)
        for roles in (("user", "assistant", "user"), ("user",)):
            with contextlib.suppress(TemplateRefusal):
                self.pieces(roles, generation=True)
                break
        return strips | {role: self._strip_of(roles, roles.index(role)) for role in dict.fromkeys(roles)}

    def _strip_of(self, roles: tuple[str, ...], position: int) -> Callable[[str], str]:
        pieces = self.pieces(roles, generation=True)

        def written(content: str) -> str:
            contents = [content if i == position else f"x{i}" for i in range(len(roles))]
            return self._render([{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)], True)

        def expected(content: str) -> str:
            contents = [content if i == position else f"x{i}" for i in range(len(roles))]
            return "".join(p + c for p, c in zip(pieces, [*contents, ""], strict=True))

        padded = "\n \n" + PROBE + "\n \n"
        shown = written(padded)
        for strip in STRIPS:
            if shown == expected(strip(padded)):
                return strip
        text = shown.removeprefix(pieces[0]) if position == 0 else shown
        raise TemplateRefusal(
            f"the chat template of {self.name!r} changes the text of {roles[position]} messages "
            f"({shorten(PROBE)} became {shorten(text)}); training would see other text, give another template"
        )

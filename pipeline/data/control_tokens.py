"""Which tokens are control tokens, and text to ids such that text of data never becomes one."""

from __future__ import annotations

import functools
import itertools
import logging
import re
from collections.abc import Callable, Sequence

from pipeline.data.chat_template import ChatTemplate, TemplateRefusal
from pipeline.data.records import current_row
from pipeline.errors import shorten

from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
MARKUP = re.compile(r"<[|｜].*[|｜]>|</?(?P<name>[A-Za-z_]\w*)>", re.DOTALL)
# Gemma's tokenizer and others hold HTML as ordinary text.
HTML = re.compile(
    "a|b|blockquote|body|br|caption|code|div|em|h[1-6]|head|hr|html|i|img|li|ol|p|pre|s|span|strong|su[bp]|"
    "t(able|body|d|foot|h|head|itle|r)|ul?",
    re.IGNORECASE,
)
Part = tuple[str, bool]  # text, whether it is content
Span = tuple[int, int]
Placed = tuple[list[int], list[Span]]  # ids, and where in the text each of them stands


def special_token_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of all special tokens: the named ones, and those that only `added_tokens_decoder` lists."""
    listed = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {i for i in tokenizer.all_special_ids if i is not None} | listed


def control_token_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids that steer a model rather than being read: special tokens, and added tokens that act like them.

    An added token that is not special counts if the chat template writes it (turn tokens) or if it looks like `<|…|>` or
    `<think>`. Other added tokens (words, runs of spaces, HTML) are ordinary text. The token for unknown text is none, also
    where it pads (Llama 2's tokenizers are often set so): unknown text has no other ids.
    """
    template = tokenizer.chat_template or ""
    template = template if isinstance(template, str) else "".join(template.values())
    ids = special_token_ids(tokenizer)
    for i, token in tokenizer.added_tokens_decoder.items():
        text = token.content.strip()
        markup = MARKUP.fullmatch(text)
        steers = markup is not None and HTML.fullmatch(markup["name"] or "") is None
        if text and (steers or (not text.isalnum() and text in template)):
            ids.add(i)
    steering = {tokenizer.eos_token_id, tokenizer.bos_token_id}
    return ids - ({tokenizer.unk_token_id} - steering)


def turn_token_ids(template: ChatTemplate) -> set[int]:
    """Ids of control tokens with which the chat template opens and closes turns: sampling one would fake a turn.

    `<name>` with a `</name>` in the vocabulary is markup inside an answer, such as `<think>`, and no turn token.
    """
    tokenizer = template.tokenizer
    text = "".join([*template.pieces(("user",), True), template.history_header])
    written = set(tokenizer(text, add_special_tokens=False)["input_ids"]) & control_token_ids(tokenizer)
    vocabulary = tokenizer.get_vocab()
    names = {i: str(tokenizer.convert_ids_to_tokens(i)) for i in written}
    return {i for i, name in names.items() if not name.startswith("</") and "</" + name[1:] not in vocabulary}


def opened_markup_ids(template: ChatTemplate) -> set[int]:
    """Ids of the `</name>` that must be sampled to close a `<name>` which the template's prompt for an answer opens."""
    header, vocabulary = template.header, template.tokenizer.get_vocab()
    closing = {"</" + name + ">" for name in re.findall(r"<(\w+)>", header) if f"</{name}>" not in header}
    return {vocabulary[name] for name in closing if name in vocabulary}


class TokenizedParts:
    """Parts whose joined text is tokenised as one.

    A control token inside or across contents is encoded as the text that it is, when ids or spans are first asked for.

    Args:
        encoding: of the joined text; None where the tokenizer gives no offsets.
    """

    def __init__(self, tokenizer: TextTokenizer, parts: Sequence[Part], encoding: Encoding | None = None):
        self.tokenizer, self.parts, self.encoding = tokenizer, parts, encoding

    @functools.cached_property
    def ids(self) -> list[int]:
        ids = self.tokenizer.plain_content_ids(self.parts, self.encoding) if self.encoding is not None else None
        return self._placed[0] if ids is None else ids

    @property
    def places(self) -> list[Span]:
        """Where in the joined text each part stands."""
        ends = list(itertools.accumulate(len(text) for text, _ in self.parts))
        return list(zip([0, *ends[:-1]], ends, strict=True))

    @functools.cached_property
    def _placed(self) -> Placed:
        contents = [(s, e) for (s, e), (_, content) in zip(self.places, self.parts, strict=True) if content and e > s]
        return self.tokenizer.correct("".join(text for text, _ in self.parts), contents, self.encoding)

    def spans(self) -> list[Span]:
        """For each part, (first, last + 1) of the ids that touch it."""
        ids, offsets = self._placed
        spans = []
        position = 0
        for start, end in self.places:
            while position < len(ids) and offsets[position][1] <= start and offsets[position] != (start, start):
                position += 1
            first = last = position
            while last < len(ids) and offsets[last][0] < end:
                last += 1
            spans.append((first, last))
        return spans


class TextTokenizer:
    """A tokenizer that can tell the template's text from contents.

    Attributes:
        control: ids that contents never become.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.control = control_token_ids(tokenizer)
        self.anchor = self._ids("\n")
        self._said_text = False

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    @functools.lru_cache(maxsize=256)  # noqa: B019 - lives as long as its stage
    def _context_ids(self, text: str) -> list[int]:
        return self._ids(text)

    # ------------------------------------------------------------------------------------------ encoding

    def tokenize(self, rows: Sequence[Sequence[Part]]) -> list[TokenizedParts]:
        """The parts of many rows, each row's joined text tokenised as one, in one call of the tokenizer."""
        if not self.tokenizer.is_fast or not rows:  # no offsets: contents and the text around them are tokenised apart
            return [TokenizedParts(self, parts) for parts in rows]
        texts = ["".join(text for text, _ in parts) for parts in rows]
        encodings = self._tokenized(texts)
        return [TokenizedParts(self, parts, encoding) for parts, encoding in zip(rows, encodings, strict=True)]

    def encode(self, parts: Sequence[Part]) -> tuple[list[int], list[Span]]:
        """Ids of the parts' joined text, tokenised as one; for each part, (first, last + 1) of the ids that touch it.

        A control token inside or across contents is encoded as the text that it is.
        """
        tokenized = self.tokenize([parts])[0]
        return tokenized.ids, tokenized.spans()

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, none of them a control token."""
        rows = self._rows(list(texts))
        return [
            ids if self.control.isdisjoint(ids) else self.encode([(text, True)])[0]
            for text, ids in zip(texts, rows, strict=True)
        ]

    def _rows(self, texts: list[str]) -> list[list[int]]:
        """Ids of texts in which no special token is looked for, as `tokenizer(…, split_special_tokens=True)` gives them."""
        if not self.tokenizer.is_fast:
            return self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]  # type: ignore[no-any-return]
        backend = self.tokenizer.backend_tokenizer  # type: ignore[attr-defined]  # a third faster: it makes no offsets, no masks
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # each call of the tokenizer sets it anew
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]

    def continuation(self, tokenized: TokenizedParts) -> list[int]:
        """Ids of a content as they follow its context, which keeps its own ids.

        Args:
            tokenized: of two parts, the context and the content.
        """
        (context, _), (text, _) = tokenized.parts
        for before in (context, "\n"):
            if not before or not text:
                continue
            head = self._context_ids(before)
            ids = tokenized.ids if before == context else self.encode([(before, False), (text, True)])[0]
            if ids[: len(head)] == head:
                return ids[len(head) :]
        return self.encode([(text, True)])[0]

    def plain_content_ids(self, parts: Sequence[Part], encoding: Encoding) -> list[int] | None:
        """Ids of a content between two texts of the template, or behind one, where it is seen without the tokens' places
        that no control token touches it: the template's texts have their own ids, and what is between them is plain."""
        if len(parts) not in (2, 3) or [content for _, content in parts] != [False, True, False][: len(parts)]:
            return None
        head, tail = self._context_ids(parts[0][0]), self._context_ids(parts[2][0]) if len(parts) == 3 else []
        ids = encoding.ids
        end = len(ids) - len(tail)
        own = len(head) <= end and ids[: len(head)] == head and ids[end:] == tail
        return ids if own and self.control.isdisjoint(ids[len(head) : end]) else None

    def correct(self, text: str, contents: list[Span], encoding: Encoding | None) -> Placed:
        """Ids and their places in a text, whose contents hold no control token.

        Args:
            encoding: the text's; None where the tokenizer gives no offsets.
        """
        if encoding is None:
            return self._cut(text, contents, contents)
        ids, offsets = encoding.ids, encoding.offsets
        control = [i for i, token in enumerate(ids) if token in self.control]
        for i in control:
            offsets[i] = _core(text, offsets[i])
        marked = [offsets[i] for i in control if _touches(offsets[i], contents)]
        if not marked:
            return ids, offsets
        if not self._said_text:
            self._said_text = True
            row = f" (first in {current_row.get()})" if current_row.get() else ""
            logger.warning(
                "text that looks like a control token stays text in data: %s%s", shorten(text[slice(*marked[0])]), row
            )
        return self._cut(text, marked, marked)

    # ------------------------------------------------------------------------------------------ inside

    def _tokenized(self, texts: list[str]) -> list[Encoding]:
        encodings = self.tokenizer(texts, add_special_tokens=False).encodings
        assert encodings is not None
        return encodings

    def _placed(self, text: str) -> Placed:
        encoding = self._tokenized([text])[0]
        return encoding.ids, encoding.offsets

    def _cut(self, text: str, at: list[Span], as_text: list[Span]) -> Placed:
        """The text cut at the borders of spans; those in `as_text` are encoded as plain text."""
        cuts = sorted({0, *(place for span in at for place in span), len(text)})
        ids: list[int] = []
        offsets: list[Span] = []
        for start, end in itertools.pairwise(cuts):
            piece = text[start:end]
            if (start, end) in as_text:
                found = self._middle(piece, self._plain) if start else self._plain(piece)
                places = [(start, end)] * len(found)
            else:
                found, places = self._middle_placed(piece, start)
            ids += found
            offsets += places
        return ids, offsets

    def _middle(self, piece: str, encode: Callable[[str], list[int]]) -> list[int]:
        """Ids of a piece in the middle of a text: without the space that SentencePiece puts before a text's first word."""
        ids, anchor = encode("\n" + piece), encode("\n")
        return ids[len(anchor) :] if ids[: len(anchor)] == anchor else encode(piece)

    def _middle_placed(self, piece: str, start: int) -> Placed:
        if not self.tokenizer.is_fast:
            ids = self._middle(piece, self._ids) if start else self._ids(piece)
            return ids, [(start, start + len(piece))] * len(ids)
        ids, offsets = self._placed("\n" + piece) if start else self._placed(piece)
        anchor = len(self.anchor) if start and ids[: len(self.anchor)] == self.anchor else None
        if start and anchor is None:
            ids, offsets = self._placed(piece)
        shift = start - (anchor is not None)
        return ids[anchor:], [(a + shift, b + shift) for a, b in offsets[anchor:]]

    def _plain(self, text: str) -> list[int]:
        """Ids of text in which nothing is an added token."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            ids: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        else:
            shown = backend.normalizer.normalize_str(text) if backend.normalizer else text
            words = [w for w, _ in backend.pre_tokenizer.pre_tokenize_str(shown)] if backend.pre_tokenizer else [shown]
            ids = [token.id for word in words for token in backend.model.tokenize(word)]
        if self.control.isdisjoint(ids):
            return ids
        # The vocabulary itself holds the token's text: no piece may be the whole of it.
        middle = len(text) - len(text.lstrip("\n")) + 1
        if middle >= len(text):
            raise TemplateRefusal(
                f"the text {text!r} is a control token of this tokenizer; it cannot be trained as text"
            )
        return self._plain(text[:middle]) + self._middle(text[middle:], self._plain)


def _core(text: str, span: Span) -> Span:
    """A token's place without the white space that it swallows (`lstrip`, `rstrip`)."""
    start, end = span
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    return start, end


def _touches(span: Span, others: list[Span]) -> bool:
    return any(start < span[1] and span[0] < end for start, end in others)

"""Chat in the terminal: answers appear while they are written; lines that begin with `/` are commands."""

from __future__ import annotations

import contextlib
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field

from pipeline.chat.model import ChatModel, Reply, Sampling
from pipeline.data.encoding import Message
from pipeline.errors import UserError

HELP = """\
/retry            answer the last question again, with other random numbers
/compare OTHER    OTHER (a run, a folder, a Hub id) answers too, from the last question on; /compare alone: no longer
/system TEXT      the system prompt from now on; /system alone: none
/new              begin a new conversation
/quit             or Ctrl-D. Ctrl-C ends an answer that is being written
A line that begins with a space is never a command."""
ENDINGS = {"length": "cut off at its longest: --max-tokens allows more", "interrupted": "interrupted"}


@dataclass
class Terminal:
    """A conversation with a model, and with another one beside it.

    Attributes:
        load: a model from its name, for `/compare`.
        seed: of the next answer; each answer raises it by one.
        messages: the turns so far, without the system prompt. Only the first model's answers become part of them.
    """

    model: ChatModel
    load: Callable[[str], ChatModel]
    sampling: Sampling
    seed: int = 0
    system: str | None = None
    other: ChatModel | None = None
    messages: list[Message] = field(default_factory=list)

    def run(self) -> None:
        """Read lines until `/quit` or the end of the input."""
        _say(f"{self.model.name}; /help lists the commands")
        while (line := _read_line()) is not None:
            try:
                if line.strip() == "/quit":
                    return
                if line.startswith("/"):
                    self._obey(*line[1:].strip().partition(" ")[::2])
                elif line.strip():
                    self.ask(line.strip())
            except UserError as error:
                _say(f"error: {error}")

    def ask(self, question: str) -> None:
        """Answer a question and go on from the first model's answer; a question that cannot be answered is forgotten."""
        self.messages.append({"role": "user", "content": question})
        try:
            answer = self._answer(self.model)
            if self.other is not None:
                self._answer(self.other)
        except UserError:
            self.messages.pop()
            raise
        if answer.strip():
            self.messages.append({"role": "assistant", "content": answer})
        else:
            _say("(an empty answer: it is not part of the conversation)")
            self.messages.pop()

    def _obey(self, command: str, argument: str) -> None:
        if command == "retry":
            self._retry()
        elif command == "compare":
            self._compare(argument.strip())
        elif command == "system":
            self.system = argument.strip() or None
            _say("(the system prompt is set)" if self.system else "(no system prompt)")
        elif command == "new":
            self.messages.clear()
            _say("(a new conversation)")
        elif command == "help":
            _say(HELP)
        else:
            raise UserError(f"there is no command /{command}; /help lists them, and a space before it makes it text")

    def _last_question(self) -> int:
        """Where the last question stands in `messages`."""
        if not self.messages:
            raise UserError("nothing was asked yet")
        return max(i for i, message in enumerate(self.messages) if message["role"] == "user")

    def _retry(self) -> None:
        question = self._last_question()
        before = list(self.messages)
        self.messages = self.messages[:question]
        try:
            self.ask(before[question]["content"])
        except UserError:
            self.messages = before
            raise

    def _compare(self, name: str) -> None:
        if not name:
            self.other = None
            _say("(one model answers)")
            return
        self.other = self.load(name)
        if self.messages:
            self._answer(self.other, self.messages[: self._last_question() + 1])

    def _answer(self, model: ChatModel, messages: list[Message] | None = None) -> str:
        """Write a model's answer to the terminal; returns its text."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        reply = Reply(model, [*system, *(self.messages if messages is None else messages)], self.sampling, self.seed)
        self.seed += 1
        if self.other is not None:
            _say(f"— {model.name}:")
        write(reply)
        return reply.text


def answer_once(models: list[ChatModel], messages: list[Message], sampling: Sampling, seed: int) -> None:
    """The answer of each model to one dialogue, with its name before it where there are several."""
    for model in models:
        if len(models) > 1:
            print(f"— {model.name}:")
        write(Reply(model, messages, sampling, seed))


def write(reply: Reply) -> None:
    """Print an answer while it is written. Ctrl-C ends it on a terminal."""
    try:
        with contextlib.closing(iter(reply)) as pieces:
            for piece in pieces:
                print(printable(piece), end="", flush=True)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        reply.ended = "interrupted"
    print(flush=True)
    if reply.ended in ENDINGS:
        _say(f"({ENDINGS[reply.ended]})")


def printable(text: str) -> str:
    """Text for a terminal: control characters, which could steer it, as their code points."""
    steering = {char for char in text if unicodedata.category(char) in ("Cc", "Cf") and char not in "\n\t\u200d"}
    for char in steering:
        text = text.replace(char, f"<U+{ord(char):04X}>")
    return text


def _read_line() -> str | None:
    """A line of the user's; None at the end of the input."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  input() edits lines and remembers them
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None
    except KeyboardInterrupt:
        print()
        return ""
    except UnicodeDecodeError as error:
        raise UserError(f"the input is not UTF-8 ({error.reason})") from error


def _say(text: str) -> None:
    """What is not the model's goes to standard error."""
    print(text, file=sys.stderr, flush=True)

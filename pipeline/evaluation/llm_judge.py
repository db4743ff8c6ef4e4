"""A language model as judge of pairs of answers: a local model, or one at an OpenAI-compatible address.

Each pair is asked in both orders. If swapping the order changes the verdict, the pair counts as a tie. A question that
fails is asked again, then listed; a reply without a clear verdict is a failed question. Neither is ever a loss.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline.errors import UserError
from pipeline.evaluation.preference import Interval, bootstrap_interval, length_controlled
from pipeline.models.loading import load_causal_lm
from pipeline.models.precision import accelerator_type
from pipeline.models.tokenizers import assign_template, load_tokenizer

import httpx
import numpy as np

KEY = "RLHF_JUDGE_API_KEY"  # environment variables; keys are read from nowhere else and written nowhere
KEYS = (KEY, "OPENAI_API_KEY")
LOCAL = ("localhost", "127.0.0.1", "::1")
TRIES, PAUSE, AT_ONCE = 3, 2.0, 8
READ_TIMEOUT, REPLY_SECONDS, REPLY_BYTES = 60.0, 180.0, 2**20  # of one read; of a whole reply
REPLY_TOKENS = 512
OF_THE_QUESTION = (400, 413, 422)  # statuses; asking the same again changes nothing, asking something else may
OF_THE_SERVER = (301, 302, 303, 307, 308, 401, 403, 404)  # statuses; asking anything again changes nothing
QUESTION = """You compare two answers to the same request. Judge which one serves the person better: it does what was asked, is \
correct, honest and harmless, and says no more than it needs. Length alone is no merit, nor is the order in which they stand.

Request:
{prompt}

Answer A:
{first}

Answer B:
{second}

Which answer is better? Reply with one letter, A or B. If you must explain, end with a line "Verdict: A" or "Verdict: B"."""

Choice = str | Exception
"""“A”, “B”, or why there is no verdict."""


class NoServer(UserError):
    """No question is answered there."""


@dataclass(frozen=True)
class Judge:
    """label: its name in the report. choose: a choice for each question."""

    label: str
    choose: Callable[[Sequence[str]], list[Choice]]


@dataclass(frozen=True)
class PairVerdicts:
    """Win rate of a candidate's answers over a baseline's by a language model.

    win_rate, ci95, length_controlled: as a score's win rates; None without any judged prompt.
    ties: share of prompts whose verdict changes with the order. first_chosen: share of questions won by the answer that
    stands first, a half if order does not matter. failed: [{"row", "why"}].
    """

    prompts: int
    failed: list[dict[str, Any]]
    win_rate: float | None = None
    ci95: Interval | None = None
    length_controlled: float | None = None
    ties: float | None = None
    first_chosen: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ci95": list(self.ci95) if self.ci95 else None}


def judge_from(where: str, model: str | None = None) -> Judge:
    """A judge at an address (`http…`, which needs the model's name there) or in a folder.

    Raises:
        UserError: an address without a model, with a key in it, or to which the key would go unencrypted; no such model.
    """
    if not where.startswith(("http://", "https://")):
        return Judge(f"llm:{Path(where).name}", LocalJudge(where))
    parts = urlsplit(where)
    if parts.username or parts.password or parts.query:
        raise UserError(f"--llm-judge: no keys in an address, it would be seen by others; put it into {KEY}")
    if not model:
        raise UserError("--llm-judge at an address needs --llm-judge-model, the model's name there")
    return Judge(f"llm:{model}", RemoteJudge(where, model))


def _api_key(address: str) -> str | None:
    """The key for an address, from the environment.

    Raises:
        UserError: the key is no header value, or would travel unencrypted.
    """
    name = next((name for name in KEYS if os.environ.get(name, "").strip()), None)
    if name is None:
        return None
    key = os.environ[name].strip()
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise UserError(f"{name} holds characters that no API key has (spaces, or letters outside ASCII); set it again")
    parts = urlsplit(address)
    if parts.scheme != "https" and parts.hostname not in LOCAL:
        raise UserError(
            f"--llm-judge: {name} is set and would go unencrypted to {parts.hostname}; use https, or unset {name}"
        )
    return key


class RemoteJudge:
    """Asks a server (vLLM, llama.cpp, a company's) several questions at once.

    By plain HTTP: the Hub's client refuses every address under HF_HUB_OFFLINE, a server in the same rack too. Redirects
    are not followed and, on this machine, proxies not used: the key goes to the given address alone.
    """

    def __init__(self, address: str, model: str, pause: float = PAUSE):
        self.address = address.rstrip("/") + "/chat/completions"
        key = _api_key(address)
        self.headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self.local = urlsplit(address).hostname in LOCAL
        self.model, self.pause = model, pause

    def __call__(self, questions: Sequence[str]) -> list[Choice]:
        client = httpx.Client(
            timeout=READ_TIMEOUT, headers=self.headers, follow_redirects=False, trust_env=not self.local
        )
        with client:
            first = [self._ask(client, question) for question in questions[:1]]
            if first and isinstance(first[0], NoServer):
                return first * len(questions)  # do not wait for each question in turn
            with ThreadPoolExecutor(AT_ONCE) as pool:
                return [*first, *pool.map(lambda question: self._ask(client, question), questions[1:])]

    def _ask(self, client: httpx.Client, question: str) -> Choice:
        failure: Exception = UserError("not asked")
        for number in range(TRIES):
            if number:
                time.sleep(self.pause * 2 ** (number - 1))
            try:
                return choice_in(self._reply(client, question))
            except httpx.HTTPStatusError as error:
                status = error.response.status_code
                kind = UserError if status in OF_THE_QUESTION else NoServer
                failure = kind(f"the server says {status}")
                if status in (*OF_THE_QUESTION, *OF_THE_SERVER):
                    return failure
            except httpx.HTTPError as error:
                failure = NoServer(type(error).__name__)  # its text may hold the address
            except UserError as error:
                failure = error
            except (LookupError, TypeError, ValueError, RecursionError):
                failure = UserError("the reply is no chat completion")
        return failure

    def _reply(self, client: httpx.Client, question: str) -> str:
        """The text of a reply.

        Raises:
            UserError: too long, too slow, or no text.
        """
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": REPLY_TOKENS,
            "temperature": 0.0,
        }
        deadline = time.monotonic() + REPLY_SECONDS
        received = bytearray()
        with client.stream("POST", self.address, json=body) as response:
            response.raise_for_status()
            for chunk in response.iter_raw():
                received += chunk
                if len(received) > REPLY_BYTES:
                    raise UserError(f"the reply is longer than {REPLY_BYTES // 2**20} MiB")
                if time.monotonic() > deadline:
                    raise UserError(f"the reply took longer than {REPLY_SECONDS:.0f} s")
        content = json.loads(received)["choices"][0]["message"]["content"]
        if content is not None and not isinstance(content, str):
            raise UserError("the reply is no chat completion")
        return content or ""


_LETTER = r"[\W_]*([AB])[\W_]*"
_VERDICTS = (
    re.compile(rf"{_LETTER}$"),  # a line that is the letter alone
    re.compile(
        rf"[\W_]*(?:(?:the|my|final|better|best)\s+)*(?:verdict|answer|choice|winner)[\W_]*(?:is\b)?{_LETTER}$",
        re.IGNORECASE,
    ),
    re.compile(r'.*"(?:verdict|answer|choice|winner|better)"\s*:\s*"([AB])".*$', re.IGNORECASE),
)


def choice_in(reply: str) -> str:
    """The letter that a reply gives as its verdict: on a line of its own, as “Verdict: A” (or “Answer B”), or in JSON.

    Letters inside sentences are no verdict: “A good answer is B.” might mean anything.

    Raises:
        UserError: it gives no verdict, or both.
    """
    verdicts = set()
    for line in reply.splitlines():
        match = next((match for pattern in _VERDICTS if (match := pattern.match(line.strip()))), None)
        if match:
            verdicts.add(match[1].upper())
    if len(verdicts) != 1:
        raise UserError(f"replied {reply[:40]!r}, neither A nor B")
    return verdicts.pop()


class LocalJudge:
    """A causal LM of a folder or the Hub. Its verdict is the more likely of the two letters, so no reply is unclear."""

    def __init__(self, path: str, rows: int = 8):
        self.tokenizer: Any = load_tokenizer(path)
        assign_template(self.tokenizer)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token  # masked, so any token does
        self.model: Any = load_causal_lm(path).eval()
        self.model.to(accelerator_type())
        self.rows = rows
        self.letters = [self.tokenizer(letter, add_special_tokens=False)["input_ids"][-1] for letter in "AB"]
        if self.letters[0] == self.letters[1]:
            raise UserError(f"--llm-judge: {path!r} has no tokens for the letters A and B")

    def __call__(self, questions: Sequence[str]) -> list[Choice]:
        ids: list[list[int]] = [
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
            )
            for question in questions
        ]
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 2**30
        choices: list[Choice] = [UserError(f"{len(row)} tokens exceed the judge's context of {limit}") for row in ids]
        fitting = sorted((i for i, row in enumerate(ids) if len(row) < limit), key=lambda i: len(ids[i]))
        for start in range(0, len(fitting), self.rows):
            part = fitting[start : start + self.rows]
            for i, letter in zip(part, self._letters([ids[i] for i in part]), strict=True):
                choices[i] = letter
        return choices

    def _letters(self, rows: list[list[int]]) -> list[str]:
        """The more likely letter after each row, by `generate` with one token that must be a letter."""
        batch = self.tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt").to(self.model.device)
        generated = self.model.generate(
            **batch,
            max_new_tokens=1,
            do_sample=False,
            num_beams=1,
            prefix_allowed_tokens_fn=lambda *_: self.letters,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        return ["A" if token == self.letters[0] else "B" for token in generated[:, -1].tolist()]


def compare_answers(
    judge: Judge, prompts: Sequence[str], candidate: Sequence[str], baseline: Sequence[str], longer: Sequence[int]
) -> PairVerdicts:
    """Win rate of the candidate's answers over the baseline's.

    Args:
        prompts: whole dialogues as text.
        longer: (prompts,) tokens of the candidate's answer minus the baseline's.
    """
    orders = [
        judge.choose([QUESTION.format(prompt=p, first=a, second=b) for p, a, b in zip(prompts, *answers, strict=True)])
        for answers in ((candidate, baseline), (baseline, candidate))
    ]
    failed, wins, judged, first = [], [], [], 0
    for row, (forward, backward) in enumerate(zip(*orders, strict=True)):
        failure = next((choice for choice in (forward, backward) if isinstance(choice, Exception)), None)
        if failure is not None:
            failed.append({"row": row, "why": str(failure)})
            continue
        wins.append(((forward == "A") + (backward == "B")) / 2)
        first += (forward == "A") + (backward == "A")
        judged.append(row)
    if not wins:
        return PairVerdicts(0, failed)
    scores = np.array(wins)
    return PairVerdicts(
        prompts=len(wins),
        failed=failed,
        win_rate=float(scores.mean()),
        ci95=bootstrap_interval(scores),
        length_controlled=length_controlled(scores, np.array([longer[row] for row in judged], float)),
        ties=float((scores == 0.5).mean()),
        first_chosen=first / (2 * len(wins)),
    )

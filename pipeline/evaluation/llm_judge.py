"""A language model as judge of pairs of answers: a local model, or one behind an OpenAI-compatible address.

Each pair is asked in both orders. A judge that names another answer when the order turns has no opinion: a tie. A question
that fails is asked again, then listed; it is never a loss.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline.errors import UserError
from pipeline.evaluation.preference import bootstrap_interval, length_controlled
from pipeline.models.loading import load_causal_lm
from pipeline.models.tokenizers import assign_template, load_tokenizer

import httpx
import numpy as np
import torch

KEY = "RLHF_JUDGE_API_KEY"  # environment variables; keys are read from nowhere else and written nowhere
KEYS = (KEY, "OPENAI_API_KEY")
TRIES, PAUSE, TIMEOUT, AT_ONCE = 3, 2.0, 60.0, 8
QUESTION = """You compare two answers to the same request. Judge which one serves the person better: it does what was asked, is \
correct, honest and harmless, and says no more than it needs. Length alone is no merit, nor is the order in which they stand.

Request:
{prompt}

Answer A:
{first}

Answer B:
{second}

Which answer is better? Reply with one letter, A or B."""

Choice = str | Exception
"""“A”, “B”, or why neither was said."""


@dataclass(frozen=True)
class Judge:
    """label: its name in figures. choose: a choice for each question."""

    label: str
    choose: Callable[[Sequence[str]], list[Choice]]


def judge_from(where: str, model: str | None = None) -> Judge:
    """A judge at an address (`http…`, which needs the model's name there) or in a folder.

    Raises:
        UserError: an address without a model, an address with a key in it, no such model.
    """
    if not where.startswith(("http://", "https://")):
        return Judge(f"llm:{Path(where).name}", LocalJudge(where))
    parts = urlsplit(where)
    if parts.username or parts.password or parts.query:
        raise UserError(f"--llm-judge: no keys in an address, it would be seen by others; put it into {KEY}")
    if not model:
        raise UserError("--llm-judge at an address needs --llm-judge-model, the model's name there")
    return Judge(f"llm:{model}", RemoteJudge(where, model))


class RemoteJudge:
    """Asks a server (vLLM, llama.cpp, a company's) several questions at once.

    By plain HTTP: the Hub's client refuses every address under HF_HUB_OFFLINE, a server in the same rack too.
    """

    def __init__(self, address: str, model: str, pause: float = PAUSE):
        self.address = address.rstrip("/") + "/chat/completions"
        key = next((os.environ[name] for name in KEYS if os.environ.get(name)), None)
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.model, self.pause = model, pause

    def __call__(self, questions: Sequence[str]) -> list[Choice]:
        with httpx.Client(timeout=TIMEOUT, headers=self.headers) as client:
            first = [self._ask(client, question) for question in questions[:1]]
            if first and isinstance(first[0], Exception):
                return first * len(questions)  # nobody answers there: do not wait for each question in turn
            with ThreadPoolExecutor(AT_ONCE) as pool:
                return [*first, *pool.map(lambda question: self._ask(client, question), questions[1:])]

    def _ask(self, client: httpx.Client, question: str) -> Choice:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": 8,
            "temperature": 0.0,
        }
        found: Exception = UserError("not asked")
        for number in range(TRIES):
            if number:
                time.sleep(self.pause * 2 ** (number - 1))
            try:
                reply = client.post(self.address, json=body)
                reply.raise_for_status()
                return choice_in(reply.json()["choices"][0]["message"]["content"] or "")
            except httpx.HTTPStatusError as error:
                status = error.response.status_code
                found = UserError(f"the server says {status}")
                if status in (400, 401, 403, 404, 413, 422):  # asking again changes nothing
                    return found
            except httpx.HTTPError as error:
                found = UserError(type(error).__name__)  # its text may hold the address
            except UserError as error:
                found = error
            except (IndexError, KeyError, TypeError, ValueError):
                found = UserError("the reply is no chat completion")
        return found


def choice_in(reply: str) -> str:
    """The letter that a reply says: alone, or as its first word.

    Raises:
        UserError: it says neither, or both.
    """
    words = [word.strip(".,:;!*\"'()[]`") for word in reply.replace("\n", " ").split()]
    named = {word for word in words if word in ("A", "B")}
    if len(named) == 1:
        return named.pop()
    if words and words[0] in ("A", "B"):
        return words[0]
    raise UserError(f"replied {reply[:40]!r}, neither A nor B")


class LocalJudge:
    """A causal LM of a folder or the Hub; says the letter that it holds more likely, so every reply is one."""

    def __init__(self, path: str, rows: int = 8):
        self.tokenizer: Any = load_tokenizer(path)
        assign_template(self.tokenizer)
        self.model: Any = load_causal_lm(path).eval()
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.rows = rows
        self.letters = [self.tokenizer(letter, add_special_tokens=False)["input_ids"][-1] for letter in "AB"]
        if self.letters[0] == self.letters[1]:
            raise UserError(f"--llm-judge: {path!r} has no tokens for the letters A and B")

    @torch.no_grad()
    def __call__(self, questions: Sequence[str]) -> list[Choice]:
        ids: list[list[int]] = [
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
            )
            for question in questions
        ]
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 2**30
        found: list[Choice] = [UserError(f"{len(row)} tokens exceed the judge's context of {limit}") for row in ids]
        order = sorted((i for i, row in enumerate(ids) if len(row) <= limit), key=lambda i: len(ids[i]))
        for start in range(0, len(order), self.rows):
            part = order[start : start + self.rows]
            longest = max(len(ids[i]) for i in part)
            padded = torch.tensor([[0] * (longest - len(ids[i])) + ids[i] for i in part], device=self.model.device)
            mask = torch.tensor([[0] * (longest - len(ids[i])) + [1] * len(ids[i]) for i in part]).to(padded.device)
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            logits = self.model(
                input_ids=padded, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=1
            ).logits[:, -1, self.letters]
            for i, letter in zip(part, logits.argmax(-1).tolist(), strict=True):
                found[i] = "AB"[letter]
        return found


def compare_answers(
    judge: Judge, prompts: Sequence[str], candidate: Sequence[str], baseline: Sequence[str], longer: Sequence[int]
) -> dict[str, Any]:
    """Win rate of the candidate's answers over the baseline's.

    Args:
        longer: tokens of the candidate's answer minus the baseline's, one a prompt.

    Returns:
        win_rate, ci95, length_controlled and prompts, as a score's win rates have them (without any judged prompt, no
        rate); ties: share of prompts on which the orders disagree; first_chosen: share of questions that the answer
        which stands first won (a half, were order no matter); failed: [{"row", "why"}].
    """
    orders = [
        judge.choose([QUESTION.format(prompt=p, first=a, second=b) for p, a, b in zip(prompts, *answers, strict=True)])
        for answers in ((candidate, baseline), (baseline, candidate))
    ]
    failed, wins, kept, first = [], [], [], 0
    for row, (forward, backward) in enumerate(zip(*orders, strict=True)):
        wrong = next((choice for choice in (forward, backward) if isinstance(choice, Exception)), None)
        if wrong is not None:
            failed.append({"row": row, "why": str(wrong)})
            continue
        won = [forward == "A", backward == "B"]
        wins.append(sum(won) / 2)
        first += (forward == "A") + (backward == "A")
        kept.append(row)
    result: dict[str, Any] = {"prompts": len(wins), "failed": failed}
    if not wins:
        return result
    scores = np.array(wins)
    return {
        **result,
        "win_rate": float(scores.mean()),
        "ci95": list(bootstrap_interval(scores)),
        "length_controlled": length_controlled(scores, np.array([longer[row] for row in kept], float)),
        "ties": float((scores == 0.5).mean()),
        "first_chosen": first / (2 * len(wins)),
    }

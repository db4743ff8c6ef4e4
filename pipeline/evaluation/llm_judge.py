"""A language model as judge of pairs of answers: a local model, or one at an OpenAI-compatible address.

Each pair is asked in both orders. If swapping the order changes the verdict, the pair counts as a tie. A question that
fails is asked again, then listed; a reply without a clear verdict is a failed question. Neither is ever a loss.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.evaluation.chat_server import ChatServer, check_address
from pipeline.evaluation.intervals import Interval, bootstrap_interval, length_controlled
from pipeline.models.loading import load_causal_lm
from pipeline.models.precision import accelerator_type
from pipeline.models.tokenizers import assign_template, load_tokenizer

import numpy as np

REPLY_TOKENS = 512
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
    check_address(where, "--llm-judge")
    if not model:
        raise UserError("--llm-judge at an address needs --llm-judge-model, the model's name there")
    return Judge(f"llm:{model}", RemoteJudge(where, model))


class RemoteJudge(ChatServer):
    """Asks a server for its verdicts."""

    def __call__(self, questions: Sequence[str]) -> list[Choice]:
        settings = {"max_tokens": REPLY_TOKENS, "temperature": 0.0}
        return self.ask([{"messages": [{"role": "user", "content": q}], **settings} for q in questions], choice_in)


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

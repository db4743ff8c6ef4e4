"""What a file of comparisons holds, before anything is trained on it: one pass, in bounded memory.

Counts are exact. Token lengths and near-duplicates come from seeded samples, whose sizes are reported; agreement comes
from a sample of the prompts where a file has more judged pairs than `labeler_agreement.MAX_PAIRS`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from pipeline.data.comparisons import RankingValidator, digest, reason_kind
from pipeline.data.labeler_agreement import LabelerAgreement
from pipeline.data.messages import Message
from pipeline.data.near_duplicates import SIMILARITY, near_pairs, normalized
from pipeline.data.records import Record
from pipeline.data.splits import is_held_out

import numpy as np

TOKEN_SAMPLE = 2_000
PROMPT_SAMPLE = 10_000
LISTED = 5
CountTokens = Callable[[Sequence[Message], Sequence[str]], tuple[int, list[int]]]


class Reservoir:
    """A uniform sample of a stream of unknown length (Vitter's algorithm R), seeded."""

    def __init__(self, size: int, seed: int):
        self.size, self.seen = size, 0
        self.items: list[Any] = []
        self._random = random.Random(seed)

    def add(self, item: Any) -> None:
        self.seen += 1
        if len(self.items) < self.size:
            self.items.append(item)
        elif (slot := int(self._random.random() * self.seen)) < self.size:
            self.items[slot] = item


@dataclass
class LengthPreference:
    """Strict pairs by which response is longer, the preferred one or the other."""

    preferred: int = 0
    other: int = 0

    def add(self, preferred: int, other: int) -> None:
        self.preferred += preferred > other
        self.other += preferred < other

    @property
    def pairs(self) -> int:
        return self.preferred + self.other

    @property
    def share(self) -> float | None:
        """How often the longer response is preferred."""
        return self.preferred / self.pairs if self.pairs else None


class ComparisonStatistics:
    """Counts over rankings (a comparison is one of two), fed one record at a time.

    Args:
        ties: what the recipe would do with ties; "drop" counts rankings that are all tied as untrainable.
        held_out_fraction: of the hash split that near-duplicates are looked for across.
        remember_prompts: keep what `against` needs of every prompt.
    """

    def __init__(
        self, ties: str = "drop", held_out_fraction: float = 0.1, seed: int = 0, remember_prompts: bool = False
    ):
        self.held_out_fraction, self.seed = held_out_fraction, seed
        self.rows = self.trainable = self.pairs = self.tied_pairs = self.tied_rankings = 0
        self.multi_turn = self.held_out = self.prompt_characters = self.response_characters = 0
        self.labelers: Counter[str] = Counter()
        self.sizes: Counter[int] = Counter()
        self.best_at: Counter[int] = Counter()
        self.best_expected: dict[int, float] = {}  # by chance
        self.problems: dict[str, list[int]] = {}
        self.confidence: list[float] = []
        self.longer = LengthPreference()
        self.agreement = LabelerAgreement()
        self._validator = RankingValidator(ties)
        self._prompts: set[bytes] = set()
        self._lines_by_prompt: dict[bytes, int] | None = {} if remember_prompts else None
        self._token_sample = Reservoir(TOKEN_SAMPLE, seed)
        self._prompt_sample = Reservoir(PROMPT_SAMPLE, seed)  # (line, held out, text)

    def add(self, record: Record) -> None:
        self.rows += 1
        self.labelers[record.get("labeler", "")] += 1
        self.sizes[len(record["responses"])] += 1
        self.multi_turn += len(record["prompt"]) > 1
        if "confidence" in record:
            self.confidence.append(record["confidence"])
        if reason := self._validator.problem(record):
            self.problems.setdefault(reason_kind(reason), []).append(record["line"])
        else:
            self.trainable += 1
        self._count_pairs(record["responses"], record["ranks"])
        if "ranks" in record["row"]:  # the position of `chosen` in a pair of columns says nothing
            self._count_positions(record["ranks"])
        self._sample(record)
        if "labeler" in record and len(record["responses"]) > 1:
            self.agreement.add(digest(repr(record["prompt"])), record["labeler"], record["responses"], record["ranks"])

    def _count_pairs(self, responses: list[str], ranks: list[int]) -> None:
        self.response_characters += sum(map(len, responses))
        tied = 0
        for i, j in combinations(range(len(responses)), 2):
            if ranks[i] == ranks[j]:
                tied += 1
            else:
                better, worse = (i, j) if ranks[i] < ranks[j] else (j, i)
                self.longer.add(len(responses[better]), len(responses[worse]))
        self.pairs += len(responses) * (len(responses) - 1) // 2
        self.tied_pairs += tied
        self.tied_rankings += tied > 0

    def _count_positions(self, ranks: list[int]) -> None:
        if ranks.count(min(ranks)) == 1:
            self.best_at[ranks.index(min(ranks))] += 1
            for position in range(len(ranks)):
                self.best_expected[position] = self.best_expected.get(position, 0.0) + 1 / len(ranks)

    def _sample(self, record: Record) -> None:
        text = prompt_text(record["prompt"])
        self.prompt_characters += len(text)
        key = digest(repr(record["prompt"]))
        held_out = is_held_out(record, self.held_out_fraction)
        self.held_out += held_out
        if key not in self._prompts:
            self._prompts.add(key)
            self._prompt_sample.add((record["line"], held_out, text))
            if self._lines_by_prompt is not None:
                self._lines_by_prompt.setdefault(digest(normalized(text)), record["line"])
        self._token_sample.add((record["prompt"], record["responses"], record["ranks"]))

    def result(self, count_tokens: CountTokens | None = None) -> dict[str, Any]:
        """Everything counted, as plain data.

        Args:
            count_tokens: (prompt, responses) to their token counts.
        """
        responses = sum(size * count for size, count in self.sizes.items())
        statistics: dict[str, Any] = {
            "rows": self.rows,
            "trainable": self.trainable,
            "prompts": len(self._prompts),
            "multi_turn": self.multi_turn,
            "labelers": {name: count for name, count in self.labelers.most_common() if name},
            "unnamed_labeler_rows": self.labelers[""],
            "responses_per_row": {str(size): count for size, count in sorted(self.sizes.items())},
            "pairs": self.pairs,
            "tied_pairs": self.tied_pairs,
            "rows_with_ties": self.tied_rankings,
            "problems": {
                reason: {"rows": len(lines), "lines": lines[:20]} for reason, lines in sorted(self.problems.items())
            },
            "held_out_rows": self.held_out,
            "mean_characters": {
                "prompt": self.prompt_characters / max(self.rows, 1),
                "response": self.response_characters / max(responses, 1),
            },
            "longer_wins": {"share": self.longer.share, "pairs": self.longer.pairs},
            "best_position": self._best_position(),
            "agreement": self.agreement.result(),
            "near_duplicates": self._near_duplicates(),
        }
        if self.confidence:
            statistics["confidence"] = self._confidence()
        if count_tokens is not None:
            statistics["tokens"] = self._tokens(count_tokens)
        return statistics

    def _best_position(self) -> dict[str, Any]:
        return {
            str(position + 1): {"rows": self.best_at[position], "expected": round(expected, 1)}
            for position, expected in sorted(self.best_expected.items())
        }

    def _confidence(self) -> dict[str, Any]:
        lowest, median, highest = map(float, np.percentile(self.confidence, [0, 50, 100]))
        return {"rows": len(self.confidence), "lowest": lowest, "median": median, "highest": highest}

    def _tokens(self, count_tokens: CountTokens) -> dict[str, Any]:
        prompts, answers, whole = [], [], []
        longer = LengthPreference()
        for prompt, responses, ranks in self._token_sample.items:
            length, lengths = count_tokens(prompt, responses)
            prompts.append(length)
            answers += lengths
            whole.append(length + max(lengths))
            for i, j in combinations(range(len(ranks)), 2):
                if ranks[i] != ranks[j]:
                    better, worse = (i, j) if ranks[i] < ranks[j] else (j, i)
                    longer.add(lengths[better], lengths[worse])
        return {
            "sampled_rows": len(whole),
            "prompt": _percentiles(prompts),
            "response": _percentiles(answers),
            "prompt_and_longest_response": _percentiles(whole),
            "longer_wins": longer.share,
        }

    def _near_duplicates(self) -> dict[str, Any]:
        sample = sorted(self._prompt_sample.items)
        near = near_pairs([text for _, _, text in sample])
        across = [(sample[i][0], sample[j][0]) for i, j in near if sample[i][1] != sample[j][1]]
        return {
            "sampled_prompts": len(sample),
            "similarity": SIMILARITY,
            "pairs": len(near),
            "across_splits": len(across),
            "lines": [list(pair) for pair in across[:LISTED]],
        }

    def against(self, name: str, prompts: Iterable[tuple[int, str]]) -> dict[str, Any]:
        """How many prompts of another file stand in this one, to the letter or nearly.

        Args:
            prompts: (line, text) of the other file's prompts.
        """
        ours = [(line, text) for line, _, text in sorted(self._prompt_sample.items)]
        assert self._lines_by_prompt is not None, "remember_prompts"
        sample = Reservoir(PROMPT_SAMPLE, self.seed)
        rows = 0
        exact: list[tuple[int, int]] = []
        for line, text in prompts:
            rows += 1
            twin = self._lines_by_prompt.get(digest(normalized(text)))
            if twin is not None:
                exact.append((twin, line))
            sample.add((line, text))
        theirs = sorted(sample.items)
        near = near_pairs([text for _, text in ours], [text for _, text in theirs])
        return {
            "file": name,
            "rows": rows,
            "sampled_prompts": len(ours),
            "sampled_rows": len(theirs),
            "same_prompt": len(exact),
            "near": len(near),
            "lines": [list(pair) for pair in exact[:LISTED]] or [[ours[i][0], theirs[j][0]] for i, j in near[:LISTED]],
        }


def prompt_text(prompt: Sequence[Message]) -> str:
    """All turns of a prompt as one text."""
    return "\n".join(message["content"] for message in prompt)


def _percentiles(values: Sequence[int]) -> dict[str, float]:
    median, p95, longest = map(float, np.percentile(values, [50, 95, 100]))
    return {"median": median, "p95": p95, "longest": longest}

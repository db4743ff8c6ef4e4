"""What a file of comparisons holds, before anything is trained on it: one pass, in bounded memory.

Counts are exact. Token lengths and near-duplicates come from seeded samples, whose sizes are reported; agreement comes
from a sample of the prompts where a file has more judged pairs than `MAX_UNITS`.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from typing import Any

from pipeline.data.comparisons import RankingValidator, digest, reason_kind
from pipeline.data.records import Record
from pipeline.data.splits import is_held_out

import numpy as np

TOKEN_SAMPLE = 2_000
PROMPT_SAMPLE = 10_000
MAX_UNITS = 1_000_000
NEAR = 0.8  # Jaccard similarity of word trigrams from which two prompts count as near-duplicates
LISTED = 5


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
        self._normal: dict[bytes, int] | None = {} if remember_prompts else None
        self._sieve = RankingValidator(ties)
        self.rows = self.trainable = self.pairs = self.tied_pairs = self.tied_rankings = 0
        self.multi_turn = self.held_out = 0
        self.labelers: Counter[str] = Counter()
        self.sizes: Counter[int] = Counter()
        self.best_at: Counter[int] = Counter()
        self.best_expected: dict[int, float] = {}
        self.problems: dict[str, list[int]] = {}
        self.confidence: list[float] = []
        self.longer = [0, 0, 0]  # the preferred response is longer, shorter, as long
        self.characters = [0, 0, 0]  # of prompts, of responses; responses counted
        self._prompts: set[bytes] = set()
        self._units: dict[bytes, bytes] = {}
        self._unit_share = 1.0
        self._labeler_index: dict[str, int] = {}
        self._records = Reservoir(TOKEN_SAMPLE, seed)
        self._openings = Reservoir(PROMPT_SAMPLE, seed)

    def add(self, record: Record) -> None:
        prompt, responses, ranks = record["prompt"], record["responses"], record["ranks"]
        labeler = record.get("labeler")
        self.rows += 1
        self.labelers[labeler if labeler is not None else ""] += 1
        self.sizes[len(responses)] += 1
        self.multi_turn += len(prompt) > 1
        if "confidence" in record:
            self.confidence.append(record["confidence"])
        if reason := self._sieve.problem(record):
            self.problems.setdefault(reason_kind(reason), []).append(record["line"])
        else:
            self.trainable += 1
        self._count_pairs(record, responses, ranks)

        key = digest(repr(prompt))
        held_out = is_held_out(record, self.held_out_fraction)
        self.held_out += held_out
        if key not in self._prompts:
            self._prompts.add(key)
            self._openings.add((record["line"], held_out, prompt_text(prompt)))
            if self._normal is not None:
                self._normal.setdefault(digest(normal(prompt_text(prompt))), record["line"])
        self._records.add((prompt, responses, ranks))
        if labeler is not None and len(responses) > 1:
            self._judge(key, labeler, responses, ranks)

    def _count_pairs(self, record: Record, responses: list[str], ranks: list[int]) -> None:
        size = len(responses)
        self.characters[0] += len(prompt_text(record["prompt"]))
        self.characters[1] += sum(map(len, responses))
        self.characters[2] += size
        tied = 0
        for i, j in combinations(range(size), 2):
            if ranks[i] == ranks[j]:
                tied += 1
                continue
            better, worse = (i, j) if ranks[i] < ranks[j] else (j, i)
            longer, shorter = len(responses[better]), len(responses[worse])
            self.longer[0 if longer > shorter else 1 if longer < shorter else 2] += 1
        self.pairs += size * (size - 1) // 2
        self.tied_pairs += tied
        self.tied_rankings += tied > 0
        if "ranks" in record["row"]:  # the position of `chosen` in a pair of columns says nothing
            best = min(ranks)
            if ranks.count(best) == 1:
                self.best_at[ranks.index(best)] += 1
                for position in range(size):
                    self.best_expected[position] = self.best_expected.get(position, 0.0) + 1 / size

    def _judge(self, prompt: bytes, labeler: str, responses: list[str], ranks: list[int]) -> None:
        if int.from_bytes(prompt[:8], "big") >= self._unit_share * 2**64:
            return
        index = self._labeler_index.setdefault(labeler, len(self._labeler_index))
        texts = [digest(response) for response in responses]
        for i, j in combinations(range(len(responses)), 2):
            if texts[i] == texts[j]:
                continue
            first, second = (i, j) if texts[i] < texts[j] else (j, i)
            verdict = 2 if ranks[i] == ranks[j] else int(ranks[second] < ranks[first])
            unit = prompt + texts[first] + texts[second]
            unit = prompt[:8] + digest(unit)[:12]
            said = self._units.get(unit, b"")
            who = index.to_bytes(3, "big")
            if all(said[k : k + 3] != who for k in range(0, len(said), 4)):  # a labeler's first word counts
                self._units[unit] = said + who + bytes([verdict])
        while len(self._units) > MAX_UNITS:
            self._unit_share /= 2
            limit = self._unit_share * 2**64
            self._units = {unit: said for unit, said in self._units.items() if int.from_bytes(unit[:8], "big") < limit}

    def result(
        self, count_tokens: Callable[[Sequence[dict[str, str]], Sequence[str]], tuple[int, list[int]]] | None = None
    ) -> dict[str, Any]:
        """Everything counted, as plain data.

        Args:
            count_tokens: (prompt, responses) to their token counts.
        """
        named = {name: count for name, count in self.labelers.most_common() if name}
        decided = self.longer[0] + self.longer[1]
        openings = sorted(self._openings.items)
        found: dict[str, Any] = {
            "rows": self.rows,
            "trainable": self.trainable,
            "prompts": len(self._prompts),
            "multi_turn": self.multi_turn,
            "labelers": named,
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
                "prompt": self.characters[0] / max(self.rows, 1),
                "response": self.characters[1] / max(self.characters[2], 1),
            },
            "longer_wins": {"share": self.longer[0] / decided if decided else None, "pairs": decided},
            "best_position": {
                str(position + 1): {"rows": self.best_at[position], "expected": round(expected, 1)}
                for position, expected in sorted(self.best_expected.items())
            },
            "agreement": self._agreement(),
            "near_duplicates": self._near_duplicates(openings),
        }
        if self.confidence:
            low, mid, high = np.percentile(self.confidence, [0, 50, 100])
            found["confidence"] = {
                "rows": len(self.confidence),
                "lowest": float(low),
                "median": float(mid),
                "highest": float(high),
            }
        if count_tokens is not None:
            found["tokens"] = self._tokens(count_tokens)
        return found

    def _tokens(self, count: Callable[..., tuple[int, list[int]]]) -> dict[str, Any]:
        prompts, answers, whole, longer, decided = [], [], [], 0, 0
        for prompt, responses, ranks in self._records.items:
            length, lengths = count(prompt, responses)
            prompts.append(length)
            answers += lengths
            whole.append(length + max(lengths))
            for i, j in combinations(range(len(ranks)), 2):
                if ranks[i] != ranks[j] and lengths[i] != lengths[j]:
                    decided += 1
                    longer += (lengths[i] > lengths[j]) == (ranks[i] < ranks[j])
        return {
            "sampled_rows": len(whole),
            "prompt": _spread(prompts),
            "response": _spread(answers),
            "prompt_and_longest_response": _spread(whole),
            "longer_wins": longer / decided if decided else None,
        }

    def _agreement(self) -> dict[str, Any] | None:
        """Over pairs of responses that several labelers judged: how often two of them say the same, and alpha."""
        counts = np.array(
            [
                np.bincount(np.frombuffer(said, np.uint8)[3::4], minlength=3)
                for said in self._units.values()
                if len(said) > 4
            ]
        )
        if not len(counts):
            return None
        import krippendorff

        total = counts.sum(1)
        same = (counts * (counts - 1)).sum() / (total * (total - 1)).sum()
        strict = counts[:, :2]
        sure = strict.sum(1)
        decided = int((sure * (sure - 1)).sum())
        same_strict = (strict * (strict - 1)).sum() / decided if decided else None
        varied = (counts.sum(0) > 0).sum() > 1
        # Which of the two stands first is arbitrary, so alpha is taken over both orders: chance is then one half.
        both = np.concatenate([counts, counts[:, [1, 0, 2]]])
        alpha = krippendorff.alpha(value_counts=both, level_of_measurement="nominal") if varied else None
        by_pair = self._agreement_by_pair()
        return {
            "judged_pairs": len(counts),
            "prompt_share": self._unit_share,
            "pairwise": float(same),
            "pairwise_without_ties": None if same_strict is None else float(same_strict),
            "krippendorff_alpha": None if alpha is None else float(alpha),
            "by_labelers": by_pair,
        }

    def _agreement_by_pair(self, most: int = 45) -> list[dict[str, Any]]:
        names = {index: name for name, index in self._labeler_index.items()}
        tally: dict[tuple[int, int], list[int]] = {}
        for said in self._units.values():
            if len(said) > 4:
                words = sorted((int.from_bytes(said[k : k + 3], "big"), said[k + 3]) for k in range(0, len(said), 4))
                for (a, x), (b, y) in combinations(words, 2):
                    row = tally.setdefault((a, b), [0, 0])
                    row[0] += 1
                    row[1] += x == y
        rows = sorted(tally.items(), key=lambda item: -item[1][0])[:most]
        return [
            {"labelers": [names[a], names[b]], "pairs": pairs, "agreement": same / pairs}
            for (a, b), (pairs, same) in rows
        ]

    def _near_duplicates(self, openings: list[tuple[int, bool, str]]) -> dict[str, Any]:
        near = near_pairs([text for _, _, text in openings])
        across = [(openings[i][0], openings[j][0]) for i, j in near if openings[i][1] != openings[j][1]]
        return {
            "sampled_prompts": len(openings),
            "similarity": NEAR,
            "pairs": len(near),
            "across_splits": len(across),
            "lines": [list(pair) for pair in across[:LISTED]],
        }

    def against(self, name: str, prompts: Iterable[tuple[int, str]]) -> dict[str, Any]:
        """How many prompts of another file stand in this one, to the letter or nearly.

        Args:
            prompts: (line, text) of the other file's prompts.
        """
        ours = [(line, text) for line, _, text in sorted(self._openings.items)]
        assert self._normal is not None, "remember_prompts"
        sample = Reservoir(PROMPT_SAMPLE, self.seed)
        rows = 0
        exact: list[tuple[int, int]] = []
        for line, text in prompts:
            rows += 1
            twin = self._normal.get(digest(normal(text)))
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


def prompt_text(prompt: Sequence[dict[str, str]]) -> str:
    """All turns of a prompt as one text."""
    return "\n".join(message["content"] for message in prompt)


def normal(text: str) -> str:
    """A text without the differences that do not make another prompt: case, punctuation and spaces."""
    return " ".join(re.findall(r"\w+", text.lower()))


def shingles(text: str) -> set[str]:
    """Word trigrams of the normal text; all of it where it is shorter."""
    words = normal(text).split()
    return {" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2))}


def near_pairs(texts: Sequence[str], others: Sequence[str] | None = None) -> list[tuple[int, int]]:
    """Pairs (i, j) whose word trigrams overlap by `NEAR` or more: MinHash finds candidates, Jaccard decides.

    Without `others` the pairs lie within `texts`, i < j.
    """
    from datasketch import MinHash, MinHashLSH

    sets = [shingles(text) for text in texts]
    index = MinHashLSH(threshold=NEAR, num_perm=64)
    found: list[tuple[int, int]] = []

    def sketch(items: set[str]) -> Any:
        made = MinHash(num_perm=64, seed=1)
        made.update_batch([item.encode() for item in items])
        return made

    def close(a: set[str], b: set[str]) -> bool:
        return len(a & b) >= NEAR * len(a | b)

    if others is None:
        for j, items in enumerate(sets):
            mark = sketch(items)
            found += [(i, j) for i in sorted(index.query(mark)) if close(sets[i], items)]
            index.insert(j, mark)
        return found
    for i, items in enumerate(sets):
        index.insert(i, sketch(items))
    for j, text in enumerate(others):
        items = shingles(text)
        found += [(i, j) for i in sorted(index.query(sketch(items))) if close(sets[i], items)]
    return found


def _spread(values: Sequence[int]) -> dict[str, float]:
    low, mid, high = np.percentile(values, [50, 95, 100])
    return {"median": float(low), "p95": float(mid), "longest": float(high)}

"""Agreement between labelers: over pairs of responses that several of them judged, in bounded memory."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

from pipeline.data.comparisons import digest

import numpy as np

MAX_PAIRS = 1_000_000  # judged pairs that are remembered; beyond it, those of a share of the prompts
FIRST, SECOND, TIE = 0, 1, 2
_ENTRY = 4  # bytes of a judgement: 3 of the labeler's number, 1 of the verdict


class LabelerAgreement:
    """Remembers who judged which pair how.

    A pair is 20 bytes (its prompt's and its texts' digests), a judgement of it 4. Above `MAX_PAIRS` pairs only those of a
    share of the prompts are kept, all judgements of a kept prompt together.
    """

    def __init__(self) -> None:
        self.prompt_share = 1.0
        self._judgements: dict[bytes, bytes] = {}
        self._labelers: dict[str, int] = {}

    def add(self, prompt: bytes, labeler: str, responses: Sequence[str], ranks: Sequence[int]) -> None:
        """One ranking; `prompt` is its prompt's digest. Of several judgements of a pair a labeler's first one counts."""
        if int.from_bytes(prompt[:8], "big") >= self.prompt_share * 2**64:
            return
        number = self._labelers.setdefault(labeler, len(self._labelers)).to_bytes(3, "big")
        texts = [digest(response) for response in responses]
        for i, j in combinations(range(len(responses)), 2):
            if texts[i] == texts[j]:
                continue
            first, second = (i, j) if texts[i] < texts[j] else (j, i)
            verdict = TIE if ranks[i] == ranks[j] else SECOND if ranks[second] < ranks[first] else FIRST
            pair = prompt[:8] + digest(prompt + texts[first] + texts[second])[:12]
            earlier = self._judgements.get(pair, b"")
            if all(earlier[k : k + 3] != number for k in range(0, len(earlier), _ENTRY)):
                self._judgements[pair] = earlier + number + bytes([verdict])
        self._forget()

    def _forget(self) -> None:
        while len(self._judgements) > MAX_PAIRS:
            self.prompt_share /= 2
            limit = self.prompt_share * 2**64
            self._judgements = {
                pair: judged for pair, judged in self._judgements.items() if int.from_bytes(pair[:8], "big") < limit
            }

    def result(self) -> dict[str, Any] | None:
        """How often two labelers judge a pair alike, and Krippendorff's alpha; None where no pair was judged twice."""
        shared = [judged for judged in self._judgements.values() if len(judged) > _ENTRY]
        if not shared:
            return None
        counts = np.array([np.bincount(np.frombuffer(j, np.uint8)[3::_ENTRY], minlength=3) for j in shared])
        total, decided = counts.sum(1), counts[:, :2].sum(1)
        return {
            "judged_pairs": len(counts),
            "prompt_share": self.prompt_share,
            "pairwise": _share(counts, total),
            "pairwise_without_ties": _share(counts[:, :2], decided),
            "krippendorff_alpha": _alpha(counts),
            "by_labelers": self._by_labelers(shared),
        }

    def _by_labelers(self, shared: Sequence[bytes], most: int = 45) -> list[dict[str, Any]]:
        """Agreement of each two labelers, those with the most pairs first."""
        names = {number: name for name, number in self._labelers.items()}
        tally: dict[tuple[int, int], list[int]] = {}
        for judged in shared:
            entries = sorted(
                (int.from_bytes(judged[k : k + 3], "big"), judged[k + 3]) for k in range(0, len(judged), 4)
            )
            for (a, verdict), (b, other) in combinations(entries, 2):
                row = tally.setdefault((a, b), [0, 0])
                row[0] += 1
                row[1] += verdict == other
        rows = sorted(tally.items(), key=lambda item: -item[1][0])[:most]
        return [
            {"labelers": [names[a], names[b]], "pairs": pairs, "agreement": alike / pairs}
            for (a, b), (pairs, alike) in rows
        ]


def _share(counts: np.ndarray, total: np.ndarray) -> float | None:
    """Pairs of judgements that are alike, among all of them."""
    all_pairs = int((total * (total - 1)).sum())
    return float((counts * (counts - 1)).sum() / all_pairs) if all_pairs else None


def _alpha(counts: np.ndarray) -> float | None:
    """Krippendorff's alpha over both orders of each pair, for which of the two stands first is arbitrary: chance is one half."""
    import krippendorff

    if (counts.sum(0) > 0).sum() < 2:
        return None
    both = np.concatenate([counts, counts[:, [SECOND, FIRST, TIE]]])
    return float(krippendorff.alpha(value_counts=both, level_of_measurement="nominal"))

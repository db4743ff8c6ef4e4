"""Near-duplicate texts: MinHash finds candidates, the Jaccard similarity of their word trigrams decides."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

SIMILARITY = 0.8  # from which two texts count as near-duplicates


def normalized(text: str) -> str:
    """A text without the differences that do not make another prompt: case, punctuation and spaces."""
    return " ".join(re.findall(r"\w+", text.lower()))


def shingles(text: str) -> set[str]:
    """Word trigrams of the normalized text; all of it where it is shorter."""
    words = normalized(text).split()
    return {" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2))}


def near_pairs(texts: Sequence[str], others: Sequence[str] | None = None) -> list[tuple[int, int]]:
    """Pairs (i, j) of near-duplicates, j of `others`; without `others` both lie within `texts`, i < j."""
    from datasketch import MinHashLSH

    sets = [shingles(text) for text in texts]
    index = MinHashLSH(threshold=SIMILARITY, num_perm=64)
    if others is not None:
        for i, items in enumerate(sets):
            index.insert(i, _sketch(items))
        other_sets = [shingles(text) for text in others]
        return [(i, j) for j, items in enumerate(other_sets) for i in _similar(index, sets, items, _sketch(items))]
    pairs: list[tuple[int, int]] = []
    for j, items in enumerate(sets):
        sketch = _sketch(items)
        pairs += [(i, j) for i in _similar(index, sets, items, sketch)]
        index.insert(j, sketch)
    return pairs


def _similar(index: Any, sets: Sequence[set[str]], items: set[str], sketch: Any) -> list[int]:
    return [i for i in sorted(index.query(sketch)) if len(sets[i] & items) >= SIMILARITY * len(sets[i] | items)]


def _sketch(items: set[str]) -> Any:
    from datasketch import MinHash

    sketch = MinHash(num_perm=64, seed=1)
    sketch.update_batch([item.encode() for item in items])
    return sketch

"""An interpolated Kneser–Ney trigram on the same tokens as a finished pretraining run, and on the same held-out text.

    python scripts/baseline_trigram.py runs/real-small/pretrain --data-root ../data

A language model that was worth its training predicts held-out text better than counts do. Reads the run's own recipe,
tokenizer and split; prints both perplexities, each over the same held-out tokens.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.data.documents import split_texts
from pipeline.data.encoding import document_ids
from pipeline.data.entries import DatasetEntry
from pipeline.data.sources import read_sources
from pipeline.models.tokenizers import load_tokenizer
from pipeline.training.lineage import read_lineage


class KneserNeyTrigram:
    """Interpolated Kneser–Ney of order 3 (Kneser and Ney 1995; Chen and Goodman 1999), one discount an order.

    The discounts are n1 / (n1 + 2 n2) of each order's own counts; the unigrams are interpolated with 1 / vocabulary.
    """

    def __init__(self, documents: Sequence[Sequence[int]], vocab_size: int):
        self.vocab_size = vocab_size
        trigrams: Counter[tuple[int, int, int]] = Counter()
        bigrams_raw: Counter[tuple[int, int]] = Counter()  # at a document's start there is no trigram: raw counts
        for ids in documents:
            trigrams.update(zip(ids, ids[1:], ids[2:], strict=False))
            bigrams_raw.update([(ids[0], ids[1])] if len(ids) > 1 else [])
        # Lower orders count contexts, not occurrences: in how many different words' company a word was seen.
        bigrams: Counter[tuple[int, int]] = Counter((b, c) for _, b, c in trigrams)
        bigrams.update(bigrams_raw.keys())
        unigrams: Counter[int] = Counter(c for _, c in bigrams)
        self.trigrams, self.bigrams, self.unigrams = trigrams, bigrams, unigrams
        self.contexts3: Counter[tuple[int, int]] = Counter()
        self.types3: Counter[tuple[int, int]] = Counter()
        for (a, b, _), n in trigrams.items():
            self.contexts3[a, b] += n
            self.types3[a, b] += 1
        self.contexts2: Counter[int] = Counter()
        self.types2: Counter[int] = Counter()
        for (b, _), n in bigrams.items():
            self.contexts2[b] += n
            self.types2[b] += 1
        self.total1 = sum(unigrams.values())
        self.discounts = [_discount(counts) for counts in (unigrams, bigrams, trigrams)]

    def probability(self, a: int | None, b: int, c: int) -> float:
        """P(c | a b); `a` is None for a document's second token."""
        d1, d2, d3 = self.discounts
        uniform = 1 / self.vocab_size
        p = max(self.unigrams[c] - d1, 0) / self.total1 + d1 * len(self.unigrams) / self.total1 * uniform
        if total := self.contexts2[b]:
            p = max(self.bigrams[b, c] - d2, 0) / total + d2 * self.types2[b] / total * p
        if a is not None and (total := self.contexts3[a, b]):
            p = max(self.trigrams[a, b, c] - d3, 0) / total + d3 * self.types3[a, b] / total * p
        return p

    def nll(self, documents: Sequence[Sequence[int]]) -> tuple[float, int]:
        """Summed negative log-likelihood in nats, and the number of predicted tokens (all but each document's first)."""
        total, tokens = 0.0, 0
        for ids in documents:
            for i in range(1, len(ids)):
                total -= math.log(self.probability(ids[i - 2] if i > 1 else None, ids[i - 1], ids[i]))
                tokens += 1
        return total, tokens


def _discount(counts: Mapping[Any, int]) -> float:
    n1, n2 = (sum(1 for n in counts.values() if n == k) for k in (1, 2))
    return n1 / (n1 + 2 * n2) if n1 else 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="output folder of a finished pretrain stage")
    parser.add_argument("--data-root", help="where the recipe's datasets lie; default: as in the recipe")
    args = parser.parse_args()
    lineage = read_lineage(args.run)
    if lineage is None or lineage["stage"] != "pretrain":
        raise SystemExit(f"{args.run} is no finished pretrain stage")
    recipe = lineage["recipe"]
    sources = read_sources(
        [DatasetEntry(**entry) for entry in recipe["datasets"]], "document", args.data_root or recipe["data_root"]
    )
    tokenizer = load_tokenizer(str(args.run))
    parts = [split_texts(source, recipe["held_out_fraction"]) for source in sources]
    train, held_out = ([text for part in parts for text in part[side]] for side in (0, 1))
    model = KneserNeyTrigram(document_ids(tokenizer, train), len(tokenizer))
    nll, tokens = model.nll(document_ids(tokenizer, held_out))
    metrics = lineage["metrics"]
    if tokens != metrics["held_out_tokens"]:
        raise SystemExit(f"{tokens} held-out tokens here, {metrics['held_out_tokens']} in the run: not the same text")
    print(f"held-out tokens: {tokens}")
    print(f"interpolated Kneser-Ney trigram: perplexity {math.exp(nll / tokens):.2f}")
    print(f"this run's model:                perplexity {metrics['perplexity']:.2f}")


if __name__ == "__main__":
    main()

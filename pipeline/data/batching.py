"""Which rows go together: seeded orders of epochs, and groups of rows of similar length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipeline.algorithms.seeds import STRIDE

import numpy as np
import torch
from torch.utils.data import Sampler


def seeded_order(seed: int, count: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def epoch_permutation_indices(count: int, first: int, number: int, seed: int) -> list[int]:
    """Positions `first` to `first + number` of a sequence of seeded permutations of `count` items."""
    picked: list[int] = []
    while number:
        epoch, index = divmod(first, count)
        generator = torch.Generator().manual_seed(seed * STRIDE + epoch)
        picked += torch.randperm(count, generator=generator)[index : index + number].tolist()
        taken = min(number, count - index)
        first, number = first + taken, number - taken
    return picked


class LengthGroupedSampler(Sampler[int]):
    """A seeded order in which each batch holds rows of like length, and the batches come in no order of length.

    transformers has one of this name; its batches run from long to short, and depend on the number of processes.

    Args:
        lengths: of each row.
        batch: rows of one optimizer step, over all processes.
        pool: batches' worth of rows that are sorted by length together.
    """

    def __init__(self, lengths: Sequence[int] | np.ndarray, batch: int, seed: int, pool: int = 50):
        self.lengths, self.batch, self.seed, self.pool = np.asarray(lengths), batch, seed, pool
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        seed = self.seed * STRIDE + self.epoch
        rows = seeded_order(seed, len(self.lengths))
        size = self.batch * self.pool
        batches: list[list[int]] = []
        for start in range(0, len(rows), size):
            part = sorted(rows[start : start + size], key=lambda row: -self.lengths[row])
            batches += [part[i : i + self.batch] for i in range(0, len(part), self.batch)]
        last = [batch for batch in batches if len(batch) < self.batch]  # the one incomplete batch ends the epoch
        batches = [batch for batch in batches if len(batch) == self.batch]
        for index in seeded_order(seed + 1, len(batches)):
            yield from batches[index]
        for batch in last:
            yield from batch


def microbatches(lengths: Sequence[int] | np.ndarray, rows: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Rows of similar length together: at most `max_tokens` tokens in a group, and at most twice as many if its rows were
    padded, as they are in attention (one row at least)."""
    groups: list[list[int]] = []
    tokens = 0
    for row in sorted(rows, key=lambda row: (lengths[row], row)):
        tokens += lengths[row]
        if not groups or tokens > max_tokens or lengths[row] * (len(groups[-1]) + 1) > 2 * max_tokens:
            groups.append([])
            tokens = lengths[row]
        groups[-1].append(row)
    return groups

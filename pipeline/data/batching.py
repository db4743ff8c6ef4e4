"""Which rows go together: seeded orders without end, and forward passes of rows of similar length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import Sampler


def seeded_order(seed: int, count: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def endless(count: int, first: int, number: int, seed: int) -> list[int]:
    """Positions `first` to `first + number` of seeded permutations of `count` items end to end."""
    orders: dict[int, list[int]] = {}
    picked = []
    for position in range(first, first + number):
        epoch, index = divmod(position, count)
        if epoch not in orders:
            orders[epoch] = seeded_order(seed * 1_000_003 + epoch, count)
        picked.append(orders[epoch][index])
    return picked


class LengthGroupedSampler(Sampler[int]):
    """A seeded order in which each batch holds rows of like length, and the batches come in no order of length.

    transformers has one of this name; its batches run from long to short, and depend on the number of processes.

    Args:
        lengths: of each row.
        batch: rows of one optimizer step, over all processes.
        pool: batches' worth of rows that are sorted by length together.
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int, pool: int = 50):
        self.lengths, self.batch, self.seed, self.pool = list(lengths), batch, seed, pool
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        seed = self.seed * 1_000_003 + self.epoch
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


@dataclass(frozen=True)
class Cut:
    """How rows are cut into forward passes.

    group_tokens: what starting a further pass costs beside its tokens.
    multiple: lengths are padded up to a multiple of this. 1 but for bf16 on a CPU, where oneDNN makes new kernels for every
        new shape (measured: half of the time, and hundreds of MB); there all passes have the same number of rows, too.
    """

    group_tokens: int = 64
    multiple: int = 1

    def padded(self, length: int) -> int:
        return -(-length // self.multiple) * self.multiple


def microbatches(lengths: list[int], rows: list[int], max_tokens: int, cut: Cut = Cut()) -> list[list[int]]:
    """Rows of similar length together, each group at most `max_tokens` with padding (one row at least).

    Of all such cuts of the rows sorted by length, the one that costs the fewest tokens, padding and starts included.
    """
    order = sorted(rows, key=lambda row: (lengths[row], row))
    if cut.multiple > 1:
        return _equal_groups(lengths, order, max_tokens, cut)
    best: list[tuple[int, int]] = [(0, 0)]  # of the first n rows: cost, where the last group begins
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        starts = [start for start in range(end) if longest * (end - start) <= max_tokens] or [end - 1]
        best.append(min((best[start][0] + longest * (end - start) + cut.group_tokens, start) for start in starts))
    groups: list[list[int]] = []
    end = len(order)
    while end:
        start = best[end][1]
        groups.append(order[start:end])
        end = start
    return groups[::-1]


def _equal_groups(lengths: list[int], order: list[int], max_tokens: int, cut: Cut) -> list[list[int]]:
    found: list[tuple[int, list[list[int]]]] = []
    size = len(order)
    while size:
        groups = [order[start : start + size] for start in range(0, len(order), size)]
        tokens = [cut.padded(lengths[group[-1]]) * len(group) for group in groups]
        if max(tokens) <= max_tokens or size == 1:
            found.append((sum(tokens) + cut.group_tokens * len(groups), groups))
        size //= 2
    return min(found, key=lambda item: item[0])[1] if found else []

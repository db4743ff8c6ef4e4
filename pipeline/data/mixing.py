"""What `weight:` of a dataset means, in every stage: its share of the rows of one epoch.

Rows are what a stage steps over: packed blocks in pretraining and ptx, demonstrations in SFT, rankings in reward
training, prompts in PPO. Datasets of 100 and 10 rows with weights 0.5 and 0.5 make an epoch of 200 rows: the small one ten times.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from pipeline.errors import UserError

import numpy as np

LONGEST_EPOCH = 1000  # times the number of rows; a weight that needs more is taken for a mistake


def all_weighted(weights: Sequence[float | None]) -> bool:
    """Whether the datasets have weights.

    Raises:
        UserError: some have one and some have none.
    """
    given = [weight is not None for weight in weights]
    if any(given) and not all(given):
        raise UserError("datasets: some entries have a weight and some have none; give all or none")
    return any(given)


def mixture_indices(sizes: Sequence[int], weights: Sequence[float | None], seed: int) -> np.ndarray:
    """One epoch of several datasets, as positions in their concatenation.

    Without weights every row stands once, in order. With weights every row stands at least once, and datasets that are
    small for their weight are repeated until the shares hold to one row; the repeats that are not whole passes are a
    seeded sample. The order is that of the datasets: whoever trains on it shuffles.

    Args:
        sizes: rows of each dataset; an empty one has no share.
        weights: of each dataset, relative to each other; all of them or none.
    """
    if not all_weighted(weights):
        return np.arange(sum(sizes))
    total = sum(weight for weight, size in zip(weights, sizes, strict=True) if weight is not None and size)
    shares = [
        weight / total if weight is not None and size else 0.0 for weight, size in zip(weights, sizes, strict=True)
    ]
    epoch = max((size / share for size, share in zip(sizes, shares, strict=True) if share), default=0.0)
    if epoch > LONGEST_EPOCH * sum(sizes):
        raise UserError(
            f"datasets: with these weights one epoch holds {epoch:,.0f} rows of {sum(sizes):,}; bring them nearer to each other"
        )
    indices = [np.zeros(0, np.int64)]
    start = 0
    for position, (size, share) in enumerate(zip(sizes, shares, strict=True)):
        if size:
            passes, rest = divmod(max(size, round(epoch * share)), size)
            drawn = np.array(random.Random(seed + position).sample(range(size), rest), np.int64)
            indices += [start + np.tile(np.arange(size), passes), start + drawn]
        start += size
    return np.concatenate(indices)


def rows_of_each(indices: np.ndarray, sizes: Sequence[int]) -> list[int]:
    """How many rows of each dataset one epoch of `mixture_indices` holds."""
    source = np.searchsorted(np.cumsum(sizes), indices, "right")
    counts: list[int] = np.bincount(source, minlength=len(sizes)).tolist()
    return counts

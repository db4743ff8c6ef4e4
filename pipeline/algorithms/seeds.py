"""Seeds of a run's parts, as functions of the recipe's seed and a position: nothing random depends on batches or processes."""

from __future__ import annotations

# Different primes, above the number of rollouts or rows, and of epochs: no two rows or epochs of a run get the same seed.
STRIDE = 1_000_003
EPOCH_STRIDE = 1_009
ROW_STRIDE = 7_919
ROW_OFFSET = 12_345  # arbitrary; another one would draw other samples


def rollout_seed(seed: int, rollout: int) -> int:
    return seed * STRIDE + rollout


def epoch_seed(seed: int, rollout: int, epoch: int) -> int:
    """Of the order of a rollout's sequences in one epoch."""
    return rollout_seed(seed, rollout) * EPOCH_STRIDE + epoch


def row_seed(seed: int, row: int) -> int:
    """Of the uniform numbers that sample one row, given its rollout's seed."""
    return (seed * STRIDE + row * ROW_STRIDE + ROW_OFFSET) % 2**63

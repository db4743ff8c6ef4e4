"""Ratings of models from comparisons of their answers (Bradley and Terry 1952), with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.evaluation.intervals import RESAMPLES, Interval

import numpy as np

PRIOR = 0.5  # wins added on either side of each two models that met, so that one that never lost has a rating too
ITERATIONS, TOLERANCE = 10_000, 1e-9


@dataclass(frozen=True)
class Rating:
    """One model's rating: its log-odds, in nats, of an answer preferred to the first model's. comparisons: it took part in."""

    model: str
    rating: float
    ci95: Interval
    comparisons: float


def bradley_terry(wins: np.ndarray, prior: float = PRIOR) -> np.ndarray:
    """(…, models) maximum-likelihood ratings, the first model's 0, by Hunter's (2004) minorisation.

    Args:
        wins: (…, models, models) how often the row's model was preferred to the column's; a tie is half of either.
        prior: added to both sides of each two models that met in any of the leading entries.
    """
    flat = wins.reshape(-1, *wins.shape[-2:]).astype(float)
    met = (flat + flat.transpose(0, 2, 1)).sum(0) > 0
    flat = flat + prior * met
    games = flat + flat.transpose(0, 2, 1)
    won = flat.sum(2)
    strength = np.ones_like(won)
    for _ in range(ITERATIONS):
        expected = (games / (strength[:, :, None] + strength[:, None, :])).sum(2)
        updated = won / np.maximum(expected, 1e-300)
        updated /= np.exp(np.log(np.maximum(updated, 1e-300)).mean(1, keepdims=True))
        moved = np.abs(np.log(np.maximum(updated, 1e-300)) - np.log(np.maximum(strength, 1e-300))).max()
        strength = updated
        if moved < TOLERANCE:
            break
    logs = np.log(np.maximum(strength, 1e-300))
    return (logs - logs[:, :1]).reshape(wins.shape[:-1])


def ratings(models: Sequence[str], wins: np.ndarray) -> list[Rating]:
    """Ratings with 95 % intervals by bootstrap over prompts, for models that are linked by comparisons.

    Args:
        models: the first one's rating is 0.
        wins: (prompts, models, models) as in `bradley_terry`, of each prompt.
    """
    total = wins.sum(0)
    linked = _linked(total + total.T)
    chosen = [i for i in range(len(models)) if linked[i]]
    if len(chosen) < 2:
        return []
    wins = wins[:, chosen][:, :, chosen]
    rng = np.random.default_rng(0)
    prompts = len(wins)
    counts = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=RESAMPLES // 4)  # (resamples, prompts)
    resampled = bradley_terry(np.tensordot(counts, wins, axes=1))
    low, high = np.percentile(resampled, [2.5, 97.5], axis=0)
    best = bradley_terry(wins.sum(0))
    games = (wins.sum(0) + wins.sum(0).T).sum(1)
    return [
        Rating(models[i], float(best[k]), (float(low[k]), float(high[k])), float(games[k]))
        for k, i in enumerate(chosen)
    ]


def _linked(games: np.ndarray) -> np.ndarray:
    """(models,) whether comparisons link a model to the first one, directly or through others."""
    reached = np.zeros(len(games), bool)
    reached[0] = True
    for _ in range(len(games)):
        reached |= (games[reached] > 0).any(0)
    return reached

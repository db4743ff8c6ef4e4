"""Bradley–Terry ratings against answers that are known."""

from __future__ import annotations

import math

from pipeline.evaluation.ratings import bradley_terry, ratings

import numpy as np
import pytest


def expected_wins(strengths: list[float], games: float) -> np.ndarray:
    """Wins exactly as the model expects them."""
    n = len(strengths)
    return np.array(
        [[0.0 if i == j else games / (1 + math.exp(strengths[j] - strengths[i])) for j in range(n)] for i in range(n)]
    )


def test_two_models_are_their_log_odds_apart() -> None:
    assert bradley_terry(np.array([[0, 30.0], [90.0, 0]]), prior=0)[1] == pytest.approx(math.log(3), abs=1e-6)


def test_known_strengths_are_found_again() -> None:
    strengths = [0.0, 0.7, -0.4, 2.0]
    assert bradley_terry(expected_wins(strengths, 100), prior=0) == pytest.approx(strengths, abs=1e-5)


def test_models_that_never_met_are_compared_through_others() -> None:
    wins = np.array([[0, 25.0, 0], [75.0, 0, 25.0], [0, 75.0, 0]])
    assert bradley_terry(wins, prior=0)[2] == pytest.approx(2 * math.log(3), abs=1e-5)


def test_a_model_that_never_lost_has_a_finite_rating() -> None:
    assert 3 < bradley_terry(np.array([[0, 0.0], [40.0, 0]]))[1] < 6


def test_intervals_hold_the_truth_and_shrink_with_prompts() -> None:
    rng = np.random.default_rng(3)
    widths = []
    for prompts in (50, 800):
        second = rng.random(prompts) < 1 / (1 + math.exp(-1.0))
        wins = np.zeros((prompts, 2, 2))
        wins[:, 1, 0], wins[:, 0, 1] = second, ~second
        first, other = ratings(["a", "b"], wins)
        assert (first.rating, first.ci95) == (0.0, (0.0, 0.0))
        assert other.ci95[0] < 1.0 < other.ci95[1]
        widths.append(other.ci95[1] - other.ci95[0])
    assert widths[1] < widths[0] / 2.5


def test_a_model_without_comparisons_has_no_rating() -> None:
    wins = np.zeros((5, 3, 3))
    wins[:, 0, 1] = 1
    assert [rating.model for rating in ratings(["a", "b", "c"], wins)] == ["a", "b"]

"""Win rates and accuracies: intervals that hold what they promise, and what length has to do with winning."""

from __future__ import annotations

from pipeline.evaluation.intervals import bootstrap_interval, length_controlled, pair_accuracy, win_rate

import numpy as np
import pytest


def test_win_rate_intervals_cover_a_known_rate() -> None:
    """A planted probability lies inside the 95 % interval in 93 to 97 % of simulations."""
    rng = np.random.default_rng(0)
    inside = 0
    runs, prompts, planted = 1000, 200, 0.62
    for _ in range(runs):
        wins = rng.random(prompts) < planted
        low, high = win_rate(wins.astype(float), (~wins).astype(float)).ci95
        inside += low <= planted <= high
    assert 0.93 <= inside / runs <= 0.97


def test_intervals_resample_prompts_where_a_prompt_is_there_several_times() -> None:
    """Ten rankings per prompt that agree with each other say no more than one of them."""
    rng = np.random.default_rng(1)
    inside_rows = inside_prompts = 0
    for _ in range(300):
        per_prompt = (rng.random(60) < 0.7).astype(float)
        rows, prompts = np.repeat(per_prompt, 10), np.repeat(np.arange(60), 10).tolist()
        low, high = bootstrap_interval(rows)
        inside_rows += low <= 0.7 <= high
        low, high = pair_accuracy(rows, 1 - rows, prompts).ci95 or (0.0, 0.0)
        inside_prompts += low <= 0.7 <= high
    assert inside_rows / 300 < 0.6
    assert inside_prompts / 300 >= 0.91


def test_an_interval_of_wins_only_is_not_a_point() -> None:
    assert win_rate([1.0] * 4, [0.0] * 4).ci95 == (pytest.approx(0.025**0.25), 1.0)
    assert win_rate([0.0] * 100, [1.0] * 100).ci95 == (0.0, pytest.approx(0.0362, abs=1e-3))


def test_swapping_the_sides_swaps_the_rate() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 5, 301).astype(float), rng.integers(0, 5, 301).astype(float)
    assert win_rate(a, b).win_rate + win_rate(b, a).win_rate == 1.0


def test_length_control_takes_a_length_bias_out() -> None:
    rng = np.random.default_rng(2)
    longer = rng.normal(12, 8, 6000)  # the candidate writes more, and the judge likes more
    biased = (rng.random(6000) < 1 / (1 + np.exp(-longer / 8))).astype(float)
    assert biased.mean() > 0.75
    assert length_controlled(biased, longer) == pytest.approx(0.5, abs=0.04)
    fair = (rng.random(6000) < 0.7).astype(float)
    assert length_controlled(fair, longer) == pytest.approx(0.7, abs=0.04)
    assert length_controlled(np.ones(5), np.arange(5.0)) == 1.0
    assert length_controlled(np.array([1.0, 0.0]), np.zeros(2)) == 0.5


@pytest.mark.parametrize("shift", [10.0, -10.0])
def test_lengths_that_do_not_overlap_identify_no_rate_at_equal_length(shift: float) -> None:
    """0.92 of the wins, every answer longer: a regression would extrapolate, and its ridge decide."""
    rng = np.random.default_rng(3)
    longer = shift + rng.uniform(-4, 4, 200)
    wins = (rng.random(200) < 0.92).astype(float)
    assert length_controlled(wins, longer) is None
    assert length_controlled(np.ones(200), longer) is None
    few = np.concatenate([longer, np.full(4, -shift)])  # 2 % on the other side
    assert length_controlled(np.concatenate([wins, np.ones(4)]), few) is None


def test_length_that_tells_wins_from_losses_identifies_no_rate() -> None:
    longer = np.array([-9.0, -5.0, -3.0, 1.0, 4.0, 6.0, 8.0])
    assert length_controlled((longer > 0).astype(float), longer) is None
    assert length_controlled((longer < 3).astype(float), longer) is None

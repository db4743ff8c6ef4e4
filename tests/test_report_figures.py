"""Figures of the report on known answers: best of k, over-optimisation, win rates and what length has to do with them."""

from __future__ import annotations

import itertools
from typing import Any

from pipeline.best_of_n import best_of_each, kl_bound
from pipeline.metrics import WinRate
from pipeline.metrics.preference import length_controlled
from pipeline.report import Answers, over_optimisation, win_rates

import numpy as np
import pytest
import torch


def test_best_of_each_is_the_mean_over_all_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    proxy, judge = torch.randn(6, 4, generator=generator), torch.randn(6, 4, generator=generator)
    found = best_of_each(judge, proxy)
    for k in range(1, 7):
        means = []
        for chosen in itertools.combinations(range(6), k):
            best = proxy[list(chosen)].argmax(0)
            means.append(judge[list(chosen)].gather(0, best[None])[0].double().mean().item())
        assert found[k - 1] == pytest.approx(np.mean(means), abs=1e-6)
    assert best_of_each(proxy, proxy) == sorted(best_of_each(proxy, proxy))
    assert kl_bound(1) == 0.0


def points(proxy: list[float], gold: list[float]) -> list[dict[str, Any]]:
    return [
        {"step": 10 * i, "kl": 3.0 * i, "reward": a, "rubric": b, "score_reward_model": a, "stopped": 1.0}
        for i, (a, b) in enumerate(zip(proxy, gold, strict=True))
    ]


def test_over_optimisation_is_proxy_up_and_gold_down() -> None:
    (found,) = over_optimisation(points([0.0, 1.0, 2.0, 3.0], [0.5, 0.8, 0.7, 0.4]))
    assert (found["judge"], found["step"], found["gold_best"], found["gold_end"]) == ("rubric", 10, 0.8, 0.4)
    assert over_optimisation(points([0.0, 1.0, 2.0, 3.0], [0.5, 0.6, 0.7, 0.8])) == [], "both rise"
    assert over_optimisation(points([0.0, 3.0, 2.0, 1.0], [0.5, 0.8, 0.7, 0.4])) == [], "both fall"
    assert over_optimisation(points([0.0, 1.0, 2.0, 3.0], [0.5, 0.7, 0.8, 0.79])) == [], "noise"
    assert over_optimisation([]) == []


def test_win_rates_hold_what_they_promise() -> None:
    """A planted probability lies inside the 95 % interval in 93 to 97 % of simulations."""
    rng = np.random.default_rng(0)
    metric, inside = WinRate(), 0
    runs, prompts, planted = 1000, 200, 0.62
    for _ in range(runs):
        wins = rng.random(prompts) < planted
        found = metric._compute(wins.astype(float).tolist(), (~wins).astype(float).tolist())
        inside += found["ci95"][0] <= planted <= found["ci95"][1]
    assert 0.93 <= inside / runs <= 0.97


def test_swapping_the_sides_swaps_the_rate() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 5, 301).astype(float), rng.integers(0, 5, 301).astype(float)
    one, two = WinRate()._compute(a.tolist(), b.tolist()), WinRate()._compute(b.tolist(), a.tolist())
    assert one["win_rate"] + two["win_rate"] == 1.0


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


def test_every_pair_of_answerers_is_compared_once() -> None:
    def answers(length: int) -> Answers:
        return Answers(None, [], [[0] * length] * 3, [])  # type: ignore[arg-type]

    scores = {
        name: {"reward": [float(i)] * 3}
        for i, name in enumerate(("their/model", "pretrain", "sft", "best_of_4", "ppo"))
    }
    rows = win_rates(scores, {name: answers(4 + i) for i, name in enumerate(scores)})
    assert len(rows) == 10
    assert {(row["candidate"], row["baseline"]) for row in rows} >= {
        ("ppo", "sft"),
        ("ppo", "their/model"),
        ("sft", "pretrain"),
    }
    assert all(row["win_rate"] == 1.0 for row in rows)

"""Figures of the report on known answers: best of k, over-optimisation, win rates and what length has to do with them."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

from pipeline.evaluation.metrics import WinRate
from pipeline.evaluation.over_optimisation import over_optimisation
from pipeline.evaluation.plots import lineage_plot
from pipeline.evaluation.preference import length_controlled
from pipeline.evaluation.report import Answers, read_run, win_rates
from pipeline.evaluation.report_page import proxy_and_gold
from pipeline.planning.devices import device_called, devices, energy
from pipeline.rollout.best_of_n import best_of_each, kl_bound

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


def test_proxy_and_gold_share_a_plot() -> None:
    plot = proxy_and_gold(points([0.0, 1.0, 2.0, 4.0], [0.5, 0.9, 0.7, 0.5]))
    found = {
        name: [row["share of its largest move"] for row in plot.rows if row["series"] == name]
        for name in ("reward (trained)", "rubric")
    }
    assert found == {"reward (trained)": [0.0, 0.25, 0.5, 1.0], "rubric": pytest.approx([0.0, 1.0, 0.5, 0.0])}


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L40", None),
        ("Tesla T4", "t4"),
        ("NVIDIA GB200", None),
    ],
)
def test_devices_by_their_drivers_names(name: str, key: str | None) -> None:
    found = device_called(name, devices())
    assert (found.name if found else None) == key


def test_energy_is_time_times_power() -> None:
    cluster = {"seconds": 3600, "processes": 8, "hardware": {"gpus": ["NVIDIA A100-SXM4-80GB"] * 8}}
    laptop = {"seconds": 1800, "processes": 2, "hardware": {"cpus": 2}}
    found = energy({"sft": cluster, "ppo": laptop}, None)
    assert found == {"kwh": {"sft": pytest.approx(3.2)}, "watts": {"sft": 3200.0}, "unknown": ["ppo"]}
    assert energy({"ppo": laptop}, 100.0)["kwh"] == {"ppo": pytest.approx(0.05)}


def test_every_hash_is_held_against_the_disk(chain: Path, tmp_path: Path) -> None:
    """A run as it was left; then one whose data changed, whose weights changed, and whose data is gone."""
    found = read_run(chain)
    assert (found.notes, found.changed) == ([], [])
    run = tmp_path / "run"
    shutil.copytree(chain, run, ignore=shutil.ignore_patterns("report", "value", "checkpoint-*"))
    path = run / "sft" / "lineage.json"
    lineage = json.loads(path.read_text(encoding="utf-8"))
    data = tmp_path / "mine.jsonl"
    data.write_text('{"prompt": "a", "response": "b"}\n', encoding="utf-8")
    lineage["recipe"]["datasets"] = [{"path": str(data)}]
    path.write_text(json.dumps(lineage), encoding="utf-8")
    assert read_run(run).notes == [f"sft: its data {data} changed after the stage finished"]
    data.unlink()
    weights = run / "ppo" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    found = read_run(run)
    assert found.changed == ["ppo"]
    assert found.notes == [
        f"sft: its data {data} cannot be read any more, so it was not checked",
        "ppo: its weights changed after the stage finished; the figures below may not be theirs",
    ]
    assert "weights changed since" in lineage_plot(found.lineages, found.changed).svg

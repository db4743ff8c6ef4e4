"""The report's page: plots, boxes, and the template that holds them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from pipeline.evaluation.over_optimisation import gold_judges
from pipeline.evaluation.plots import Plot, curve, reward_plots, stage_curves


def draw(
    folder: Path, lineages: dict[str, Any], points: list[dict[str, Any]], best: dict[str, Any] | None = None
) -> dict[str, list[Plot]]:
    """Every stage's plots; `points` of `frontier`."""
    drawn: dict[str, list[Plot]] = {}
    for stage, lineage in lineages.items():
        drawn[stage] = stage_curves(folder / stage, stage)
        if stage == "reward":
            drawn[stage] += reward_plots(lineage["metrics"])
        for judge in ["reward", *gold_judges(points)] if stage == "ppo" and points else []:
            series = {"ppo, by rollout": [(math.sqrt(max(point["kl"], 0.0)), point[judge]) for point in points]}
            if best and judge in best["curve"][0]:
                name = f"best of 1 … {best['n']}"
                series[name] = [(math.sqrt(point["kl"]), point[judge]) for point in best["curve"]]
            labels = [str(point["step"]) for point in points]
            title = f"ppo: {judge} over √KL" + (" (trained score)" if judge == "reward" else " (unseen in training)")
            drawn[stage].append(curve(title, "√KL, √nats a response", f"mean {judge}", series, labels))
        if stage == "ppo" and gold_judges(points):
            drawn[stage].append(proxy_and_gold(points))
    return drawn


def proxy_and_gold(points: list[dict[str, Any]]) -> Plot:
    """The trained score and every judge on one plot (after Gao et al. 2023), each as a share of its own largest move."""
    series = {}
    for judge in ["reward", *gold_judges(points)]:
        moved = [point[judge] - points[0][judge] for point in points]
        largest = max(map(abs, moved)) or 1.0
        name = "reward (trained)" if judge == "reward" else judge
        series[name] = [(math.sqrt(max(p["kl"], 0.0)), move / largest) for p, move in zip(points, moved, strict=True)]
    labels = [str(point["step"]) for point in points]
    return curve("ppo: proxy and gold over √KL", "√KL, √nats a response", "share of its largest move", series, labels)


def render(report: dict[str, Any], drawn: dict[str, list[Plot]], lineage: Plot) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["figure"] = _figure
    template = environment.get_template("report.html.j2")
    return template.render(
        report=report,
        plots=drawn,
        picture=lineage,
        headlines=_headlines(report),
        data=json.dumps(report, ensure_ascii=False).replace("</", "<\\/"),
    )


def _headlines(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(label, figure, note) of the boxes on top."""
    stages, boxes = report["stages"], []
    if "pretrain" in stages:
        boxes.append(("Perplexity", _figure(stages["pretrain"]["perplexity"]), "pretrained model, held-out text"))
    if "reward" in stages:
        ceiling = stages["reward"].get("noise_ceiling")
        note = "reward model, held-out pairs" + (f"; noise allows {ceiling:.1%}" if ceiling else "")
        boxes.append(("Accuracy", f"{stages['reward']['accuracy']:.1%}", note))
    for row in report["win_rates"]:
        if (row["candidate"], row["baseline"]) in (("ppo", "sft"), ("sft", "pretrain")):
            boxes.append(
                (
                    f"{row['candidate']} over {row['baseline']}",
                    f"{row['win_rate']:.0%}",
                    f"wins by {row['judge']}, 95 % [{row['ci95'][0]:.0%}, {row['ci95'][1]:.0%}]",
                )
            )
    if "ppo" in stages:
        boxes.append(("KL", _figure(stages["ppo"]["kl"]), "nats a response, PPO from SFT"))
    if report["over_optimisation"]:
        at = report["over_optimisation"][0]
        boxes.append(
            (
                "Over-optimised",
                f"from rollout {at['step']}",
                f"{at['judge']} fell after it while the trained score rose",
            )
        )
    boxes.append(("Training", f"{sum(report['seconds'].values()):.0f} s", "wall time of all stages"))
    return boxes


def _figure(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.3e}" if abs(value) >= 1e6 else f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        return "[" + ", ".join(_figure(v) for v in value) + "]"
    if isinstance(value, dict):
        return ", ".join(f"{k}: {_figure(v)}" for k, v in value.items())
    return str(value)


def summary(report: dict[str, Any]) -> str:
    wins = [
        f"{row['candidate']} beats {row['baseline']} in {row['win_rate']:.1%} ({row['judge']})"
        for row in report["win_rates"]
        if (row["candidate"], row["baseline"]) in (("ppo", "sft"), ("sft", "pretrain"))
    ]
    return ", ".join(wins) + (" · " if wins else "")

"""The report's page: its plots, its headline numbers, and the template that holds them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.evaluation.plots import Plot, curve, lineage_plot, reward_model_plots, stage_curves
from pipeline.evaluation.run_folder import RunFolder
from pipeline.evaluation.verdict import FEW_PROMPTS

TEMPLATE = "page.html.j2"
DEEPEST = 3  # levels of nested metrics that get a row of their own


class Headline(NamedTuple):
    """One box on top of the page."""

    label: str
    number: str
    note: str


def render(report: dict[str, Any], run: RunFolder, judges: Sequence[str]) -> str:
    """The page as HTML that needs no other file and no network.

    Args:
        report: what `report.json` holds.
        judges: those that PPO's evaluations asked.
    """
    import jinja2
    from jinja2.utils import htmlsafe_json_dumps

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "number": number,
        "share": share,
        "duration": duration,
        "energy": energy,
        "rows": metric_rows,
    }
    # Inside <script>, "<!--<script>" would hide the closing tag: every "<" of the data is written as an escape.
    return environment.get_template(TEMPLATE).render(
        report=report,
        plots=draw(report, run, judges),
        picture=lineage_plot(run.lineages, run.changed),
        headlines=list(headlines(report)),
        data=htmlsafe_json_dumps(report),
    )


def draw(report: dict[str, Any], run: RunFolder, judges: Sequence[str]) -> dict[str, list[Plot]]:
    """Every stage's plots."""
    drawn: dict[str, list[Plot]] = {}
    for stage, lineage in run.lineages.items():
        drawn[stage] = stage_curves(run.path / stage, stage)
        if stage == "reward":
            drawn[stage] += reward_model_plots(lineage["metrics"])
        if stage == "ppo" and report["frontier"]:
            drawn[stage] += reward_kl_plots(report["frontier"], report["best_of_n"], judges)
    return drawn


def reward_kl_plots(points: list[dict[str, Any]], best: dict[str, Any] | None, judges: Sequence[str]) -> list[Plot]:
    """Reward–KL curves of the run's evaluations beside best of 1 … n: the reward and each judge, each in one unit."""
    plots = []
    for judge in ["reward", *judges]:
        series = {"ppo, by rollout": [(_root_kl(point), point[judge]) for point in points]}
        if best and judge in best["curve"][0]:
            series[f"best of 1 … {best['n']}"] = [(_root_kl(point), point[judge]) for point in best["curve"]]
        what = "reward (what PPO trains on)" if judge == "reward" else f"{judge} (a judge that PPO never saw)"
        labels = [str(point["step"]) for point in points]
        plots.append(curve(f"ppo: {what} over √KL", "√KL, √nats per response", f"mean {judge}", series, labels))
    return [*plots, proxy_and_gold(points, judges)] if judges else plots


def proxy_and_gold(points: list[dict[str, Any]], judges: Sequence[str]) -> Plot:
    """The reward and every judge on one plot (after Gao et al. 2023), each as a share of its own largest move."""
    series = {}
    for judge in ["reward", *judges]:
        moved = [point[judge] - points[0][judge] for point in points]
        largest = max(map(abs, moved)) or 1.0
        name = "reward (trained)" if judge == "reward" else judge
        series[name] = [(_root_kl(p), move / largest) for p, move in zip(points, moved, strict=True)]
    labels = [str(point["step"]) for point in points]
    title = "ppo: reward and judges over √KL"
    return curve(title, "√KL, √nats per response", "share of its largest move", series, labels)


def _root_kl(point: dict[str, Any]) -> float:
    return math.sqrt(max(point["kl"], 0.0))


def headlines(report: dict[str, Any]) -> Iterator[Headline]:
    """The numbers on top: none that the data does not carry, independent judges before the training reward."""
    stages = report["stages"]
    if report["prompts"] >= FEW_PROMPTS:
        independent = report["judges"]["independent"]
        rows = [row for row in report["win_rates"] if (row["candidate"], row["baseline"]) == ("ppo", "sft")]
        for row in sorted(rows, key=lambda row: row["judge"] not in independent):
            if row["judge"] in independent or row["judge"] == "reward":
                by = f"by {row['judge']}" if row["judge"] in independent else "by the reward it was trained on"
                interval = f"95 % [{row['ci95'][0]:.0%}, {row['ci95'][1]:.0%}]"
                yield Headline("ppo over sft", share(row["win_rate"]), f"{by}, {interval}")
    if (stages.get("reward", {})).get("accuracy") is not None:
        ceiling = stages["reward"].get("noise_ceiling")
        note = "held-out pairs" + (f"; labelers' noise allows {ceiling:.0%}" if ceiling else "")
        yield Headline("Reward model's accuracy", share(stages["reward"]["accuracy"]), note)
    if stages.get("ppo", {}).get("kl") is not None:
        yield Headline("KL", f"{number(stages['ppo']['kl'])} nats", "per response, PPO from SFT")
    if stages.get("pretrain", {}).get("perplexity") is not None:
        yield Headline("Perplexity", number(stages["pretrain"]["perplexity"]), "pretrained model, held-out text")
    yield Headline("Training", duration(sum(report["seconds"].values())), "wall time of all stages")


def metric_rows(metrics: dict[str, Any], prefix: str = "", level: int = 1) -> list[tuple[str, Any]]:
    """Metrics by dotted name; the bins of calibration are a plot."""
    rows: list[tuple[str, Any]] = []
    for name, value in metrics.items():
        if name == "calibration":
            continue
        if isinstance(value, dict) and value and level < DEEPEST:
            rows += metric_rows(value, f"{prefix}{name}.", level + 1)
        else:
            rows.append((f"{prefix}{name}", value))
    return rows


def number(value: Any) -> str:
    """A value with three digits; nothing where there is none."""
    if value is None:
        return "–"
    if isinstance(value, float):
        if value == 0 or 1e-3 <= abs(value) < 1000:
            return f"{value:.3g}"
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.2e}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, list):
        return "[" + ", ".join(number(v) for v in value) + "]"
    if isinstance(value, dict):
        return ", ".join(f"{k}: {number(v)}" for k, v in value.items())
    return str(value)


def share(value: float | None) -> str:
    """A share as per cent; None has a name of its own."""
    return "not identified" if value is None else f"{value:.1%}"


def duration(seconds: float) -> str:
    """Seconds in the unit that a person would use."""
    for size, unit in ((86400 * 2, "days"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / (86400 if unit == 'days' else size):.1f} {unit}"
    return f"{seconds:.3g} s" if seconds >= 0.01 else "under 0.01 s"


def energy(kwh: float) -> str:
    """kWh, or Wh where little."""
    return f"{number(kwh)} kWh" if kwh >= 0.1 else f"{kwh * 1000:.3g} Wh"

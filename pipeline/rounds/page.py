"""The page of a report of rounds: one table, plots over the rounds, ratings; it needs no other file and no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline import evaluation
from pipeline.evaluation.page import number, share
from pipeline.evaluation.plots import Plot, curve

TEMPLATE = "rounds.html.j2"


def render(report: dict[str, Any]) -> str:
    """The page as HTML.

    Args:
        report: what `report.json` holds.
    """
    import jinja2
    from jinja2.utils import htmlsafe_json_dumps

    folders = [Path(__file__).parent, Path(evaluation.__file__).parent]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folders), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "share": share}
    return environment.get_template(TEMPLATE).render(
        report=report, plots=draw(report), data=htmlsafe_json_dumps(report)
    )


def draw(report: dict[str, Any]) -> list[Plot]:
    """The judge's mean, win rates, the reward model's accuracies and the KL, each over the rounds."""
    judge, rounds = report["judge"]["name"], report["rounds"]
    steps = [{**report["start"], "round": 0}, *rounds]
    plots = [
        curve(f"Mean {judge}", "round", judge, {judge: [(s["round"], s[judge]) for s in steps]}),
        curve(
            f"Win rate by {judge}",
            "round",
            "share of held-out prompts",
            {
                "over the round before": _points(rounds, "win_rate"),
                "over SFT": _points(rounds, "win_rate_over_sft"),
            },
        ),
        curve("KL from the SFT model", "round", "nats per response", {"KL": _points(rounds, "kl")}),
    ]
    names = {"accuracy_before": "before", "accuracy_after": "after", "held_out_accuracy_after": "after, held out"}
    series = {name: points for key, name in names.items() if (points := _points(rounds, key))}
    if series:
        plots.append(curve("Reward model on the round's labels", "round", "share of pairs", series))
    return plots


def _points(rounds: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(entry["round"], entry[key]) for entry in rounds if entry[key] is not None]

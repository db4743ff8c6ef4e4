"""Plots of a report: SVG that reads in light and in dark, each with the rows behind it."""

from __future__ import annotations

import base64
import contextlib
import csv
import io
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.training import history

COLORS = ("#3b82f6", "#d97706", "#059669", "#db2777", "#8b5cf6")  # each at 3:1 or more on white and on near-black
INK = "#010203"  # stands for the page's own text colour until the SVG is written
CURVES = {
    "pretrain": [
        ("Loss", "nats per token", ["loss", "eval_loss"]),
        ("Throughput", "tokens per second", ["tokens_per_second"]),
    ],
    "sft": [
        ("Loss", "nats per response token", ["loss", "eval_loss"]),
        ("Throughput", "tokens per second", ["tokens_per_second"]),
    ],
    "reward": [
        ("Loss", "nats per pair", ["loss", "eval_loss"]),
        ("Throughput", "tokens per second", ["tokens_per_second"]),
    ],
    "ppo": [
        ("Reward", "mean, after the missing-EOS rule", ["score", "eval_score"]),
        ("KL from the SFT model", "nats per response", ["kl", "eval_kl"]),
        ("Response length", "tokens", ["response_tokens", "eval_response_tokens"]),
        ("Entropy", "nats per token", ["entropy"]),
        ("Clipped policy ratios", "share of tokens", ["clip_fraction"]),
        ("Value loss", "squared reward units", ["value_loss"]),
        ("Throughput", "episodes per second", ["episodes_per_second"]),
    ],
}
HELD_OUT = "eval_"
MOST_BARS = 24  # places of a bar plot; all of them stand in its data
Series = dict[str, list[tuple[float, float]]]


@dataclass(frozen=True)
class Plot:
    """One drawn plot; `rows` are the points behind it."""

    title: str
    svg: str
    rows: list[dict[str, Any]]

    @property
    def csv(self) -> str:
        """The rows as a data URI, so that the page needs nothing beside itself."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(dict.fromkeys(key for row in self.rows for key in row)))
        writer.writeheader()
        writer.writerows(self.rows)
        return "data:text/csv;base64," + base64.b64encode(text.getvalue().encode()).decode()

    @property
    def file(self) -> str:
        return "".join(c if c.isalnum() else "-" for c in self.title.lower()) + ".csv"


def stage_curves(folder: Path, stage: str) -> list[Plot]:
    """The metrics that a stage logged, over its steps."""
    rows = history.read(folder)
    drawn = []
    for title, unit, keys in CURVES[stage]:
        names = {key: "held out" if key.startswith(HELD_OUT) else "training" for key in keys}
        series = {names[key]: [(row["step"], row[key]) for row in rows if _is_number(row.get(key))] for key in keys}
        series = {name: points for name, points in series.items() if points}
        if series:
            x = "rollout" if stage == "ppo" else "optimizer step"
            drawn.append(curve(f"{stage}: {title}", x, unit, series))
    return drawn


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def reward_model_plots(metrics: dict[str, Any]) -> list[Plot]:
    """Plots of a reward model: calibration, labelers against their own noise, length."""
    drawn: list[Plot] = []
    if "calibration" in metrics:
        series: Series = {"perfect": [(0.5, 0.5), (1.0, 1.0)]}
        for name, when in (("before", "as trained"), ("after", "temperature scaled")):
            series[when] = [(item["probability"], item["outcome"]) for item in metrics["calibration"][name]]
        title = f"reward: Calibration (ECE {metrics['ece_before_scaling']:.3f}, scaled {metrics['ece']:.3f})"
        drawn.append(curve(title, "stated probability of the preference", "share of pairs right", series))
    by_labeler = metrics.get("accuracy_by_labeler", {})
    if len(by_labeler) > 1:
        held_out = set(metrics.get("kept_out_labelers", []))
        names = {name: f"{name} (held out)" if name in held_out else name for name in by_labeler}
        groups = {"reward model": {names[n]: v for n, v in by_labeler.items() if v is not None}}
        if "noise_ceiling_by_labeler" in metrics:
            ceilings = metrics["noise_ceiling_by_labeler"]
            groups["what their noise allows"] = {names[n]: v for n, v in ceilings.items() if v is not None}
        drawn.append(bars("reward: Accuracy by labeler", "held-out pairs right", groups))
    by_length = metrics.get("length_bias", {}).get("accuracy_by_length_difference", {})
    for title, accuracies in (
        ("reward: Accuracy by length", by_length),
        ("reward: Accuracy by responses ranked", metrics.get("accuracy_by_size", {})),
        ("reward: Accuracy by confidence", metrics.get("accuracy_by_confidence", {})),
    ):
        values = {name: item["accuracy"] for name, item in accuracies.items() if item["accuracy"] is not None}
        if len(values) > 1:
            drawn.append(bars(title, "held-out pairs right", {"reward model": values}))
    return drawn


def curve(
    title: str,
    xlabel: str,
    ylabel: str,
    series: Series,
    labels: Sequence[str] = (),
) -> Plot:
    """Lines of one or more series; `labels` stand at the points of the first."""
    with _figure(title) as (axes, finish):
        for (name, points), color in zip(series.items(), COLORS, strict=False):
            axes.plot(
                *zip(*points, strict=True),
                label=name,
                color=color,
                marker="o" if len(points) < 20 else None,
                linestyle="none" if len(points) == 1 else "-",
                markersize=4,
                linewidth=1.6,
            )
        for (x, y), text in _apart(list(zip(next(iter(series.values())), labels, strict=False))):
            axes.annotate(text, (x, y), xytext=(4, -11), textcoords="offset points", fontsize=8)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.grid(alpha=0.25)
        if all(isinstance(x, int) for points in series.values() for x, _ in points):
            axes.xaxis.get_major_locator().set_params(integer=True)  # no round 1.5
        if len(series) > 1:
            axes.legend(frameon=False, fontsize=8.5)
        svg = finish()
    rows = [{"series": name, xlabel: x, ylabel: y} for name, points in series.items() for x, y in points]
    return Plot(title, svg, rows)


def _apart(labelled: list[tuple[tuple[float, float], str]]) -> list[tuple[tuple[float, float], str]]:
    """Points and labels without those that another label would cover; the last one stays."""
    if not labelled:
        return []
    reach = 0.08 * (max(x for (x, _), _ in labelled) - min(x for (x, _), _ in labelled))
    shown = [labelled[-1]]
    for item in labelled[-2::-1]:
        if all(abs(item[0][0] - other[0][0]) > reach for other in shown):
            shown.append(item)
    return shown


def bars(title: str, ylabel: str, groups: dict[str, dict[str, float]]) -> Plot:
    """Bars side by side: `groups` are series, their keys the places on the axis. Shares in [0, 1], one half marked."""
    places = list(dict.fromkeys(name for values in groups.values() for name in values))[:MOST_BARS]
    labels = [shorten_label(place) for place in places]
    width = 0.8 / len(groups)
    with _figure(title) as (axes, finish):
        for number, (group, values) in enumerate(groups.items()):
            at = [i + (number - (len(groups) - 1) / 2) * width for i in range(len(places))]
            heights = [values.get(place, 0.0) for place in places]
            axes.bar(at, heights, width * 0.92, label=group, color=COLORS[number])
        axes.axhline(0.5, color=COLORS[3], linewidth=1, linestyle=":")
        axes.set_xticks(
            range(len(places)),
            labels,
            fontsize=8.5,
            rotation=_rotation(labels),
            ha="right" if _rotation(labels) else "center",
        )
        axes.set_ylabel(ylabel)
        axes.set_ylim(0, 1)
        if len(groups) > 1:
            axes.figure.legend(frameon=False, fontsize=8.5, loc="outside lower center", ncols=len(groups))
        svg = finish()
    rows = [
        {"series": group, "name": name, ylabel: value}
        for group, values in groups.items()
        for name, value in values.items()
    ]
    return Plot(title, svg, rows)


def lineage_plot(lineages: dict[str, dict[str, Any]], changed: Collection[str]) -> Plot:
    """From data to policy: datasets above the stages that read them, arrows from parents; `changed` are stages whose
    weights on the disk are no longer those of their lineage."""
    title = "from data to policy"
    names = list(lineages)
    outside = {
        str(parent.get("path")): str(parent["weights_sha256"])
        for lineage in lineages.values()
        for parent in lineage["parents"]
        if parent.get("stage") not in lineages
    }
    rows: list[dict[str, Any]] = []
    with _figure(title, (2.3 * max(len(names), len(outside), 2), 3.4)) as (axes, finish):
        axes.set_axis_off()
        axes.set_xlim(-0.55, max(len(names), len(outside)) - 0.45)
        axes.set_ylim(-1.5 if outside else -0.6, 1.5)
        boxes: dict[str, Any] = {}

        def box(key: str, text: str, x: float, y: float, color: str) -> None:
            frame = {"boxstyle": "round,pad=0.5", "facecolor": "none", "edgecolor": color, "linewidth": 1.4}
            boxes[key] = axes.text(x, y, text, ha="center", va="center", fontsize=8, bbox=frame)

        def arrow(source: str, target: str) -> None:
            start, end = boxes[source].get_position(), boxes[target].get_position()
            far = start[1] == end[1] and abs(end[0] - start[0]) > 1
            style = {
                "arrowstyle": "->",
                "color": COLORS[3],
                "connectionstyle": "arc3,rad=0.35" if far else "arc3,rad=0",  # below the stages between
                "patchA": boxes[source].get_bbox_patch(),
                "patchB": boxes[target].get_bbox_patch(),
            }
            axes.annotate("", xy=end, xytext=start, arrowprops=style)

        for i, (name, lineage) in enumerate(lineages.items()):
            state = "weights changed since" if name in changed else "weights as written"
            color = COLORS[1] if name in changed else COLORS[0]
            box(name, f"{name}\n{lineage['weights_sha256'][:10]}\n{state}", i, 0.0, color)
            read = list(dict.fromkeys(shorten_label(str(d["name"])) for d in lineage["datasets"]))
            box(f"data of {name}", "\n".join(read) or "no data", i, 1.1, COLORS[2])
        for i, (path, sha256) in enumerate(outside.items()):
            box(path, f"{shorten_label(Path(path).name)}\n{sha256[:10]}\nfrom outside", i, -1.0, COLORS[4])
        for name, lineage in lineages.items():
            arrow(f"data of {name}", name)
            rows += [{"from": d["name"], "to": name, "sha256": d["sha256"]} for d in lineage["datasets"]]
            for parent in lineage["parents"]:
                source = parent["stage"] if parent.get("stage") in lineages else str(parent.get("path"))
                arrow(source, name)
                rows.append({"from": source, "to": name, "sha256": parent["weights_sha256"]})
        svg = finish()
    return Plot(title, svg, rows)


def _rotation(labels: Sequence[str]) -> int:
    """Degrees that keep the labels of an axis apart."""
    return 0 if sum(map(len, labels)) < 42 else 20 if len(labels) < 7 else 60


def shorten_label(text: str, limit: int = 24) -> str:
    """One line of a name from data."""
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


@contextlib.contextmanager
def _figure(title: str, size: tuple[float, float] = (4.6, 2.9)) -> Iterator[tuple[Any, Callable[[], str]]]:
    """A plot of one style: its axes, and what gives its SVG once they are drawn."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    ink = ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": title,
        "font.size": 10,
        "text.parse_math": False,  # a `$` in a labeler's name is a dollar
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": INK,
        **dict.fromkeys(ink, INK),
    }
    with pyplot.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the browser has the letters that matplotlib's font lacks
        figure, axes = pyplot.subplots(figsize=size, layout="constrained")
        axes.set_title(title, fontsize=11)

        def finish() -> str:
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
            svg = buffer.getvalue()
            return svg[svg.index("<svg") :].replace(INK, "currentColor")

        try:
            yield axes, finish
        finally:
            pyplot.close(figure)

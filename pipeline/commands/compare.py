"""`rlhf compare RUN_A RUN_B`: what differs between two runs in recipe, data, code and result, on one page."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from pipeline.config.stages import STAGES
from pipeline.errors import UserError, shorten
from pipeline.training.lineage import LINEAGE, read_lineage

from rich.console import Console
from rich.table import Table

# Where a run lies and how it talks are no differences of what it is.
PLACES = ("output_dir", "parent", "reward", "run_name", "report_to", "quiet", "data_root")
DEEPEST = 3  # levels of nested metrics that are compared one by one
EFFORT = ("seconds", "flops", "resumed_from")
COMPARED = {
    "stage": str, "recipe": dict, "datasets": list, "parents": list, "code": dict, "packages": dict, "hardware": dict,
    "metrics": dict, "weights_sha256": str,
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs=2, metavar="RUN", help="folder of a run, or of one stage")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    first, second = args.runs
    if os.path.realpath(first) == os.path.realpath(second):
        raise UserError(f"{first!r} and {second!r} are the same folder; name two runs")
    return compare_runs(first, second, args.json)


def compare_runs(first: str, second: str, as_json: bool = False) -> int:
    """Compare two runs' folders (of stages), or two stages' own folders.

    Raises:
        UserError: a folder holds no finished stage, or they have none in common.
    """
    runs = [_lineages(Path(first)), _lineages(Path(second))]
    shared = [stage for stage in STAGES if stage in runs[0] and stage in runs[1]]
    if not shared:
        stages = [", ".join(run) for run in runs]
        raise UserError(f"no stage in common: {first!r} has {stages[0]}, {second!r} has {stages[1]}")
    report = {
        "runs": [first, second],
        "only": {
            name: [stage for stage in run if stage not in shared]
            for name, run in zip((first, second), runs, strict=True)
        },
        "stages": {stage: differences(runs[0][stage], runs[1][stage]) for stage in shared},
    }
    if as_json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        _print(report)
    return 0


def _lineages(folder: Path) -> dict[str, dict[str, Any]]:
    if not folder.is_dir():
        raise UserError("is no folder of a run", file=folder)
    own = _checked_lineage(folder)
    if own is not None:
        return {str(own["stage"]): own}
    lineages = {stage: lineage for stage in STAGES if (lineage := _checked_lineage(folder / stage)) is not None}
    if not lineages:
        raise UserError("holds no finished stage; run `rlhf run` to its end first", file=folder)
    return lineages


def _checked_lineage(folder: Path) -> dict[str, Any] | None:
    """A finished stage's lineage; None where there is none.

    Raises:
        UserError: it is no lineage.
    """
    lineage: Any = read_lineage(folder)
    if lineage is None:
        return None
    known = lineage if isinstance(lineage, dict) else {}
    lacking = [key for key, kind in COMPARED.items() if not isinstance(known.get(key), kind)]
    if lacking:
        raise UserError(f"lacks {', '.join(lacking)}, or holds something else there", file=folder / LINEAGE)
    return known


def differences(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Differences between two lineages of one stage, by heading: name to [first, second]."""
    sections = {
        "recipe": _differ(_without_places(a["recipe"]), _without_places(b["recipe"])),
        "data": _differ(_datasets(a), _datasets(b)),
        "parents": _differ(_parents(a), _parents(b)),
        "code": _differ(a["code"], b["code"]),
        "packages": _differ(a["packages"], b["packages"]),
        "hardware": _differ(
            _flat({**a["hardware"], "processes": a.get("processes")}),
            _flat({**b["hardware"], "processes": b.get("processes")}),
        ),
        "result": _differ(_flat(a["metrics"]), _flat(b["metrics"])),
        "effort": _differ({key: a.get(key) for key in EFFORT}, {key: b.get(key) for key in EFFORT}),
    }
    same = a["weights_sha256"] == b["weights_sha256"]
    return {"same_weights": same, **{heading: rows for heading, rows in sections.items() if rows}}


def _without_places(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe without paths; of a reward, what is no path: its functions and weights."""
    rewards = recipe.get("reward")
    values = {key: value for key, value in recipe.items() if key not in PLACES}
    if isinstance(rewards, list):
        parts = [{key: v for key, v in part.items() if key != "model"} for part in rewards if isinstance(part, dict)]
        values["reward"] = parts
    return _flat(values)


def _datasets(lineage: dict[str, Any]) -> dict[str, Any]:
    return {
        str(d.get("name")): f"{_show(d.get('rows'))} rows, sha256 {str(d.get('sha256'))[:12]}"
        for d in lineage["datasets"]
    }


def _parents(lineage: dict[str, Any]) -> dict[str, Any]:
    return {
        p.get("stage") or "external": f"weights {(p.get('weights_sha256') or '?')[:12]}" for p in lineage["parents"]
    }


def _flat(values: dict[str, Any], prefix: str = "", level: int = 1) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value and level < DEEPEST:
            flat |= _flat(value, f"{prefix}{key}.", level + 1)
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _differ(a: dict[str, Any], b: dict[str, Any]) -> dict[str, list[Any]]:
    names = list(dict.fromkeys([*a, *b]))
    return {name: [a.get(name), b.get(name)] for name in names if a.get(name) != b.get(name)}


def _print(report: dict[str, Any]) -> None:
    console = Console(highlight=False)
    first, second = report["runs"]
    for name, stages in report["only"].items():
        if stages:
            console.print(f"only in {name}: {', '.join(stages)}", markup=False)
    for stage, sections in report["stages"].items():
        headings = [heading for heading in sections if heading != "same_weights"]
        same = "the same weights" if sections["same_weights"] else "other weights"
        if not headings:
            console.print(f"[bold]{stage}[/]: {same}, nothing differs")
            continue
        table = Table("", first, second, title=f"{stage}: {same}", title_justify="left")
        for heading in headings:
            table.add_section()
            table.add_row(f"[bold]{heading}[/]", "", "")
            for name, (a, b) in sections[heading].items():
                table.add_row(f"  {name}", _show(a), _show(b, a))
        console.print(table)


def _show(value: Any, against: Any = None) -> str:
    """A value, short; of numbers that are compared also the change."""
    if value is None:
        return "—"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        text = f"{value:,.4g}"
        if isinstance(against, int | float) and not isinstance(against, bool) and against:
            text += f" ({(value - against) / abs(against):+.1%})"
        return text
    return value if isinstance(value, str) and len(value) <= 60 else shorten(value, 60)

"""`rlhf compare RUN_A RUN_B`: what differs between two runs in recipe, data, code and result, on one page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.config.arguments import STAGES
from pipeline.errors import UserError, shorten
from pipeline.training.lineage import read_lineage

from rich.console import Console
from rich.table import Table

# Where a run lies and how it talks are no differences of what it is.
PLACES = ("output_dir", "parent", "reward", "run_name", "report_to", "quiet", "data_root")
DEEPEST = 3  # levels of nested figures that are compared one by one


def compare_runs(first: str, second: str, as_json: bool = False) -> int:
    """Compare two runs' folders (of stages), or two stages' own folders.

    Raises:
        UserError: a folder holds no finished stage, or they have none in common.
    """
    runs = [_lineages(Path(first)), _lineages(Path(second))]
    shared = [stage for stage in STAGES if stage in runs[0] and stage in runs[1]]
    if not shared:
        found = [", ".join(run) for run in runs]
        raise UserError(f"no stage in common: {first!r} has {found[0]}, {second!r} has {found[1]}")
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
    own = read_lineage(folder)
    if own is not None:
        return {own["stage"]: own}
    found = {stage: lineage for stage in STAGES if (lineage := read_lineage(folder / stage)) is not None}
    if not found:
        raise UserError("holds no finished stage; run `rlhf run` to its end first", file=folder)
    return found


def differences(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """What differs between two lineages of one stage, by heading: name to [first, second]."""
    found = {
        "recipe": _differ(_without_places(a["recipe"]), _without_places(b["recipe"])),
        "data": _differ(_datasets(a), _datasets(b)),
        "parents": _differ(_parents(a), _parents(b)),
        "code": _differ(a["code"], b["code"]),
        "packages": _differ(a["packages"], b["packages"]),
        "hardware": _differ(
            _flat({**a["hardware"], "processes": a["processes"]}), _flat({**b["hardware"], "processes": b["processes"]})
        ),
        "result": _differ(_flat(a["metrics"]), _flat(b["metrics"])),
        "effort": _differ(
            {key: a[key] for key in ("seconds", "flops", "resumed_from")},
            {key: b[key] for key in ("seconds", "flops", "resumed_from")},
        ),
    }
    same = a["weights_sha256"] == b["weights_sha256"]
    return {"same_weights": same, **{heading: rows for heading, rows in found.items() if rows}}


def _without_places(recipe: dict[str, Any]) -> dict[str, Any]:
    return _flat({key: value for key, value in recipe.items() if key not in PLACES})


def _datasets(lineage: dict[str, Any]) -> dict[str, Any]:
    return {d["name"]: f"{d['rows']:,} rows, sha256 {d['sha256'][:12]}" for d in lineage["datasets"]}


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
    for stage, found in report["stages"].items():
        headings = [heading for heading in found if heading != "same_weights"]
        same = "the same weights" if found["same_weights"] else "other weights"
        if not headings:
            console.print(f"[bold]{stage}[/]: {same}, nothing differs")
            continue
        table = Table("", first, second, title=f"{stage}: {same}", title_justify="left")
        for heading in headings:
            table.add_section()
            table.add_row(f"[bold]{heading}[/]", "", "")
            for name, (a, b) in found[heading].items():
                table.add_row(f"  {name}", _show(a), _show(b, a))
        console.print(table)


def _show(value: Any, against: Any = None) -> str:
    """A value, short; of numbers that are compared also the change."""
    if value is None:
        return "—"
    if isinstance(value, float):
        text = f"{value:,.4g}"
        if isinstance(against, int | float) and not isinstance(against, bool) and against:
            text += f" ({(value - against) / abs(against):+.1%})"
        return text
    return value if isinstance(value, str) and len(value) <= 60 else shorten(value, 60)

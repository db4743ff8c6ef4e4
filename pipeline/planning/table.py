"""A plan as text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table


def print_plan(report: dict[str, Any]) -> None:
    """Print what `plan.plan` returns."""
    console = Console(highlight=False)
    device = report["device"]
    console.print(
        f"[bold]{report['recipe']}[/] on {report['gpus']} × {device['name']} ({device['memory_gib']:g} GiB, {device['tflops']:g} TFLOP/s), "
        f"{report['sharding']}, at {report['mfu']:.0%} of the peak ({report['generation_mfu']:.0%} while generating)"
    )
    table = Table("", *report["stages"], "total")
    stages = list(report["stages"].values())

    def row(title: str, key: str, show: Callable[[Any], str], total: bool = False) -> None:
        table.add_row(title, *(show(stage[key]) for stage in stages), show(report["total"][key]) if total else "")

    row("parameters", "parameters", count)
    if any(stage["active_parameters"] != stage["parameters"] for stage in stages):
        row("of them active per token", "active_parameters", count)
    row("steps", "steps", lambda n: f"{n:,}")
    row("tokens", "tokens", count)
    row("petaflop/s-days", "petaflop_s_days", small, total=True)
    row("time", "hours", duration, total=True)
    row("energy", "energy_kwh", energy, total=True)
    row("cost, USD", "cost_usd", small, total=True)
    if report["gpus"] > 1:
        row("sent by a device per step", "exchange_per_step", size)
    for part in dict.fromkeys(part for stage in stages for part in stage["memory"]):
        sizes = (size(stage["memory"][part]) if part in stage["memory"] else "" for stage in stages)
        table.add_row(f"  {part}", *sizes, "")
    row("memory of a device", "memory_total", size)
    table.add_row("fits", *("yes" if stage["fits"] else "[red]no[/]" for stage in stages), "")
    largest = [next(iter(stage["largest_batch"].items())) for stage in stages]
    table.add_row("largest batch", *(f"{n:,} {key.replace('_', ' ')}" for key, n in largest), "")
    console.print(table)
    for name, stage in report["stages"].items():
        for note in [*stage["notes"], *stage["advice"]]:
            console.print(f"{name}: {note}", markup=False)


def count(n: float) -> str:
    for unit_size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= unit_size:
            return f"{n / unit_size:.3g} {unit}"
    return f"{n:.0f}"


def size(n: float) -> str:
    for unit_size, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB")):
        if n >= unit_size:
            return f"{n / unit_size:.3g} {unit}"
    return f"{n / 1024:.3g} KiB"


def duration(hours: float) -> str:
    """Hours in the unit that a person would use."""
    seconds = hours * 3600
    for unit_size, unit in ((2 * 86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= unit_size:
            return f"{small(seconds / (86400 if unit == 'days' else unit_size))} {unit}"
    return f"{seconds:.2g} s" if seconds >= 0.1 else "under 0.1 s"


def energy(kwh: float) -> str:
    return f"{small(kwh)} kWh" if kwh >= 0.1 else f"{small(kwh * 1000)} Wh" if kwh >= 1e-5 else "under 0.01 Wh"


def small(x: float) -> str:
    return f"{x:,.0f}" if x >= 1000 else f"{x:.3g}" if x >= 0.001 else "under 0.001"

"""The table of devices that plans and reports read: `devices.yaml`, and a user's own in the same form."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

import yaml


@dataclass(frozen=True)
class Device:
    """One accelerator: memory, dense bf16 peak, board power, rent."""

    name: str
    memory_gib: float
    tflops: float
    watts: float
    usd_per_hour: float
    bf16: bool = True

    def __post_init__(self) -> None:
        numbers = (self.memory_gib, self.tflops, self.watts, self.usd_per_hour)
        if not all(isinstance(number, int | float) and number >= 0 for number in numbers):
            raise ValueError(f"{self.name}: its numbers must be 0 or more")


def devices(extra: str | None = None) -> dict[str, Device]:
    """The table that ships, with a user's entries over it.

    Raises:
        UserError: the user's file is no such table.
    """
    table: dict[str, Device] = {}
    for file in [Path(__file__).with_name("devices.yaml"), *([Path(extra)] if extra else [])]:
        try:
            entries: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
            table |= {str(name).lower(): Device(str(name).lower(), **values) for name, values in entries.items()}
        except (OSError, ValueError, yaml.YAMLError, TypeError, AttributeError) as error:
            keys = ", ".join(f.name for f in dataclasses.fields(Device)[1:])
            raise UserError(f"is no table of devices (name: {{{keys}}}): {error}", file=file) from error
    return table


def device_called(name: str, known: Mapping[str, Device]) -> Device | None:
    """The entry of what a driver calls e.g. “NVIDIA A100-SXM4-80GB” or “NVIDIA GeForce RTX 4090”: the one all of whose parts
    are words of that name, or two of its words together."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    words += [first + second for first, second in itertools.pairwise(words)]
    fitting = [device for key, device in known.items() if set(key.split("-")) <= set(words)]
    return max(fitting, key=lambda device: len(device.name), default=None)


def energy(lineages: dict[str, dict[str, Any]], watts: float | None) -> dict[str, Any]:
    """Wall time × devices × board power: what a run may have drawn at most, hosts and cooling left out.

    Args:
        watts: of one device; without it that of `devices.yaml`, where the device is known.
    """
    result: dict[str, Any] = {"kwh": {}, "watts": {}, "unknown": []}
    table = devices()
    for stage, lineage in lineages.items():
        gpus = lineage["hardware"].get("gpus") or []
        known = device_called(gpus[0], table) if gpus else None
        power = watts if watts is not None else known.watts if known else None
        if power is None:
            result["unknown"].append(stage)
            continue
        used = lineage["processes"] if gpus else 1  # one device per process; on CPUs `watts` is the machine's
        result["watts"][stage] = power * used
        result["kwh"][stage] = lineage["seconds"] / 3600 * power * used / 1000
    return result

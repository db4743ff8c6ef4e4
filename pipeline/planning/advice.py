"""Changes of a recipe by which a stage needs less memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipeline.config.trainer import LoraOptions
from pipeline.planning.memory import GIB, Memory, Setting

MeasureMemory = Callable[[Any, Setting], Memory]
"""The memory of a stage by its recipe and where it runs."""


@dataclass(frozen=True)
class Switch:
    """One thing to try: its words, the recipe's keys that it changes, and the sharding that it needs."""

    words: str
    changes: dict[str, Any]
    sharding: str | None = None


def advice(name: str, recipe: Any, setting: Setting, needed: float, measure: MeasureMemory) -> list[str]:
    """Switches of the stage, one added to the other until it fits, each with what is then needed."""
    lines = [f"needs {needed / GIB:,.1f} GiB of {setting.room / GIB:,.1f} GiB that {setting.device.name} leaves (95 %)"]
    changes: dict[str, Any] = {}
    for switch in _switches(name, setting):
        unchanged = all(getattr(recipe, key) == value for key, value in switch.changes.items())
        if unchanged and switch.sharding is None:
            continue
        changes |= switch.changes
        setting = dataclasses.replace(setting, sharding=switch.sharding) if switch.sharding else setting
        total = measure(dataclasses.replace(recipe, **changes), setting).total
        fits = total <= setting.room
        lines.append(f"{switch.words}: {total / GIB:,.1f} GiB" + (", fits" if fits else ""))
        if fits:
            return lines
    return [*lines, "nothing that this stage offers makes it fit; take a larger device or a smaller model"]


def _switches(name: str, setting: Setting) -> list[Switch]:
    lora = LoraOptions()
    if name == "ppo":
        adapters = {"roles": "adapters", "lora": lora, "value_init": "policy"}
        return [
            Switch("roles: adapters, lora: {r: 16}", adapters),
            Switch("quantization: 4bit", {"quantization": "4bit"}),
            Switch("micro_batch_tokens: 1024", {"micro_batch_tokens": 1024}),
        ]
    switches = [
        Switch("gradient_checkpointing: true", {"gradient_checkpointing": True}),
        Switch("examples_per_device: 1", {"examples_per_device": 1}),
    ]
    adapts = name in ("sft", "reward")
    if adapts:
        switches.append(Switch("optimizer: adamw_8bit", {"optimizer": "adamw_8bit"}))
    if name in ("pretrain", "sft") and setting.gpus > 1 and setting.weight_shards == 1:
        words = f"--accelerate recipes/accelerate/fsdp2.yaml over {setting.gpus} GPUs"
        switches.append(Switch(words, {}, "fsdp2"))
    if adapts:
        switches.append(Switch("lora: {r: 16}", {"lora": lora}, "none" if setting.gpus == 1 else "ddp"))
        switches.append(Switch("quantization: 4bit", {"quantization": "4bit"}))
    return switches

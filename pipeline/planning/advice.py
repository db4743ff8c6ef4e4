"""Changes of a recipe or a launch by which a stage needs less memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config.trainer import LoraOptions
from pipeline.errors import UserError
from pipeline.planning.memory import GIB, USABLE, Memory, Setting

MeasureMemory = Callable[[Any, Setting], Memory]
"""The memory of a stage by its recipe and where it runs."""
MOST_DEVICES = 2**16  # that are tried
# Keys that change no result, up to rounding and, for an engine, random numbers.
SAME_TRAINING = (
    "micro_batch_tokens",
    "generation_rows",
    "gradient_checkpointing",
    "examples_per_device",
    "offload",
    "engine",
    "engine_url",
)
FSDP2 = "--accelerate recipes/accelerate/fsdp2.yaml"
BATCHES = dict.fromkeys(("pretrain", "sft", "reward"), "examples_per_step") | {"ppo": "prompts_per_rollout"}


@dataclass(frozen=True)
class Switch:
    """One thing to try: its words, the recipe's keys that it changes, and the sharding that it needs.

    halved: a number of the recipe that is halved until the stage fits, down to `least`; the words then name what it became.
    """

    words: str
    changes: dict[str, Any]
    sharding: str | None = None
    halved: str | None = None
    least: int = 1

    def choices(self, recipe: Any) -> list[dict[str, Any]]:
        """The changes to try, in this order; none where the recipe has them already."""
        if self.halved is None:
            unchanged = all(getattr(recipe, key) == value for key, value in self.changes.items())
            return [] if unchanged and self.sharding is None else [self.changes]
        value, found = int(getattr(recipe, self.halved)), []
        while value > self.least:
            value = max(self.least, value // 2)
            found.append({self.halved: value})
        return found


def refused_number(name: str, recipe: Any, gpus: int) -> str | None:
    """Why the stage does not run in so many processes, if so."""
    if divides(name, recipe, gpus):
        return None
    batch = f"{BATCHES[name]} ({getattr(recipe, BATCHES[name]):,}) must be a multiple of them"
    if name == "ppo":
        batch += f", and a minibatch ({recipe.prompts_per_rollout // recipe.minibatches:,} prompts) at least as large"
    return f"{name} refuses {gpus:,} processes: {batch}"


def divides(name: str, recipe: Any, gpus: int) -> bool:
    """Whether the stage runs in so many processes: each must get as many rows of a batch, and a prompt of each minibatch."""
    batch = int(getattr(recipe, BATCHES[name]))
    return batch % gpus == 0 and (name != "ppo" or gpus <= batch // recipe.minibatches)


@dataclass(frozen=True)
class Attempt:
    """A recipe with the switches so far: the last one's words, all changed keys, and whether it fits."""

    words: str
    changes: dict[str, Any]
    setting: Setting
    total: float

    @property
    def fits(self) -> bool:
        return self.total <= self.setting.room


def attempts(name: str, recipe: Any, setting: Setting, measure: MeasureMemory) -> Iterator[Attempt]:
    """Switches of the stage, one added to the other until it fits."""
    changes: dict[str, Any] = {}
    for switch in _switches(name, recipe, setting):
        where = dataclasses.replace(setting, sharding=switch.sharding) if switch.sharding else setting
        attempt = None
        for choice in switch.choices(dataclasses.replace(recipe, **changes)):
            changed = changes | choice
            try:
                total = measure(dataclasses.replace(recipe, **changed), where).total
            except UserError:  # this model does not do it: its layers cannot be recomputed, say
                break
            words = f"{switch.halved}: {choice[switch.halved]}" if switch.halved else switch.words
            attempt = Attempt(words, changed, where, total)
            if attempt.fits:
                break
        if attempt is not None:
            changes, setting = attempt.changes, where
            yield attempt
            if attempt.fits:
                return


def advice(name: str, recipe: Any, setting: Setting, tried: Sequence[Attempt], measure: MeasureMemory) -> list[str]:
    """What was tried, each with what is then needed; where none fits, more devices."""
    needed = measure(recipe, setting).total
    lines = [f"needs {needed / GIB:,.1f} GiB of {setting.room / GIB:,.1f} GiB that {setting.device.name} leaves (95 %)"]
    lines += [f"{a.words}: {a.total / GIB:,.1f} GiB" + (", fits" if a.fits else "") for a in tried]
    if any(attempt.fits for attempt in tried):
        return lines
    changed = dataclasses.replace(recipe, **tried[-1].changes) if tried else recipe
    smaller = {key: getattr(changed, key) for key in SAME_TRAINING if hasattr(changed, key)}
    return [*lines, *_more_devices(name, dataclasses.replace(recipe, **smaller), setting, measure)]


def _more_devices(name: str, recipe: Any, setting: Setting, measure: MeasureMemory) -> list[str]:
    """The fewest devices over which all parameters are trained in parts; else what does not shrink with their number."""
    numbers = [n for n in range(2, MOST_DEVICES) if divides(name, recipe, n)]
    if getattr(recipe, "quantization", None):  # refused under FSDP2
        numbers = []
    shared, memory = None, measure(recipe, setting)
    for gpus in numbers:
        over = dataclasses.replace(setting, gpus=gpus, sharding="fsdp2", replicas=1)
        memory = measure(recipe, over)
        if memory.total <= over.room:
            return [f"{FSDP2} over {gpus:,} GPUs: {memory.total / GIB:,.1f} GiB, fits"]
        if shared is None and memory.without_whole <= over.room:
            shared = gpus
    lines = []
    if numbers:
        most = f"{FSDP2} over {numbers[-1]:,} GPUs, the most that {BATCHES[name]} allows"
        lines.append(f"{most}: {memory.total / GIB:,.1f} GiB")
    if memory.whole:
        parts = ", ".join(f"the {part} ({size / GIB:,.1f} GiB)" for part, size in memory.whole.items())
        rest = f"all else fits over {shared:,} GPUs" if shared else "all else does not fit either"
        lines.append(f"every device holds {parts}, however many there are; {rest}")
    device = f"a device of {memory.total / USABLE / GIB:,.0f} GiB"
    remedies = f"{device} or" if memory.whole else f"{device}, a larger batch, or"
    return [*lines, f"nothing that this stage offers makes it fit; take {remedies} a smaller model"]


def _switches(name: str, recipe: Any, setting: Setting) -> list[Switch]:
    """Smaller batches first, then parts, then adapters; quantisation and 8-bit Adam only where models are whole."""
    can_shard = setting.gpus > 1 and not setting.shards_weights and divides(name, recipe, setting.gpus)
    shard = [Switch(f"{FSDP2} over {setting.gpus:,} GPUs", {}, "fsdp2")] if can_shard else []
    whole = not setting.shards_weights and not can_shard
    quantized = [Switch("quantization: 4bit", {"quantization": "4bit"})] if whole else []
    recomputed = Switch("gradient_checkpointing: true", {"gradient_checkpointing": True})
    if name == "ppo":
        adapters = {"roles": "adapters", "lora": LoraOptions(), "value_init": "policy"}
        small = Switch("", {}, halved="micro_batch_tokens", least=1024)
        few_rows = Switch("", {}, halved="generation_rows")
        offload = [Switch(f"offload: {parts}", {"offload": parts}) for parts in ("frozen", "all")]
        server = Switch("engine: vllm, on GPUs of its own", {"engine": "vllm", "engine_url": "http://localhost:8000"})
        servers = [server] if can_shard or setting.shards_weights else []  # else the policy is whole here anyway
        return [
            small,
            few_rows,
            recomputed,
            *offload,
            *shard,
            *servers,
            Switch("roles: adapters, lora: {r: 16}", adapters),
            *quantized,
        ]
    switches = [
        recomputed,
        Switch("examples_per_device: 1", {"examples_per_device": 1}),
        *shard,
    ]
    if name == "pretrain":
        return switches
    eight_bit = [Switch("optimizer: adamw_8bit", {"optimizer": "adamw_8bit"})] if whole else []
    return [*switches, *eight_bit, Switch("lora: {r: 16}", {"lora": LoraOptions()}), *quantized]

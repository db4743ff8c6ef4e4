"""One source of a reward: a reward model or a Python function, with a weight."""

from __future__ import annotations

import os
from dataclasses import dataclass

from pipeline.config.keys import key


@dataclass(frozen=True, kw_only=True)
class RewardSource:
    """One part of a score: a reward model's folder or a Python function, times a weight."""

    model: str | None = key(None, "folder or Hub id of a reward model", path=True)
    function: str | None = key(None, "module:function, (prompts, responses, rows) -> list of floats")
    weight: float = key(1.0, "factor of this part in the sum", -1e6, 1e6)

    def __post_init__(self) -> None:
        if (self.model is None) == (self.function is None):
            raise ValueError("a reward names exactly one of `model:` and `function:`")

    def __str__(self) -> str:
        """The flag that gives this source."""
        return str(self.model or self.function) + (f"*{self.weight:g}" if self.weight != 1.0 else "")


def reward_source(text: str) -> RewardSource:
    """`module:function` names a function, anything else a model (a path may hold no colon); `*0.2` after it is its weight."""
    name, star, factor = text.rpartition("*")
    try:
        weight = float(factor) if star else 1.0
    except ValueError:
        name, weight = text, 1.0
    name = name or text
    if ":" in name and "/" not in name:
        return RewardSource(function=name, weight=weight)
    return RewardSource(model=os.path.expanduser(name), weight=weight)

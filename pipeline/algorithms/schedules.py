"""Learning-rate factors by step."""

from __future__ import annotations

import math


def lr_factor(
    step: int, total: int, schedule: str, warmup: int = 0, floor: float = 0.0, warmup_from: float = 0.0
) -> float:
    """Factor of the peak learning rate at `step` (0-based) of `total`.

    A linear warm-up from `warmup_from` over `warmup` steps (the first step already moves: one `warmup`th), then "constant", "linear" to
    `floor`, or "cosine" to `floor` (InstructGPT: cosine to 0.1).
    """
    if step < warmup:
        return warmup_from + (1 - warmup_from) * (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    progress = min((step - warmup) / max(total - warmup, 1), 1.0)
    if schedule == "linear":
        return floor + (1 - floor) * (1 - progress)
    if schedule == "cosine":
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
    raise ValueError(f"unknown schedule {schedule!r}; one of constant, linear, cosine")

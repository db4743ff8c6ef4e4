"""KL against reward: PPO's evaluations, and where what was trained parts from what was not (Gao et al. 2023)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.training import history

import numpy as np

NOT_GOLD = (
    "step",
    "kl",
    "reward",
    "reference_score",
    "response_tokens",
    "reference_response_tokens",
    "stopped",
    "prompts",
)


def frontier(folder: Path) -> list[dict[str, Any]]:
    """Every evaluation of the PPO run: its KL, the trained score, and each judge's."""
    points = []
    for row in history.read(folder / "ppo"):
        if "eval_kl" in row:
            point = {"step": row["step"], "kl": row["eval_kl"], "reward": row["eval_score"]}
            point |= {
                k.removeprefix("eval_"): v
                for k, v in row.items()
                if k.startswith("eval_") and k not in ("eval_kl", "eval_score")
            }
            points.append(point)
    return points


def gold_judges(points: list[dict[str, Any]]) -> list[str]:
    """Judges of the evaluations that training never saw."""
    return [key for key in (points[0] if points else {}) if key not in NOT_GOLD and not key.startswith("score_")]


def over_optimisation(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Where proxy and gold part (Gao et al. 2023): the trained score went on rising, a judge that training never saw fell.

    A fall counts from a tenth of what that judge had gained (or of its best value, where it gained nothing), which noise of
    held-out means stays below.
    """
    found = []
    for judge in gold_judges(points):
        gold = [point[judge] for point in points]
        best = int(np.argmax(gold))
        gained = max(gold[best] - gold[0], 0.1 * abs(gold[best]))
        if (
            best < len(gold) - 1
            and points[-1]["reward"] > points[best]["reward"]
            and gold[best] - gold[-1] > 0.1 * gained
        ):
            found.append(
                {
                    "judge": judge,
                    "step": points[best]["step"],
                    "kl": points[best]["kl"],
                    "gold_best": gold[best],
                    "gold_end": gold[-1],
                    "proxy_then": points[best]["reward"],
                    "proxy_end": points[-1]["reward"],
                }
            )
    return found

"""The reward–KL curve of a PPO run, and where its reward parts from an independent judge (Gao et al. 2023)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

from pipeline.training import history

import numpy as np

SIGNIFICANCE = 0.05  # how often a judge whose mean never changes may be called fallen
LEAST_FALL = 0.1  # of what the judge had gained; of its best value, where it had gained nothing
Point = dict[str, Any]


@dataclass(frozen=True)
class OverOptimisation:
    """One judge's verdict.

    fell: the reward rose after the judge's best evaluation while the judge fell; None where it cannot be tested.
    step, kl: of the judge's best evaluation; kl in nats per response.
    """

    judge: str
    fell: bool | None
    step: int
    kl: float
    gold_best: float
    gold_end: float
    proxy_then: float
    proxy_end: float
    p_value: float | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def reward_kl_curve(folder: Path) -> list[Point]:
    """Every evaluation of the PPO run in `folder`: `step`, `kl`, `reward` (what was trained: the weighted sum after the
    missing-EOS rule), and all else that the evaluation measured, judges among it, by name."""
    points = []
    for row in history.read(folder / "ppo"):
        if "eval_kl" in row and "eval_score" in row:
            measured = {key.removeprefix("eval_"): value for key, value in row.items() if key.startswith("eval_")}
            points.append({"step": row["step"], "kl": measured.pop("kl"), "reward": measured.pop("score"), **measured})
    return points


def measured_judges(points: Sequence[Point], judges: Sequence[str]) -> list[str]:
    """Those of `judges` that every evaluation asked."""
    return [judge for judge in judges if points and all(judge in point for point in points)]


def over_optimisation(points: Sequence[Point], judges: Sequence[str]) -> list[OverOptimisation]:
    """Test of each judge that training never saw: did it fall from its best evaluation to the last, while the reward rose?

    The fall must exceed `LEAST_FALL` of what had been gained, and be significant: a one-sided z-test of the difference
    of the two means, their standard errors (`<judge>_se`) added in squares, Bonferroni-corrected because the best of
    several evaluations was chosen. Both evaluations answer the same prompts, which makes the test conservative.
    """
    return [_test(points, judge) for judge in measured_judges(points, judges) if len(points) > 1]


def _test(points: Sequence[Point], judge: str) -> OverOptimisation:
    gold = [float(point[judge]) for point in points]
    best = int(np.argmax(gold))
    peak, end = points[best], points[-1]
    fall, gained = gold[best] - gold[-1], gold[best] - gold[0]
    large = fall > LEAST_FALL * (gained if gained > 0 else abs(gold[best]))
    p_value = _p_value(fall, peak, end, judge=judge, tries=len(points) - 1) if best < len(points) - 1 else 1.0
    rose = end["reward"] > peak["reward"]
    fell = False if not (rose and large) else None if p_value is None else p_value < SIGNIFICANCE
    return OverOptimisation(
        judge=judge,
        fell=fell,
        step=peak["step"],
        kl=peak["kl"],
        gold_best=gold[best],
        gold_end=gold[-1],
        proxy_then=peak["reward"],
        proxy_end=end["reward"],
        p_value=p_value,
    )


def _p_value(fall: float, peak: Point, end: Point, *, judge: str, tries: int) -> float | None:
    """Of no fall, times the evaluations that the best was chosen from; None without standard errors."""
    errors = [float(point.get(f"{judge}_se", math.nan)) for point in (peak, end)]
    if not all(map(math.isfinite, errors)):
        return None
    if end.get("prompts") == 1:  # one answer has no deviation
        return None
    error = math.hypot(*errors)
    z = fall / error if error > 0 else math.inf if fall > 0 else 0.0
    return min(1.0, tries * (1 - NormalDist().cdf(z)))

"""Invariants that a healthy PPO run keeps: one warning per kind when one breaks, with the page that explains it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.algorithms.ppo import MAX_LOG_RATIO
from pipeline.rollout.rollout import Sample

logger = logging.getLogger("pipeline.ppo")
PAGE = "docs/ppo-troubleshooting.md"
FIRST_RATIO = {"fp32": 1e-3, "bf16": 0.1}  # log-ratio in a rollout's first minibatch, before any step
DRIFT = {"fp32": 1e-2, "bf16": 0.1}  # nats per token between sampling and training
EXPLAINED_VARIANCE, VALUE_GRADIENT = -1.0, 100.0  # a share of the variance; a multiple of max_grad_norm
SETTLED = 3  # rollouts after which the value model should have found the level of the returns
UNFINISHED = 0.5


@dataclass
class Alarms:
    """Warns once of each invariant that the metrics of a rollout break."""

    max_grad_norm: float
    precision: str
    _raised: set[str] = field(default_factory=set)

    def check(self, metrics: dict[str, float], rollout: int) -> None:
        """Look at the metrics of rollout number `rollout`, counted from 1."""
        for name, message in _broken(metrics, rollout, self.max_grad_norm, self.precision).items():
            if name not in self._raised:
                self._raised.add(name)
                logger.warning("ppo rollout %d: %s; see %s", rollout, message, PAGE)


def _broken(metrics: dict[str, float], rollout: int, max_grad_norm: float, precision: str) -> dict[str, str]:
    broken = {}
    first = metrics.get("first_minibatch_log_ratio", 0.0)
    if first > FIRST_RATIO[precision]:
        broken["first ratio"] = f"the first minibatch already has a log-ratio of {first:.2g}, which should be 0"
    if metrics.get("max_log_ratio", 0.0) >= MAX_LOG_RATIO:
        broken["ratio"] = f"a token's probability ratio exceeds e^{MAX_LOG_RATIO:g} and was limited to it"
    worst = metrics.get("sampling_drift_worst_response", 0.0)
    if worst > DRIFT[precision]:
        broken["drift"] = (
            f"log-probabilities of sampling and training differ by {metrics['sampling_drift']:.2g} nats per token, "
            f"by {worst:.2g} in the worst response"
        )
    explained = metrics.get("value_explained_variance", 0.0)
    if rollout > SETTLED and explained < EXPLAINED_VARIANCE:
        broken["explained variance"] = f"the value model explains a share of {explained:.2f} of the returns' variance"
    norm = metrics.get("value_grad_norm", 0.0)
    if rollout > SETTLED and norm > VALUE_GRADIENT * max_grad_norm:
        broken["value gradient"] = f"the value model's gradient norm is {norm:.3g}, max_grad_norm {max_grad_norm:g}"
    if metrics.get("stopped", 1.0) < UNFINISHED:
        broken["unfinished"] = f"only {metrics['stopped']:.0%} of the responses end within max_response_tokens"
    return broken


def warn_of_missing_eos_score(samples: Sequence[Sample], args: Any) -> None:
    """Warn before training if unfinished responses score above many finished ones: the policy would learn not to end."""
    finished = [sample.score for sample in samples if sample.finished]
    if args.missing_eos != "replace" or not finished:
        return
    below = sum(score < args.missing_eos_score for score in finished) / len(finished)
    if below > 0.01:
        logger.warning(
            "ppo: %.0f%% of the finished responses score below missing_eos_score (%g), so not ending pays; "
            "set it below nearly all of them, e.g. %.3g; see %s",
            100 * below,
            args.missing_eos_score,
            min(finished) - 0.5,
            PAGE,
        )

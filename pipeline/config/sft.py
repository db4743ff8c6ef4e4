"""Keys of the SFT stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.config.keys import key
from pipeline.config.rewards import RewardSource
from pipeline.config.trainer import AdapterArguments


@dataclass(frozen=True, kw_only=True)
class SFTArguments(AdapterArguments):
    """Supervised fine-tuning on demonstrations, loss on the responses only."""

    packing: bool = key(
        True, "pack several examples into one row of max_tokens, kept apart by position", group="Demonstrations"
    )
    loss_on: Literal["responses", "all"] = key("responses", "all: prompts too (as Huang et al. 2024)")
    best_metric: Literal["none", "loss", "token_accuracy", "score"] = key(
        "none", "evaluation metric that picks the kept checkpoint; none: the last", group="Selection"
    )
    score: list[RewardSource] = key([], "reward of sampled held-out responses, for best_metric: score")
    score_prompts: int = key(64, "held-out prompts answered greedily for best_metric: score", 1, 1e6)
    max_response_tokens: int = key(64, "longest sampled response for best_metric: score", 1, 1e6)
    learning_rate: float = key(1e-4, "peak learning rate (InstructGPT: 9.65e-6 for its 175B model)", 0, 10)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.best_metric != "none" and self.eval_steps is None:
            raise ValueError("best_metric needs `eval_steps:`, the steps between two evaluations")
        if (self.best_metric == "score") != bool(self.score):
            raise ValueError("`best_metric: score` and `score:` (a reward model or function) go together")
        if self.best_metric != "none" and self.save_steps != self.eval_steps:
            raise ValueError("with best_metric, save_steps must equal eval_steps: only a saved step can be kept")

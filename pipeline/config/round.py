"""Keys of `round.yaml`: how rounds of labels, reward model and PPO follow one another. reward.yaml and ppo.yaml stand beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pipeline.config.keys import key
from pipeline.data.entries import DatasetEntry


@dataclass(frozen=True, kw_only=True)
class RoundArguments:
    """Iterated RLHF (InstructGPT, section 3; Bai et al. 2022, section 4.5; Touvron et al. 2023, section 3.2)."""

    sft: str = key(
        "", "folder or Hub id of the SFT model, which all rounds are compared with", group="Start", path=True
    )
    reward: str | None = key(
        None, "reward model before the first round; without one, round 1 trains the first", path=True
    )
    policy: str | None = key(None, "policy before the first round; default: the SFT model", path=True)

    prompts: list[DatasetEntry] = key([], "prompts to sample answers for; default: those of ppo.yaml", group="Answers")
    prompts_per_round: int = key(200, "prompts that no round has had yet", 1, 1e7)
    answers: int = key(4, "answers sampled per prompt, by the newest policy and older ones in turn", 2, 26)
    older_policies: int = key(1, "older policies that answer too, the newest of them first; SFT is the oldest", 0, 100)
    temperature: float = key(1.0, "of the samples", 1e-3, 100)
    seed: int = key(0, "of the samples; round n takes seed + n", 0, 2**31)
    label: dict[str, Any] = key({}, "what label.yaml of each labeling folder says")
    guidelines: str | None = key(None, "file of guidelines for labelers, copied into each labeling folder", path=True)

    reward_from: Literal["sft", "last"] = key("sft", "what each reward model starts from", group="Training")
    earlier_comparisons: bool = key(True, "reward models train on the datasets of reward.yaml too")
    window: int | None = key(None, "newest rounds whose labels are trained on; default: all", 1, 1e6)
    weights: list[float] = key(
        [],
        "weight of the newest round's labels, of those before, …; the last one goes on; default: every row once",
        1e-9,
        1e9,
    )
    policy_from: Literal["sft", "last"] = key("sft", "what PPO starts from")
    reference: Literal["sft", "last"] = key("sft", "what the KL penalty keeps the policy near")

    def __post_init__(self) -> None:
        if not self.sft:
            raise ValueError("sft is missing; name the folder or Hub id of the SFT model")

    def weight_of(self, age: int) -> float | None:
        """The weight of the labels of the newest round (age 0), of the one before it (1), …; None without weights."""
        return self.weights[min(age, len(self.weights) - 1)] if self.weights else None

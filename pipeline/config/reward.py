"""Keys of the reward stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.config.keys import key
from pipeline.config.trainer import AdapterArguments
from pipeline.data.entries import DatasetEntry


@dataclass(frozen=True, kw_only=True)
class RewardArguments(AdapterArguments):
    """Reward model from comparisons; every ranking is one example, all its pairs in one step (InstructGPT, section 3.5)."""

    problems: Literal["drop", "error"] = key(
        "drop", "records that cannot be trained on: drop and list, or refuse", group="Comparisons"
    )
    ties: Literal["drop", "half", "margin"] = key(
        "drop",
        "pairs of equal rank: drop them (InstructGPT), train towards 0.5, or give ties a probability of their own "
        "(Rao and Kupper 1967)",
    )
    tie_margin: float = key(
        0.5, "ties: margin: how far apart scores must lie for even odds on being told apart", 1e-3, 100
    )
    confidence: Literal["ignore", "target", "weight"] = key(
        "ignore", "the records' `confidence`: probability that the preference is right, or weight of the record's loss"
    )
    label_smoothing: float = key(0.0, "probability that a preference was noted the wrong way round", 0, 0.499)
    group_by_length: bool = key(True, "batches of rankings of similar length: less padding")
    labeler_weights: dict[str, float] = key(
        {}, "weight of a labeler's records in the loss; 1 where none is named", 1e-12, 1e6, group="Labelers"
    )
    held_out_labelers: list[str] = key([], "labelers kept out of training, reported apart")
    labeler_folds: int | None = key(
        None, "K-fold over labelers (InstructGPT: 5 groups): labelers fall into so many groups …", 2, 1000
    )
    labeler_fold: int = key(0, "… and this one is kept out; `rlhf run --labeler-folds K` trains all", 0, 999)
    center_on: list[DatasetEntry] = key([], "demonstrations whose mean score becomes 0", group="Scores")
    unit_variance_samples: int | None = key(
        None,
        "scale scores to variance 1 over so many answers sampled from the parent (Ziegler et al. 2019: 256)",
        16,
        1_000_000,
    )
    head_std: float | None = key(
        None, "standard deviation of the new head; default: 1/sqrt(hidden + 1) (Stiennon et al. 2020)", 0, 10
    )
    truth: str | None = key(None, "module:function that knows the noiseless preference, for the noise ceiling")
    disable_dropout: bool = key(True, "no dropout while training")
    learning_rate: float = key(9e-6, "peak learning rate (InstructGPT: 9e-6)", 0, 10)
    held_out_fraction: float = key(0.1, "share of the prompts kept for evaluation, by hash", 0, 0.9)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.labeler_folds is not None:
            if self.held_out_labelers:
                raise ValueError("labeler_folds chooses the held-out labelers; drop held_out_labelers, or the folds")
            if self.labeler_fold >= self.labeler_folds:
                raise ValueError(f"labeler_fold counts from 0 to labeler_folds - 1, {self.labeler_folds - 1}")

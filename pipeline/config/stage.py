"""Keys of every stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.config.keys import key
from pipeline.data.entries import DatasetEntry

Precision = Literal["fp32", "bf16", "auto"]
TRACKERS = ("wandb", "tensorboard", "trackio", "none")


@dataclass(frozen=True, kw_only=True)
class StageArguments:
    """The keys that every stage has."""

    datasets: list[DatasetEntry] = key([], "the stage's data", group="Data")
    data_root: str = key(".", "what relative paths of datasets are relative to", path=True)
    data_cache: str | None = key(
        None, "folder of the data cache; default: $RLHF_DATA_CACHE, else ~/.cache/rlhf-pipeline/data", path=True
    )
    held_out_fraction: float = key(0.02, "share of the prompts (or documents) kept for evaluation, by hash", 0, 0.9)
    output_dir: str = key(
        "", "folder that the stage fills; a folder of another finished run is refused", group="Run", path=True
    )
    seed: int = key(0, "seed of everything random", 0, 2**32 - 1)
    precision: Precision = key("auto", "bf16 autocast over fp32 weights, or fp32; auto: bf16 where the hardware has it")
    save_dtype: Literal["fp32", "bf16"] = key(
        "fp32", "weights that the stage hands on; bf16: half the disk, each rounded once, scalar heads stay fp32"
    )
    threads: int | None = key(None, "CPU threads of each process; default: what the launcher set", 1, 4096)
    logging_steps: int = key(10, "steps (rollouts in PPO) between two logged lines", 1, 1e9)
    save_steps: int = key(100, "steps (rollouts in PPO) between two resumable checkpoints", 1, 1e9)
    keep_checkpoints: int = key(1, "newest resumable checkpoints kept while the stage runs", 1, 1e6)
    report_to: list[str] = key([], f"trackers: {', '.join(TRACKERS)}", group="Logging")
    run_name: str | None = key(None, "name of the run in trackers; default: the output folder's name")
    quiet: bool = key(False, "no progress bar; warnings and the summary line only")

    @property
    def trackers(self) -> list[str]:
        """`report_to` without `none`, by which a flag takes a recipe's trackers away."""
        return [tracker for tracker in self.report_to if tracker != "none"]

    def __post_init__(self) -> None:
        if not self.output_dir:
            raise ValueError("output_dir is missing; say where the stage shall write")
        if not self.datasets:
            raise ValueError("datasets is missing or empty; name at least one `- path:` or `- hub:`")
        for tracker in self.report_to:
            if tracker not in TRACKERS or (tracker == "none" and len(self.report_to) > 1):
                raise ValueError(f"report_to: unknown tracker {tracker!r}; known: {', '.join(TRACKERS)}")
        if self.save_steps % self.logging_steps:
            raise ValueError(
                f"save_steps ({self.save_steps}) must be a multiple of logging_steps ({self.logging_steps}), "
                "so that a resumed run logs the same lines"
            )

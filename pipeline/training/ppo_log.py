"""Where PPO writes its metrics: the history, the log, the terminal and the trackers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import shorten
from pipeline.training import history
from pipeline.training.json_files import write_json
from pipeline.training.progress import Progress
from pipeline.training.run import Run
from pipeline.training.trackers import PROJECT, log_samples

from accelerate import Accelerator

logger = logging.getLogger("pipeline.ppo")
SHOWN_METRICS = ("score", "kl", "response_tokens", "episodes_per_second", "eval_score", "eval_kl")
SHOWN_SAMPLES = 3


def throughput(tokens: int, episodes: int, seconds: float) -> dict[str, float]:
    """Metrics of a rollout's speed, its update included."""
    return {
        "seconds": seconds,
        "episodes_per_second": episodes / seconds,
        "response_tokens_per_second": tokens / seconds,
    }


class PPOLog:
    """Writes rank 0's metrics and samples; starts the recipe's trackers."""

    def __init__(self, run: Run[Any], accelerator: Accelerator):
        self.run, self.accelerator = run, accelerator
        if run.args.trackers:
            name = run.args.run_name or f"{Path(run.args.output_dir).parent.name}-ppo"
            accelerator.init_trackers(
                PROJECT,
                config={key: str(value) for key, value in run.output.recipe.items()},
                init_kwargs={"wandb": {"name": name}, "trackio": {"name": name, "resume": "allow"}},
            )

    def progress(self, done: int) -> Progress:
        """A context manager with `update()`, called once per rollout."""
        total = self.run.args.total_rollouts
        return Progress(total, "ppo", self.run, done=done, unit="rollout")

    def write(self, rollout: int, metrics: Mapping[str, float]) -> None:
        """One line of history.jsonl, and the same to the log and the trackers."""
        if self.run.is_main:
            rounded = {name: round(value, 8) for name, value in metrics.items()}
            history.append(self.run.output.folder, {"step": rollout, **rounded})
            shown = ", ".join(f"{name} {metrics[name]:.3f}" for name in SHOWN_METRICS if name in metrics)
            logger.info("ppo rollout %d/%d: %s", rollout, self.run.args.total_rollouts, shown)
        self.accelerator.log(dict(metrics), step=rollout)

    def samples(self, rollout: int, samples: Sequence[dict[str, Any]]) -> None:
        """Answers to held-out prompts: all to samples/, a few to the log, a table to trackers that have tables."""
        if not self.run.is_main:
            return
        folder = self.run.output.folder / "samples"
        folder.mkdir(exist_ok=True)
        write_json(folder / f"rollout-{rollout:06d}.json", list(samples))
        tables = [{name: value for name, value in sample.items() if name != "messages"} for sample in samples]
        log_samples(self.accelerator.trackers, tables, rollout)
        for sample in samples[:SHOWN_SAMPLES]:
            prompt, response = shorten(sample["prompt"], 60), shorten(sample["response"], 120)
            rule = "" if sample["finished"] else ", unfinished"
            logger.info("ppo sample: %s → %s (score %.2f%s)", prompt, response, sample["score"], rule)

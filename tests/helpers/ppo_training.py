"""A PPO stage that is opened and prepared as a launch does it, and handed to a test instead of being trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from helpers.worlds import write_recipe
from pipeline import ppo
from pipeline.config.ppo import PPOArguments
from pipeline.training.stage import Run, launch

Result = TypeVar("Result")


def with_training(
    folder: Path, policy: Path, body: str, use: Callable[[ppo.Training, Run[PPOArguments]], Result], **changes: Any
) -> Result:
    """What `use` returns of a stage that was prepared on a recipe of `worlds.write_recipe`."""
    results: list[Result] = []

    def stage(run: Run[PPOArguments]) -> None:
        results.append(use(ppo.prepare(run, ppo.open_inputs(run)), run))

    recipe = write_recipe(folder, policy, body, **changes)
    launch("ppo", PPOArguments, stage, ["--config", str(recipe)])
    return results[0]


def train_all(training: ppo.Training, run: Run[PPOArguments]) -> None:
    """The rest of the stage."""
    ppo.train(training, run)
    ppo.finish(training, run)


def one_rollout(training: ppo.Training, run: Run[PPOArguments]) -> Any:
    """The next rollout, collected but not learnt from, and its metrics."""
    prompts = training.prompts.of_rollout(training.state.rollout, run.args.prompts_per_rollout, run.args.seed)
    return ppo.collect_rollout(training.collector, prompts, training.state)

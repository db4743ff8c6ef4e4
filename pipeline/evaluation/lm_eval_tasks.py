"""Few-shot tasks (multiple choice, cloze) of each stage through lm-evaluation-harness, where it is installed."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import UserError
from pipeline.models.precision import accelerator_type


def require_lm_eval() -> None:
    """Raises UserError where the package is missing."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--tasks needs lm-evaluation-harness; pip install lm-eval, or drop --tasks")


def task_scores(
    folder: Path, stages: Sequence[str], tasks: Sequence[str], tasks_path: str | None, notes: list[str]
) -> dict[str, dict[str, dict[str, float]]]:
    """Scores by task, stage and metric; a task that fails is a note.

    Args:
        tasks: names that lm-eval knows, or of task files in `tasks_path` (they may read local data, so no network is needed).

    Raises:
        UserError: no such task.
    """
    if not tasks:
        return {}
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=tasks_path)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise UserError(
            f"--tasks: lm-eval knows no {', '.join(map(repr, unknown))}; --tasks-path names a folder of task files"
        )
    scores: dict[str, dict[str, dict[str, float]]] = {}
    for stage in stages:
        model = HFLM(pretrained=str(folder / stage), batch_size=8, device=accelerator_type())
        for task in tasks:
            try:
                results = lm_eval.simple_evaluate(
                    model, tasks=[task], task_manager=manager, bootstrap_iters=1000, verbosity="ERROR"
                )
            except Exception as error:  # whatever a task's own code and data raise
                why = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
                notes.append(f"lm-eval: {task} of {stage} was not measured: {why}")
                continue
            assert results is not None
            for name, metrics in results["results"].items():
                scores.setdefault(name, {})[stage] = {
                    key.removesuffix(",none"): value for key, value in metrics.items() if isinstance(value, float)
                }
    return scores

"""wandb, tensorboard and trackio: what they need here, runs that go on where they stopped, tables of sample answers.

Figures reach them through transformers' Trainer and accelerate, under the names of `history.jsonl`.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

logger = logging.getLogger("pipeline")
PROJECT = "rlhf-pipeline"
WANDB_ID = "wandb_id"  # file in the output folder; wandb's own name of the run


def installed(package: str) -> bool:
    """Whether a package is here; tensorboard has two."""
    names = ("tensorboard", "tensorboardX") if package == "tensorboard" else (package,)
    return any(importlib.util.find_spec(name) for name in names)


def wandb_login() -> bool:
    """Whether wandb has a log-in, or is set to offline."""
    if os.environ.get("WANDB_MODE") in ("offline", "disabled") or os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path.home() / ".netrc"
    return netrc.is_file() and "wandb" in netrc.read_text(encoding="utf-8", errors="replace")


def check_installed(trackers: Sequence[str]) -> None:
    """Raises:
    UserError: a tracker is not installed.
    """
    for tracker in trackers:
        if not installed(tracker):
            raise UserError(f"report_to: {tracker} is not installed; pip install {tracker}, or say `report_to: [none]`")


def set_up(trackers: Sequence[str], folder: Path, rank: int) -> None:
    """Before a stage starts.

    Raises:
        UserError: a tracker is not installed.
    """
    check_installed(trackers)
    if "trackio" in trackers:
        os.environ.setdefault("TRACKIO_PROJECT", PROJECT)
    if "wandb" not in trackers:
        return
    os.environ.setdefault("WANDB_DIR", str(folder))
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_PROJECT", PROJECT)
    if "WANDB_MODE" not in os.environ and not wandb_login():
        logger.info("wandb: no log-in found, writing offline to %s/wandb", folder)
        os.environ["WANDB_MODE"] = "offline"
    if rank == 0 and "WANDB_RUN_ID" not in os.environ:
        os.environ |= {"WANDB_RUN_ID": wandb_id(folder), "WANDB_RESUME": "allow"}


def wandb_id(folder: Path) -> str:
    """The id of the folder's run: a stage that resumes from a checkpoint goes on in its old one."""
    file = folder / WANDB_ID
    if file.is_file() and any(folder.glob("checkpoint-*")):
        return file.read_text(encoding="utf-8").strip()
    run_id = secrets.token_hex(4)
    file.write_text(run_id + "\n", encoding="utf-8")
    return run_id


def log_samples(trackers: Sequence[Any], samples: Sequence[dict[str, Any]], step: int) -> None:
    """A table of sample answers in each of accelerate's trackers that has tables (tensorboard: text)."""
    if not samples:
        return
    columns = list(samples[0])
    rows = [[sample[column] for column in columns] for sample in samples]
    for tracker in trackers:
        if tracker.name == "wandb":
            tracker.log_table("samples", columns=columns, data=rows, step=step)
        elif tracker.name == "trackio":
            import pandas
            import trackio

            tracker.log({"samples": trackio.Table(dataframe=pandas.DataFrame(rows, columns=columns))}, step=step)
        elif tracker.name == "tensorboard":
            lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
            lines += [" | ".join(_cell(value) for value in row) for row in rows]
            tracker.tracker.add_text("samples", "\n".join(lines), step)


def _cell(value: Any) -> str:
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", "<br>")

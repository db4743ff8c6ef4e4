"""Trackers: a run that resumes goes on in its own wandb run; evaluations leave tables of sample answers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pipeline.training import ppo_log, trackers

import pytest

SAMPLES = [{"prompt": "a | b\nc", "response": "yes", "score": 0.5}, {"prompt": "d", "response": "no", "score": -1.0}]


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_RUN_ID", "WANDB_RESUME", "WANDB_MODE", "WANDB_API_KEY", "WANDB_DIR", "WANDB_PROJECT"):
        monkeypatch.setenv(name, "")  # so that what is set in a test is taken back after it
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_a_run_keeps_its_id_while_there_is_something_to_resume(tmp_path: Path) -> None:
    first = trackers.wandb_id(tmp_path)
    assert trackers.wandb_id(tmp_path) != first, "without a checkpoint it starts anew"
    second = trackers.wandb_id(tmp_path)
    (tmp_path / "checkpoint-5").mkdir()
    assert trackers.wandb_id(tmp_path) == second


def test_wandb_is_set_up_by_one_process_and_offline_without_a_log_in(tmp_path: Path) -> None:
    import os

    trackers.set_up(["wandb"], tmp_path, rank=1)
    assert "WANDB_RUN_ID" not in os.environ
    trackers.set_up(["wandb"], tmp_path, rank=0)
    assert os.environ["WANDB_RUN_ID"] == (tmp_path / trackers.WANDB_ID).read_text().strip()
    assert (os.environ["WANDB_RESUME"], os.environ["WANDB_MODE"]) == ("allow", "offline")


def test_a_users_own_run_id_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    trackers.set_up(["wandb"], tmp_path, rank=0)
    assert os.environ["WANDB_RUN_ID"] == "mine"
    assert not (tmp_path / trackers.WANDB_ID).exists()


def test_tables_reach_each_tracker() -> None:
    logged: list[Any] = []
    wandb = SimpleNamespace(name="wandb", log_table=lambda *args, **kwargs: logged.append(("wandb", args, kwargs)))
    writer = SimpleNamespace(add_text=lambda *args: logged.append(("tensorboard", args)))
    tensorboard = SimpleNamespace(name="tensorboard", tracker=writer)
    trackers.log_samples([wandb, tensorboard], SAMPLES, 7)
    assert logged[0] == (
        "wandb", ("samples",),
        {"columns": ["prompt", "response", "score"], "data": [["a | b\nc", "yes", 0.5], ["d", "no", -1.0]], "step": 7},
    )  # fmt: skip
    (tag, text, step) = logged[1][1]
    assert (tag, step) == ("samples", 7)
    assert text.splitlines()[2] == "a \\| b<br>c | yes | 0.500"
    trackers.log_samples([wandb], [], 8)
    assert len(logged) == 2


def test_ppo_leaves_tables_and_one_wandb_run(
    chain: Path, recipes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage that was interrupted writes both of its parts under one id, each evaluation with its table."""
    from helpers.launches import tiny_flags
    from pipeline import ppo
    from pipeline.config.stages import STAGES
    from pipeline.training.stage import launch

    import wandb

    inits: list[Any] = []
    original = wandb.init

    def init(*args: Any, **kwargs: Any) -> Any:
        inits.append(original(*args, **kwargs))
        return inits[-1]

    monkeypatch.setattr(wandb, "init", init)
    tables: list[int] = []
    log = ppo_log.log_samples
    monkeypatch.setattr(ppo_log, "log_samples", lambda t, s, step: (tables.append(step), log(t, s, step)))
    flags = tiny_flags(
        "ppo", tmp_path, config=recipes / "ppo.yaml", report_to="wandb", parent=chain / "sft", reward=chain / "reward",
        total_rollouts=4, save_steps=2, logging_steps=1, eval_rollouts=2,
    )  # fmt: skip
    save = ppo.save_checkpoint

    def save_and_die(*args: Any, **options: Any) -> None:
        save(*args, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ppo, "save_checkpoint", save_and_die)
        with pytest.raises(SystemExit, match="130"):
            launch("ppo", STAGES["ppo"], ppo.main, flags)
    wandb.finish()
    import os

    os.environ.pop("WANDB_RUN_ID")  # the next start is another process
    launch("ppo", STAGES["ppo"], ppo.main, flags)
    assert len(inits) == 2
    assert inits[0].id == inits[1].id
    assert tables == [0, 2, 4]
    out = Path(flags[flags.index("--output_dir") + 1])
    assert list(out.glob("wandb/offline-run-*/files/media/table/samples_*.json"))

"""Runs of rounds that nothing trained: random models of a few thousand parameters, with the lineages and labels of finished rounds."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.labeling import add_labeler, number, send, work
from helpers.runs import make_run, write_lineage
from pipeline.labeling.project import open_project
from pipeline.rounds.folder import open_rounds

import torch
import yaml
from safetensors.torch import load_file, save_file

STEP = 0.3  # by which a round's weights are moved


@dataclass(frozen=True)
class RoundsWorld:
    """base: a finished run, whose sft and reward the rounds start from; recipe: round.yaml, reward.yaml, ppo.yaml."""

    base: Path
    recipe: Path
    run: Path


def make_world(
    folder: Path, tokenizer: Any, reward: bool = True, prompts: list[Any] | None = None, **keys: Any
) -> RoundsWorld:
    base = make_run(folder / "base" / "run", tokenizer, prompts)
    recipe = folder / "recipe"
    recipe.mkdir()
    data = [{"path": str(base.parent / "prompts.jsonl")}]
    start = {"sft": str(base / "sft"), **({"reward": str(base / "reward")} if reward else {})}
    files: dict[str, Any] = {
        "round": {**start, "prompts_per_round": 12, "answers": 3, "label": {"strength": False}, **keys},
        "reward": {"parent": str(base / "sft"), "output_dir": "runs/r", "datasets": [{"path": "data_cards/demo_comparisons"}]},
        "ppo": {
            "parent": str(base / "sft"), "output_dir": "runs/p", "datasets": data, "reward": [{"model": str(base / "reward")}],
            "held_out_fraction": 0.3, "max_response_tokens": 8, "max_prompt_tokens": 100,
        },
    }  # fmt: skip
    for name, values in files.items():
        (recipe / f"{name}.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return RoundsWorld(base, recipe, folder / "rounds")


def label_everything(folder: Path, name: str = "ana", ranks: list[int] | None = None) -> None:
    """One labeler ranks all that they are given, in the order shown or by `ranks`."""
    project = open_project(folder)
    add_labeler(folder, name)
    while item := work(project, name):
        count = len(
            json.loads(
                project.store.connection.execute("SELECT lengths FROM items WHERE id = ?", (item,)).fetchone()[0]
            )
        )
        send(project, item, name, raw={"ranks": ranks or list(range(1, count + 1))})
    assert number(project, name)
    project.store.close()


def finish_round(world: RoundsWorld, n: int, labels: list[dict[str, Any]] | None = None) -> Path:
    """Put a trained reward model and policy into a round, and labels as they were frozen."""
    run = open_rounds(world.run, str(world.recipe))
    folder = run.round(n).path
    folder.mkdir(parents=True, exist_ok=True)
    starts = {part: model.identified(("sft", "reward", "ppo")) for part, model in run.starts(n).items()}
    run.round(n).write(round=n, starts=starts, **run.check_models(n))
    prompts = {"datasets": [], "eval_datasets": [{"path": str(world.base.parent / "prompts.jsonl")}]}
    ppo = {**prompts, "max_prompt_tokens": 100, "max_response_tokens": 8, "judges": ["rubric:score"], "stop_tokens": []}
    ppo["reward"] = [{"model": str(folder / "reward"), "function": None, "weight": 1.0}]
    for stage, recipe in (("reward", {"datasets": [], "held_out_fraction": 0.3}), ("ppo", ppo)):
        shutil.copytree(world.base / stage, folder / stage)
        _move_weights(folder / stage / "model.safetensors", n)
        write_lineage(folder, stage, recipe, score=0.1)
    if labels is not None:
        (folder / "labels").mkdir(exist_ok=True)
        text = "".join(json.dumps(row) + "\n" for row in labels)
        (folder / "labels" / "rankings.jsonl").write_text(text, encoding="utf-8")
    return folder


def _move_weights(path: Path, seed: int) -> None:
    """Other weights, as training would leave them."""
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: w + STEP * torch.randn(w.shape, generator=generator) * w.std() for name, w in load_file(path).items()
    }
    save_file(weights, path, metadata={"format": "pt"})

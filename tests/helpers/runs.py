"""Finished runs that nothing trained: random models of a few thousand parameters with the lineages of all four stages."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from helpers.tiny_models import make_lm
from pipeline.data.sources import digest_of
from pipeline.training.identity import weights_sha256

import torch
from transformers import AutoModelForSequenceClassification

PROMPTS = [f"My parcel number {i} never arrived. What now?" for i in range(60)]
DOCUMENTS = [f"Once there was a parcel with the number {i}, and it was late." for i in range(40)]


def make_run(folder: Path, tokenizer: Any, prompts: list[Any] | None = None, **ppo_recipe: Any) -> Path:
    """A run's folder with pretrain, sft, reward and ppo; `ppo_recipe` changes PPO's recipe."""
    folder.mkdir(parents=True)
    (folder.parent / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts or PROMPTS), encoding="utf-8"
    )
    (folder.parent / "documents.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS), encoding="utf-8"
    )
    lm = make_lm("llama", tokenizer)
    for number, stage in enumerate(("pretrain", "sft", "ppo")):
        model = copy.deepcopy(lm)
        with torch.no_grad():
            model.lm_head.weight += 0.05 * number
        save(model, tokenizer, folder / stage)
    config = copy.deepcopy(lm.config)
    config.num_labels, config.pad_token_id = 1, tokenizer.pad_token_id
    torch.manual_seed(1)
    save(AutoModelForSequenceClassification.from_config(config), tokenizer, folder / "reward")
    ppo: dict[str, Any] = {
        "datasets": [], "eval_datasets": [{"path": "prompts.jsonl"}], "max_prompt_tokens": 100, "max_response_tokens": 12,
        "temperature": 1.0, "stop_tokens": [], "reward": [{"model": str(folder / "reward"), "function": None, "weight": 1.0}],
        "missing_eos": "replace", "missing_eos_score": -1.0, "judges": ["rubric:score"], **ppo_recipe,
    }  # fmt: skip
    text = {"datasets": [{"path": "documents.jsonl"}], "held_out_fraction": 0.3, "block_tokens": 32}
    write_lineage(folder, "pretrain", text, perplexity=9.0)
    write_lineage(folder, "sft", {"datasets": []}, parents=["pretrain"], loss=2.0)
    write_lineage(
        folder, "reward", {"datasets": []}, parents=["sft"], accuracy=0.7, accuracy_ci95=[0.6, 0.8], held_out_pairs=90
    )
    write_lineage(folder, "ppo", ppo, parents=["sft", "reward"], score=0.5, reference_score=0.1, kl=2.0)
    return folder


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_lineage(
    run: Path, stage: str, recipe: dict[str, Any], parents: list[str] | None = None, **metrics: Any
) -> None:
    """The lineage of a stage whose weights are there; its data is what lies there now."""
    paths = [run.parent / entry["path"] for key in ("datasets", "eval_datasets") for entry in recipe.get(key, [])]
    values = {
        "stage": stage, "status": "complete", "config": None, "fingerprint": stage, "seconds": 60.0, "flops": 1e9,
        "recipe": {"data_root": str(run.parent), **recipe},
        "parents": [
            {"path": str(run / parent), "stage": parent, "weights_sha256": weights_sha256(run / parent)}
            for parent in parents or []
        ],
        "datasets": [{"name": path.stem, "rows": 1, "sha256": digest_of([path])} for path in paths],
        "weights_sha256": weights_sha256(run / stage), "metrics": metrics, "processes": 1, "hardware": {"cpus": 2},
        "code": {"version": "0", "git_commit": "abc", "dirty": False}, "packages": {}, "finished": "2026-01-01T00:00:00",
        "resumed_from": [],
    }  # fmt: skip
    (run / stage / "lineage.json").write_text(json.dumps(values), encoding="utf-8")


def change_lineage(run: Path, stage: str, **changes: Any) -> None:
    """Change keys of a lineage; `recipe` and `metrics` are merged into what is there."""
    path = run / stage / "lineage.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    for key, value in changes.items():
        values[key] = {**values[key], **value} if key in ("recipe", "metrics") else value
    path.write_text(json.dumps(values), encoding="utf-8")


def write_history(run: Path, rewards: list[float], judged: list[float], error: float | None) -> None:
    """Evaluations of PPO: the reward and the judge `rubric`, whose standard errors are `error`."""
    more = {} if error is None else {"eval_rubric_se": error}
    rows = [
        {"step": 10 * i, "eval_kl": 2.0 * i, "eval_score": reward, "eval_rubric": value, "eval_prompts": 64, **more}
        for i, (reward, value) in enumerate(zip(rewards, judged, strict=True))
    ]
    (run / "ppo" / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

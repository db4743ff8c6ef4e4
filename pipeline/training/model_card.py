"""The model card of a stage's output, in the Hub's format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TITLES = {
    "pretrain": "Pretrained language model",
    "sft": "Supervised fine-tuned model",
    "reward": "Reward model",
    "ppo": "PPO policy",
}


MEASURED = {
    "pretrain": ("perplexity", "bits_per_byte"),
    "sft": ("perplexity", "token_accuracy"),
    "reward": ("accuracy", "ece"),
    "ppo": ("score", "kl"),
}  # what the Hub shows beside a model


def write_model_card(
    folder: Path,
    stage: str,
    recipe: dict[str, Any],
    parents: list[dict[str, Any]],
    datasets: list[dict[str, Any]],
    metrics: dict[str, Any],
) -> None:
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    task = "text-classification" if stage == "reward" else "text-generation"
    names = ", ".join(dict.fromkeys(d["name"] for d in datasets)) or "nothing"
    results = [
        EvalResult(
            task_type=task,
            dataset_type=names,
            dataset_name=f"held-out part of {names}",
            metric_type=name,
            metric_value=metrics[name],
            verified=False,
        )
        for name in MEASURED[stage]
        if isinstance(metrics.get(name), int | float)
    ]
    data = ModelCardData(
        model_name=f"{folder.parent.name}-{stage}",
        library_name="transformers",
        pipeline_tag=task,
        tags=["rlhf", stage],
        eval_results=results,
    )
    figures = "\n".join(
        f"| {name} | {_figure(value)} |" for name, value in metrics.items() if not isinstance(value, dict | list)
    )
    sources = "\n".join(f"- {d['name']}: {d['rows']:,} rows, sha256 `{d['sha256'][:12]}`" for d in datasets)
    parent = "\n".join(
        f"- {p['path']} ({p.get('stage') or 'external'}), weights sha256 `{p['weights_sha256'][:12]}`" for p in parents
    )
    settings = "\n".join(
        f"| {key} | {value} |"
        for key, value in recipe.items()
        if isinstance(value, int | float | str) and key != "output_dir"
    )
    text = f"""---
{data.to_yaml()}
---

# {TITLES[stage]}

Written by the {stage} stage of rlhf-pipeline; `lineage.json` beside this card holds the full recipe, hashes and versions.

## Figures

| figure | value |
|---|---|
{figures}

## Data

{sources}

## Parents

{parent or "- none: trained from random weights"}

## Limits

The figures come from the held-out part of the data above and say nothing of other data. A score of a reward model
means agreement with its labelers, not truth or safety.

## Settings

| key | value |
|---|---|
{settings}
"""
    ModelCard(text).save(folder / "README.md")


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

"""The model card of a stage's output, in the Hub's format. It names no local path and quotes no text of the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.training.identity import NOT_IDENTITY

TITLES = {
    "pretrain": "Pretrained language model",
    "sft": "Supervised fine-tuned model",
    "reward": "Reward model",
    "ppo": "PPO policy",
}
# What the Hub shows beside a model.
HEADLINES = {
    "pretrain": ("perplexity", "bits_per_byte"),
    "sft": ("perplexity", "token_accuracy"),
    "reward": ("accuracy", "ece"),
    "ppo": ("score", "kl"),
}
LINEAGE_NOTE = "`lineage.json` beside this card holds the full recipe, hashes and versions."


def write_model_card(
    folder: Path,
    stage: str,
    *,
    recipe: Mapping[str, Any],
    parents: Sequence[Mapping[str, Any]],
    datasets: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, Any],
    name: str | None = None,
    note: str = LINEAGE_NOTE,
) -> None:
    """Write `README.md` to a folder.

    Args:
        parents, datasets: entries of lineage.json.
        name: of the model; default: run and stage.
        note: what else lies beside the card.
    """
    from huggingface_hub import ModelCard

    sources = "\n".join(f"- {d['name']}: {d['rows']:,} rows, sha256 `{d['sha256'][:12]}`" for d in datasets)
    lines = "\n".join(f"- {_name(p)}, weights sha256 `{p['weights_sha256'][:12]}`" for p in parents)
    settings = {key: value for key, value in recipe.items() if key not in NOT_IDENTITY}
    text = f"""---
{_head(name or f"{folder.resolve().parent.name}-{stage}", stage, parents, datasets, metrics)}
---

# {TITLES[stage]}

Written by the {stage} stage of rlhf-pipeline. {note}

## Metrics

{_table("metric", metrics)}

## Data

{sources or "- none"}

## Parents

{lines or "- none: trained from random weights"}

## Limits

The metrics come from the held-out part of the data above and say nothing of other data. A score of a reward model
means agreement with its labelers, not truth or safety.

## Settings

{_table("key", settings)}
"""
    ModelCard(text).save(folder / "README.md")


def _head(
    name: str,
    stage: str,
    parents: Sequence[Mapping[str, Any]],
    datasets: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, Any],
) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    task = "text-classification" if stage == "reward" else "text-generation"
    names = ", ".join(dict.fromkeys(d["name"] for d in datasets)) or "nothing"
    results = [
        EvalResult(
            task_type=task,
            dataset_type=names,
            dataset_name=f"held-out part of {names}",
            metric_type=metric,
            metric_value=metrics[metric],
            verified=False,
        )
        for metric in HEADLINES[stage]
        if isinstance(metrics.get(metric), int | float)
    ]
    first = parents[0] if parents else {}
    data = ModelCardData(
        base_model=first.get("base_model") or first.get("hub"),
        model_name=name,
        library_name="transformers",
        pipeline_tag=task,
        tags=["rlhf", stage],
        eval_results=results,
    )
    return str(data.to_yaml())


def _name(parent: Mapping[str, Any]) -> str:
    hub = parent.get("hub") or (parent.get("base_model") if parent.get("stage") is None else None)
    return hub or (f"the {parent['stage']} stage" if parent.get("stage") else "an external model")


def _table(name: str, values: Mapping[str, Any]) -> str:
    scalars = {key: value for key, value in values.items() if isinstance(value, int | float | str)}
    rows = [
        f"| {key} | {value:.4g} |" if isinstance(value, float) else f"| {key} | {value} |"
        for key, value in scalars.items()
    ]
    return "\n".join([f"| {name} | value |", "|---|---|", *rows])

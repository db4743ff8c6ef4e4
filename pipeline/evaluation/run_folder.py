"""A run's folder: the lineages of its finished stages, what no longer is what it was, and its held-out prompts.

A folder may come from anybody. What stands in its files is data: wrong shapes are notes, and no code that it names runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config.stages import STAGES
from pipeline.data.encoding import ChatEncoder
from pipeline.data.entries import DatasetEntry
from pipeline.data.records import PARSERS, Record, read_records
from pipeline.data.sources import digest_of, files_of, read_sources
from pipeline.data.splits import shuffle_by_hash, split_records
from pipeline.errors import UserError
from pipeline.models.tokenizers import load_tokenizer
from pipeline.training.identity import weights_sha256
from pipeline.training.lineage import read_lineage

DATASET_KEYS = ("datasets", "eval_datasets", "ptx_datasets", "center_on")
LINEAGE_TYPES: dict[str, type | tuple[type, ...]] = {
    "recipe": dict,
    "parents": list,
    "datasets": list,
    "metrics": dict,
    "weights_sha256": str,
    "seconds": (int, float),
    "flops": (int, float),
    "processes": int,
    "hardware": dict,
    "code": dict,
    "finished": (str, int, float),
}  # what the report reads of a lineage


@dataclass
class RunFolder:
    """A run that is read.

    lineages: of the finished stages, in order. notes: what is missing or changed. changed: stages whose weights are not
    those that their lineage names.
    """

    path: Path
    lineages: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Add a note, once."""
        if text not in self.notes:
            self.notes.append(text)

    def recipe(self, stage: str) -> dict[str, Any]:
        """A stage's resolved recipe; empty where the stage is not there."""
        recipe: dict[str, Any] = self.lineages.get(stage, {}).get("recipe", {})
        return recipe


def read_run(path: Path, data_root: str | None = None) -> RunFolder:
    """Read a run's folder and compare every hash in its lineages with the disk.

    Raises:
        UserError: no finished stage is there.
    """
    run = RunFolder(path)
    for stage in STAGES:
        if not (path / stage).is_dir():
            continue
        lineage = _read_lineage(run, stage)
        if lineage is None:
            continue
        run.lineages[stage] = lineage
        _compare_weights(run, stage)
        run.notes += _changed_data(stage, lineage, data_root)
    if not run.lineages:
        reasons = f" ({'; '.join(run.notes)})" if run.notes else ""
        raise UserError(
            f"{str(path)!r} holds no finished stage{reasons}; run `rlhf run RECIPE --output-dir {path}` first"
        )
    return run


def _read_lineage(run: RunFolder, stage: str) -> dict[str, Any] | None:
    """The lineage of a finished stage; None, with a note, where it cannot be reported."""
    folder = run.path / stage
    try:
        lineage: Any = read_lineage(folder)
    except (UserError, OSError, UnicodeDecodeError, RecursionError) as error:
        run.note(f"{stage}: left out: {error}")
        return None
    if lineage is None:
        run.note(f"{stage}: not finished; {folder} has no lineage.json")
        return None
    wrong = _wrong_keys(lineage)
    if wrong:
        run.note(
            f"{stage}: left out: {folder / 'lineage.json'} lacks {', '.join(wrong)}, or holds something else there"
        )
        return None
    bad = sorted(
        key for key, value in lineage["metrics"].items() if isinstance(value, float) and not math.isfinite(value)
    )
    if bad:
        run.note(f"{stage}: not finite in its metrics: {', '.join(bad)}; the stage diverged")
    return lineage


def _wrong_keys(lineage: Any) -> list[str]:
    if not isinstance(lineage, dict):
        return list(LINEAGE_TYPES)
    wrong = [key for key, kind in LINEAGE_TYPES.items() if not isinstance(lineage.get(key), kind)]
    for key, needed in (("parents", ("weights_sha256",)), ("datasets", ("name", "rows", "sha256"))):
        items = lineage.get(key)
        if isinstance(items, list) and not all(isinstance(i, dict) and all(n in i for n in needed) for i in items):
            wrong.append(key)
    return wrong


def _compare_weights(run: RunFolder, stage: str) -> None:
    """Note weights that changed, of the stage or of the parents that it was trained from."""
    lineage = run.lineages[stage]
    try:
        same = weights_sha256(run.path / stage) == lineage["weights_sha256"]
    except UserError as error:
        run.note(f"{stage}: {error}")
        same = False
    if not same:
        run.changed.append(stage)
        run.note(f"{stage}: its weights changed after the stage finished; the metrics below may not be theirs")
    for parent in lineage["parents"]:
        name = parent.get("stage")
        if name == stage:  # a policy or reward model of another run, such as the round before
            continue
        if name in run.lineages and run.lineages[name]["weights_sha256"] != parent["weights_sha256"]:
            run.note(f"{stage}: was trained from another {name} than the one that lies here now")


def _changed_data(stage: str, lineage: dict[str, Any], data_root: str | None) -> list[str]:
    """Datasets that changed since the stage read them, or are gone; those of the Hub are not compared."""
    recipe = lineage["recipe"]
    root = Path(data_root or recipe.get("data_root") or ".")
    known = {dataset["sha256"] for dataset in lineage["datasets"]}
    notes = []
    for entry in (entry for key in DATASET_KEYS for entry in dataset_entries(recipe, key)):
        if entry.path is None:
            continue
        path = root / entry.path
        try:
            same = digest_of(files_of(entry, path)) in known
        except (UserError, OSError):
            notes.append(f"{stage}: its data {path} cannot be read any more, so it was not checked")
            continue
        if not same:
            notes.append(f"{stage}: its data {path} changed after the stage finished")
    return notes


def dataset_entries(recipe: dict[str, Any], key: str) -> list[DatasetEntry]:
    """The entries of one of a recipe's lists of datasets.

    Raises:
        UserError: they are no entries.
    """
    try:
        return [DatasetEntry(**entry) for entry in recipe.get(key) or []]
    except (TypeError, ValueError) as error:
        raise UserError(f"the recipe in lineage.json: {key}: {error}") from error


def held_out_prompts(
    run: RunFolder, prompts_file: str | None, number: int, data_root: str | None = None
) -> list[Record]:
    """`number` held-out prompts as PPO (or SFT, without PPO) takes them from its recipe, or those of `prompts_file`.

    Raises:
        UserError: the data cannot be read.
    """
    if prompts_file:
        return read_records(Path(prompts_file), PARSERS["prompt"], number)
    stage = next((name for name in ("ppo", "sft") if name in run.lineages), None)
    if stage is None:
        return []
    recipe = run.recipe(stage)
    own = dataset_entries(recipe, "eval_datasets")
    root = data_root or recipe.get("data_root") or "."
    sources = read_sources(own or dataset_entries(recipe, "datasets"), "prompt", root)
    records = [record for source in sources for record in source.records]
    if not own:
        records = split_records(records, recipe.get("held_out_fraction", 0.1))[1]
    records = shuffle_by_hash(records)
    if limit := recipe.get("max_prompt_tokens"):
        encoder = ChatEncoder(load_tokenizer(str(run.path / stage)))
        records = [record for record in records if len(encoder.prompt_ids(record["prompt"])) <= limit]
    return records[:number]

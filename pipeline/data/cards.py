"""Dataset cards: a folder with a README.md in the Hub's format, whose `configs` name the files of each split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.errors import UserError

import yaml


def read_card(folder: Path) -> dict[str, Any]:
    """The YAML head of a folder's dataset card."""
    from huggingface_hub import DatasetCard

    path = folder / "README.md"
    if not path.is_file():
        raise UserError("a dataset folder needs a README.md (its card); or name a file in it", file=folder)
    try:
        return DatasetCard.load(path).data.to_dict()
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"the card's YAML head is broken: {error}", file=path) from error


def split_files(folder: Path, split: str, subset: str | None = None) -> list[Path]:
    """The data files of one split, as the card's `configs` say."""
    configs = read_card(folder).get("configs") or []
    known: list[str] = []
    for config in configs:
        if subset is not None and config.get("config_name") != subset:
            continue
        entries = config.get("data_files") or []
        if isinstance(entries, str):
            entries = [{"split": "train", "path": entries}]
        for entry in entries:
            known.append(entry["split"])
            if entry["split"] == split:
                patterns = entry["path"] if isinstance(entry["path"], list) else [entry["path"]]
                files = sorted({file for pattern in patterns for file in folder.glob(pattern)})
                if not files:
                    raise UserError(f"split {split!r} names {patterns}, which match no file", file=folder / "README.md")
                return files
    raise UserError(
        f"the card has no split {split!r}; it has: {', '.join(known) or 'no `configs: data_files`'}",
        file=folder / "README.md",
    )


def card_columns(folder: Path) -> dict[str, str] | None:
    """The card's own column map (`columns:` in its head, our name → the file's), used where a recipe gives none."""
    columns = read_card(folder).get("columns")
    if columns is None:
        return None
    if not isinstance(columns, dict) or not all(isinstance(v, str) for pair in columns.items() for v in pair):
        raise UserError("`columns:` must map our names to the file's", file=folder / "README.md")
    return columns

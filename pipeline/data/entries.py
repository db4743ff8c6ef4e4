"""What a recipe says about one dataset; read by `pipeline.config` like every other key of a recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class DatasetEntry:
    """One dataset of a recipe: a file or card folder under `--data-root`, or a dataset id on the Hub."""

    path: str | None = field(
        default=None,
        metadata={
            "help": "file (.jsonl, .json, .csv, .parquet, .txt; also .gz) or folder with a dataset card",
            "path": True,
        },
    )
    hub: str | None = field(default=None, metadata={"help": "dataset id on the Hub, instead of path"})
    name: str | None = field(default=None, metadata={"help": "name in reports; default: the last part of path or hub"})
    subset: str | None = field(default=None, metadata={"help": "configuration name of a Hub dataset"})
    split: str = field(
        default="train",
        metadata={"help": "split of a card folder or Hub dataset; of a file: only rows whose own `split` is this"},
    )
    revision: str | None = field(default=None, metadata={"help": "revision of a Hub dataset"})
    streaming: bool = field(
        default=False,
        metadata={"help": "read a Hub dataset while training, nothing of it on the disk; pretrain's `datasets:` only"},
    )
    columns: dict[str, str] | None = field(default=None, metadata={"help": "column map: our name → the file's name"})
    weight: float | None = field(
        default=None,
        metadata={
            "help": "share of the mixture; without weights every row is seen once per epoch",
            "low": 1e-9,
            "high": 1e9,
        },
    )
    max_rows: int | None = field(
        default=None, metadata={"help": "use only the first rows, for short runs", "low": 1, "high": 1e12}
    )
    document_separator: str | None = field(
        default=None, metadata={"help": "text that separates the documents of a .txt file"}
    )
    problems: Literal["drop", "error"] | None = field(
        default=None,
        metadata={
            "help": "drop: leave broken rows out and name them; error: refuse rows that hold nothing to learn from too; "
            "default: refuse broken rows, leave the others out"
        },
    )
    response_suffix: str | None = field(
        default=None, metadata={"help": "literal end mark that the file's responses carry; removed and counted"}
    )

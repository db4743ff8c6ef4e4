"""Datasets of the Hub, or of a folder in its layout, through `datasets`; what fails is told in one line."""

from __future__ import annotations

from typing import Any

from pipeline.data.entries import DatasetEntry
from pipeline.errors import UserError

import httpx
from datasets import DatasetBuilder, load_dataset, load_dataset_builder
from datasets.exceptions import DatasetsError

HUB_ERRORS = (OSError, ValueError, RuntimeError, TypeError, KeyError, DatasetsError, httpx.HTTPError)


def load_table(entry: DatasetEntry) -> Any:
    """The table of a Hub dataset's split.

    Raises:
        UserError: not found, offline, no such split; made by a script; files with different columns.
    """
    try:
        return load_dataset(entry.hub, entry.subset, split=entry.split, revision=entry.revision)
    except HUB_ERRORS as error:
        raise unavailable(entry, error) from error


def dataset_builder(entry: DatasetEntry, revision: str | None) -> DatasetBuilder:
    """What knows a Hub dataset's files at a revision; none of them is downloaded.

    Raises:
        UserError: as `load_table`.
    """
    try:
        return load_dataset_builder(entry.hub, entry.subset, revision=revision)
    except HUB_ERRORS as error:
        raise unavailable(entry, error) from error


def unavailable(entry: DatasetEntry, error: BaseException) -> UserError:
    """One line about a dataset that cannot be had."""
    remedy = remedy_of(error)
    return UserError(
        f"dataset {entry.hub!r} cannot be had from the Hub: {one_line(error)}" + (f"; {remedy}" if remedy else "")
    )


def remedy_of(error: BaseException) -> str | None:
    """What to do about files that `datasets` does not read, where that is known."""
    reason = one_line(error).lower()
    if "script" in reason:
        return "download its data files, or name a revision that holds Parquet (`revision: refs/convert/parquet`)"
    if "cast" in reason or "column" in reason:
        return "its files differ in their columns: name one configuration with `subset:`, or download the files"
    return None


def one_line(error: BaseException) -> str:
    """The first line of what an error of `datasets` says; of one that only says that it failed, of its cause."""
    cause = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ is not None else error
    return str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__

"""Dataset cards: a folder with a README.md in the Hub's format, whose `configs` name the files of each split.

A card is data from outside: it is parsed by our own bounded reader, and names files of its own folder only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.data.files import read_text
from pipeline.errors import UserError, shorten

import yaml

MAX_HEAD_NODES = 200_000  # with every alias written out
_HEAD = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)


def read_card(folder: Path) -> dict[str, Any]:
    """The YAML head of a folder's dataset card."""
    path = folder / "README.md"
    if not path.is_file():
        raise UserError("a dataset folder needs a README.md (its card); or name a file in it", file=folder)
    match = _HEAD.match(read_text(path))
    if match is None:
        raise UserError("the card has no YAML head (between two lines of ---)", file=path)
    try:
        node = yaml.compose(match[1], Loader=yaml.SafeLoader)
        if _size(node, {}) > MAX_HEAD_NODES:
            raise UserError("the card's YAML head is broken: its anchors make it grow without bounds", file=path)
        head = yaml.safe_load(match[1])
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"the card's YAML head is broken: {_one_line(error)}", file=path) from error
    if not isinstance(head, dict):
        raise UserError(f"the card's YAML head is broken: expected keys and values, got {shorten(head)}", file=path)
    return head


def _size(node: Any, known: dict[int, int]) -> int:
    """Nodes of a YAML document if every alias were written out; a document that holds itself is endless."""
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = MAX_HEAD_NODES + 1  # until it is counted; stays where it holds itself
    size = 1
    if isinstance(node, yaml.SequenceNode):
        size += sum(_size(item, known) for item in node.value)
    elif isinstance(node, yaml.MappingNode):
        size += sum(_size(key, known) + _size(value, known) for key, value in node.value)
    known[id(node)] = size
    return size


def _one_line(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem:
        mark = error.problem_mark
        return error.problem + (f" (line {mark.line + 2})" if mark else "")  # the head begins on line 2
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def split_files(folder: Path, split: str, subset: str | None = None) -> list[Path]:
    """The data files of one split, as the card's `configs` say."""
    card = folder / "README.md"
    configs = read_card(folder).get("configs") or []
    if not isinstance(configs, list):
        raise UserError(f"`configs` must be a list, got {shorten(configs)}", file=card)
    known: list[str] = []
    for config in configs:
        if not isinstance(config, dict):
            raise UserError(f"`configs`: each must hold keys and values, got {shorten(config)}", file=card)
        if subset is not None and config.get("config_name") != subset:
            continue
        for name, patterns in _patterns_by_split(config.get("data_files"), card):
            known.append(name)
            if name == split:
                return _matches(folder, split, patterns)
    raise UserError(
        f"the card has no split {split!r}; it has: {', '.join(known) or 'no `configs: data_files`'}",
        file=card,
    )


def _patterns_by_split(data_files: Any, card: Path) -> Iterator[tuple[str, list[str]]]:
    """(split, patterns) of the shapes that the Hub allows: a pattern, a list of them, split → patterns, {split, path}."""
    if data_files is None:
        return
    if isinstance(data_files, str):
        data_files = [data_files]
    if isinstance(data_files, dict):
        data_files = [{"split": split, "path": path} for split, path in data_files.items()]
    if not isinstance(data_files, list):
        raise UserError(f"`data_files` must name files, got {shorten(data_files)}", file=card)
    if data_files and all(isinstance(entry, str) for entry in data_files):
        data_files = [{"split": "train", "path": data_files}]
    for entry in data_files:
        split, path = (entry.get("split"), entry.get("path")) if isinstance(entry, dict) else (None, None)
        patterns = [path] if isinstance(path, str) else path
        if (
            not isinstance(split, str)
            or not isinstance(patterns, list)
            or not all(isinstance(pattern, str) and pattern for pattern in patterns)
        ):
            raise UserError(f"`data_files`: each must be {{split, path}} with text, got {shorten(entry)}", file=card)
        yield split, patterns


def _matches(folder: Path, split: str, patterns: list[str]) -> list[Path]:
    card = folder / "README.md"
    files: set[Path] = set()
    for pattern in patterns:
        if "://" in pattern or os.path.isabs(pattern) or ".." in Path(pattern).parts:
            raise UserError(
                f"split {split!r} names {shorten(pattern)}, which lies outside the card's folder; a card names its own files",
                file=card,
            )
        try:
            files |= {file for file in folder.glob(pattern) if file.is_file()}
        except (ValueError, NotImplementedError, OSError, re.error) as error:
            raise UserError(f"split {split!r}: {shorten(pattern)} is no pattern of files", file=card) from error
    if not files:
        raise UserError(f"split {split!r} names {shorten(patterns)}, which match no file", file=card)
    for file in sorted(files):
        if not _is_inside(file, folder):
            raise UserError(
                f"split {split!r}: {file.name} is a link out of the card's folder; copy the file", file=card
            )
    return sorted(files)


def _is_inside(file: Path, folder: Path) -> bool:
    """Whether a file really lies in a folder; the Hub's cache links a snapshot's files to the `blobs` beside it."""
    roots = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        roots.append(folder.resolve().parent.parent / "blobs")
    return any(file.resolve().is_relative_to(root) for root in roots)


def card_columns(folder: Path) -> dict[str, str] | None:
    """The card's own column map (`columns:` in its head, our name → the file's), used where a recipe gives none."""
    columns = read_card(folder).get("columns")
    if columns is None:
        return None
    if not isinstance(columns, dict) or not all(isinstance(v, str) for pair in columns.items() for v in pair):
        raise UserError("`columns:` must map our names to the file's", file=folder / "README.md")
    return columns

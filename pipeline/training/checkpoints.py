"""Resumable checkpoints: sealed by a manifest of their files, written beside and renamed in, pruned.

A checkpoint is usable when its manifest stands in it and every listed file has the listed size and hash. Manifests are
data from outside: a checkpoint whose manifest has another shape is passed over with a warning.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.data.hashing import sha256_file
from pipeline.errors import UserError
from pipeline.training.json_files import NotAnObject, read_json_object, write_json

logger = logging.getLogger("pipeline")
MANIFEST = "manifest.json"
BEST = "best.pt"  # beside the checkpoints: the networks of PPO's best evaluation
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
NOT_LISTED = (MANIFEST, MANIFEST + ".tmp")


@dataclass(frozen=True)
class FileFacts:
    """Size and hash of one file in a manifest."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of a checkpoint's manifest.

    Attributes:
        step: optimizer steps or rollouts done.
        fingerprint, stage, recipe, inputs: of the run that wrote it.
        files: by path within the checkpoint.
        seconds: wall time of the run until here.
        best: name of the checkpoint that holds the best weights until here, without which this one cannot end the run.
    """

    step: int
    stage: str
    fingerprint: str
    recipe: dict[str, Any]
    inputs: dict[str, Any]
    files: dict[str, FileFacts]
    seconds: float
    best: str | None = None

    @classmethod
    def read(cls, checkpoint: Path) -> Manifest:
        """The manifest of a checkpoint.

        Raises:
            NotAnObject: it is missing or has another shape.
        """
        values = read_json_object(checkpoint / MANIFEST)
        types = {"step": int, "stage": str, "fingerprint": str, "recipe": dict, "inputs": dict, "files": dict}
        for name, expected in types.items():
            if not isinstance(values.get(name), expected) or isinstance(values[name], bool):
                raise NotAnObject(f"has no {name}, or one of a wrong type")
        seconds, best = values.get("seconds"), values.get("best")
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not math.isfinite(seconds):
            raise NotAnObject("has no seconds, or of a wrong type")
        if not (best is None or (isinstance(best, str) and CHECKPOINT.fullmatch(best))):
            raise NotAnObject("names no checkpoint as the best")
        files = {name: _file_facts(name, facts) for name, facts in values["files"].items()}
        return cls(**{name: values[name] for name in types if name != "files"}, files=files, seconds=seconds, best=best)


def _file_facts(name: str, facts: Any) -> FileFacts:
    inside = not Path(name).is_absolute() and ".." not in Path(name).parts
    if not (
        inside
        and isinstance(facts, dict)
        and isinstance(facts.get("bytes"), int)
        and isinstance(facts.get("sha256"), str)
    ):
        raise NotAnObject(f"has a wrong entry for the file {name!r:.60}")
    return FileFacts(facts["bytes"], facts["sha256"])


def checkpoint_step(path: Path) -> int:
    """The step in the name of a checkpoint, or of the folder in which it is being written."""
    match = CHECKPOINT.fullmatch(path.name.removesuffix(".tmp"))
    assert match, path
    return int(match[1])


def checkpoint_folders(folder: Path) -> list[Path]:
    """All folders (or links to folders) named like checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    named = [entry for entry in folder.iterdir() if CHECKPOINT.fullmatch(entry.name) and entry.is_dir()]
    return sorted(named, key=checkpoint_step)


def check_no_file_is_named_like_a_checkpoint(folder: Path) -> None:
    """Refuse what a checkpoint could not be written over."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        if CHECKPOINT.fullmatch(entry.name) and not entry.is_dir():
            raise UserError("is no folder, but has a checkpoint's name; move it away", file=entry)


def seal(checkpoint: Path, manifest: Manifest) -> None:
    """Write the manifest of a checkpoint whose files are all there; `manifest.files` is filled in here."""
    files = {
        str(path.relative_to(checkpoint)): FileFacts(path.stat().st_size, sha256_file(path))
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name not in NOT_LISTED
    }
    write_json(checkpoint / MANIFEST, {**asdict(manifest), "files": {name: asdict(f) for name, f in files.items()}})


def valid_manifest(checkpoint: Path) -> Manifest | None:
    """The manifest, if it seals this checkpoint and every file it lists is there with its size and hash.

    A checkpoint with a manifest that does not is named in a warning; one without is a save that was cut short.
    """
    if not (checkpoint / MANIFEST).exists():
        return None
    try:
        manifest = Manifest.read(checkpoint)
        if manifest.step != checkpoint_step(checkpoint):
            raise NotAnObject(f"is that of step {manifest.step}")
        for name, facts in manifest.files.items():
            path = checkpoint / name
            if not path.is_file() or path.stat().st_size != facts.bytes or sha256_file(path) != facts.sha256:
                raise NotAnObject(f"lists {name}, which is missing or changed")
    except NotAnObject as error:
        logger.warning("%s is passed over: its %s %s", checkpoint, MANIFEST, error)
        return None
    return manifest


def being_written(checkpoint: Path) -> Path:
    """The folder in which a checkpoint is written before it gets its name."""
    return checkpoint.with_name(checkpoint.name + ".tmp")


@contextlib.contextmanager
def writing(checkpoint: Path) -> Iterator[Path]:
    """A temporary folder that becomes `checkpoint` by rename when the block ends without an error."""
    temporary = being_written(checkpoint)
    remove(temporary)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        remove(checkpoint)
        os.rename(temporary, checkpoint)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def remove(path: Path) -> None:
    """Remove a checkpoint, or the link to one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def prune(folder: Path, keep: int, also: Iterable[Path] = ()) -> None:
    """Remove all but the `keep` newest sealed checkpoints, those in `also`, and broken older ones."""
    checkpoints = checkpoint_folders(folder)
    sealed = [checkpoint for checkpoint in checkpoints if (checkpoint / MANIFEST).is_file()]
    if not sealed:
        return
    kept = {path.resolve() for path in [*sealed[-keep:], *also]}
    for checkpoint in checkpoints:
        if checkpoint.resolve() not in kept and checkpoint_step(checkpoint) <= checkpoint_step(sealed[-1]):
            remove(checkpoint)


def remove_all(folder: Path, after: int = -1) -> None:
    """Remove the checkpoints past step `after`, and all that are half written."""
    for checkpoint in [*checkpoint_folders(folder), *folder.glob("checkpoint-*.tmp")]:
        if checkpoint.suffix == ".tmp" or checkpoint_step(checkpoint) > after:
            remove(checkpoint)

"""The output folder of one running stage: whose run it holds, where it resumes, how it is finished.

A folder is finished when `lineage.json` stands in it; that file is written last, by rename.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.training import checkpoints, history
from pipeline.training.checkpoints import MANIFEST, Manifest, checkpoint_folders, checkpoint_step, valid_manifest
from pipeline.training.identity import differences, model_identity, recipe_identity, run_fingerprint, without_secrets
from pipeline.training.json_files import NotAnObject, read_json_object, write_json
from pipeline.training.lineage import COMPLETE, LINEAGE, code_version, hardware, package_versions, read_lineage
from pipeline.training.lock import LOCK

logger = logging.getLogger("pipeline")
METRICS = "metrics.json"
RESUMES = "resumes.json"  # the steps at which the run was resumed
WRITTEN = (METRICS, LINEAGE, RESUMES, history.HISTORY, "README.md")


def holds_a_run(folder: Path) -> bool:
    """Whether a stage of ours wrote in this folder; its hidden lock may have been lost in a copy."""
    ours = any((folder / name).is_file() for name in (LOCK, LINEAGE, RESUMES))
    return ours or any((checkpoint / MANIFEST).is_file() for checkpoint in checkpoint_folders(folder))


@dataclass
class StageOutput:
    """The output folder of one running stage.

    Attributes:
        recipe: as given; secrets are taken out at once, for it is recorded.
        inputs: what identifies the models, data and functions that the stage reads.
        config: the recipe's file.
        seconds_before: wall time of the starts that this one resumes.
        started: of this start, in seconds since the epoch.
    """

    folder: Path
    stage: str
    recipe: dict[str, Any]
    inputs: dict[str, Any] = field(default_factory=dict)
    config: str | None = None
    seconds_before: float = 0.0
    started: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        self.recipe = without_secrets(self.recipe)

    @property
    def seconds(self) -> float:
        """Wall time of this run, over all its starts; what was lost at a kill is not in it."""
        return self.seconds_before + time.time() - self.started

    @property
    def fingerprint(self) -> str:
        return run_fingerprint(self.stage, self.recipe, self.inputs)

    def finished(self) -> bool:
        """Whether this very run is complete here; its left-over checkpoints are then removed.

        Raises:
            UserError: the folder holds another run, or folders where this stage writes files.
        """
        for name in WRITTEN:
            if (self.folder / name).is_dir():
                raise UserError("is a folder where this stage writes a file; move it away", file=self.folder / name)
        lineage = read_lineage(self.folder)
        if lineage is None:
            return False
        self._check_same_run(lineage, "finished run")
        self._remove_what_resumes()
        return True

    def _check_same_run(self, other: Mapping[str, Any], what: str) -> None:
        """Refuse a lineage or manifest of another run, saying what is other."""
        if other.get("fingerprint") == self.fingerprint:
            return
        recipe, inputs = json.loads(json.dumps([recipe_identity(self.recipe), self.inputs]))  # as they are stored
        keys = [name.split()[0] for name in differences(recipe, recipe_identity(other["recipe"]))]
        inputs = differences(inputs, other["inputs"]) if other["inputs"] else []  # old lineages have none
        if other.get("stage") != self.stage:
            reason = f"of stage {other.get('stage')!r}"
        elif keys or any(name.split()[0] not in ("data", "parent") for name in inputs):
            reason = f"with other {', '.join(dict.fromkeys([*keys, *inputs]))}"
        else:
            reason = "on other data or another parent"
        raise UserError(
            f"{self.folder} holds a {what} {reason}; nothing was overwritten: "
            "choose another --output_dir, or delete that folder"
        )

    def checkpoints(self) -> list[Path]:
        return checkpoint_folders(self.folder)

    def resumable(self) -> Path | None:
        """The newest checkpoint with a valid manifest, or None.

        Raises:
            UserError: the newest valid checkpoint belongs to a run with other settings, data or parents.
        """
        checkpoints.check_no_file_is_named_like_a_checkpoint(self.folder)
        for checkpoint in reversed(self.checkpoints()):
            manifest = valid_manifest(checkpoint)
            if manifest is None:
                continue
            self._check_same_run(vars(manifest), "checkpoint")
            best = manifest.best
            if best not in (None, checkpoint.name) and valid_manifest(self.folder / str(best)) is None:
                logger.warning("%s is passed over: the best weights until there, %s, are lost", checkpoint, best)
                continue
            return checkpoint
        return None

    def begin(self, checkpoint: Path | None) -> list[int]:
        """Go back to where `checkpoint` (or nothing) was sealed: history, clock, no later or half-written checkpoints.

        Returns:
            the steps at which this run was resumed, this start included.
        """
        steps: list[int] = []
        if checkpoint is None:
            history.write(self.folder, [])
        else:
            self.seconds_before = Manifest.read(checkpoint).seconds
            history.write(self.folder, history.read(checkpoint))
            steps = [*_read_resumes(self.folder / RESUMES), checkpoint_step(checkpoint)]
        write_json(self.folder / RESUMES, {"steps": steps})
        checkpoints.remove_all(self.folder, after=steps[-1] if steps else 0)
        return steps

    def seal(self, checkpoint: Path, best: str | None = None) -> None:
        """Make a checkpoint usable whose files are all there: the history until here is put beside them, then a manifest.

        Args:
            best: name of the checkpoint that holds the best weights until here.
        """
        history.write(checkpoint, history.read(self.folder))
        manifest = Manifest(
            step=checkpoint_step(checkpoint),
            stage=self.stage,
            fingerprint=self.fingerprint,
            recipe=self.recipe,
            inputs=self.inputs,
            files={},
            seconds=self.seconds,
            best=best,
        )
        checkpoints.seal(checkpoint, manifest)

    def prune(self, keep: int, also: Iterable[Path] = ()) -> None:
        checkpoints.prune(self.folder, keep, also)

    def finish(self, lineage: dict[str, Any], metrics: dict[str, Any]) -> None:
        """Write metrics.json, then lineage.json by rename, then drop the resumable checkpoints."""
        write_json(self.folder / METRICS, metrics)
        share_file_modes(self.folder, like=self.folder / METRICS)
        lineage = {
            "stage": self.stage,
            "status": COMPLETE,
            "recipe": self.recipe,
            "config": self.config,
            "fingerprint": self.fingerprint,
            "inputs": self.inputs,
            **lineage,
            **model_identity(self.folder).as_json(),
            "code": code_version(),
            "packages": package_versions(),
            "hardware": hardware(),
            "metrics": metrics,
        }
        write_json(self.folder / LINEAGE, lineage)
        self._remove_what_resumes()

    def _remove_what_resumes(self) -> None:
        for name in (RESUMES, checkpoints.BEST):
            (self.folder / name).unlink(missing_ok=True)
        checkpoints.remove_all(self.folder)


def share_file_modes(folder: Path, like: Path) -> None:
    """Give every file the mode of `like`, a file written under the user's umask: libraries leave weights as 0600."""
    mode = like.stat().st_mode & 0o777
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with contextlib.suppress(PermissionError):  # somebody else's file
                path.chmod(mode)


def _read_resumes(path: Path) -> list[int]:
    """The steps recorded so far; they are only reported, so a damaged file is named and counts as empty."""
    if not path.exists():
        return []
    try:
        steps = read_json_object(path).get("steps")
    except NotAnObject as error:
        logger.warning("%s %s; earlier resumptions are not recorded", path, error)
        return []
    if not (isinstance(steps, list) and all(isinstance(step, int) for step in steps)):
        logger.warning("%s has no list of steps; earlier resumptions are not recorded", path)
        return []
    return steps

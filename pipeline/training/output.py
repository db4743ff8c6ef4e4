"""The only writer and reader of what a stage leaves: its output folder, `lineage.json` and resumable checkpoints.

A folder is finished when `lineage.json` stands in it; that file is written last, by rename. A resumable checkpoint
is usable when its manifest stands in it and every listed file has the listed size and hash.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pipeline
from pipeline.data.hashing import sha256_file, sha256_json
from pipeline.errors import UserError
from pipeline.training import history
from pipeline.training.parent_names import check_no_adapter, is_hub_id

LINEAGE = "lineage.json"
MANIFEST = "manifest.json"
RESUMES = "resumes.json"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "peft", "tokenizers", "bitsandbytes", "evaluate")
# What a run may change without becoming another run: where it writes and how it talks, not what it computes.
NOT_INPUTS = ("output_dir", "data_root", "report_to", "run_name", "quiet", "threads", "keep_checkpoints", "save_steps")


def write_json(path: Path, value: Any) -> None:
    """Write by rename, so that a reader (or a full disk) never sees half a file."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def weights_sha256(folder: Path) -> str:
    """One hash over every safetensors file of a folder, in the order of their names."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError("no *.safetensors weights here; convert them with save_pretrained of transformers", file=folder)
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}:{sha256_file(file)}\n".encode())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------- parents


@dataclass(frozen=True)
class Parent:
    """A model that a stage starts from: a former stage's folder, or an external one (folder or Hub id)."""

    path: str
    stage: str | None
    weights_sha256: str | None
    tokenizer_sha256: str | None = None
    chat_template_sha256: str | None = None
    revision: str | None = None
    hub: str | None = None  # the id that `path`, the Hub's cache, was fetched by

    def refuse_other_tokenizer(self, tokenizer: Any) -> None:
        """The tokenizer and template that the stage finished with, or none of them."""
        found = tokenizer_hashes(tokenizer)
        for what, ours, theirs in zip(
            ("tokenizer", "chat template"), found, (self.tokenizer_sha256, self.chat_template_sha256), strict=True
        ):
            if theirs is not None and ours != theirs:
                raise UserError(
                    f"parent {self.path!r}: its {what} changed after the stage finished (sha256 differs); "
                    "restore it, or run that stage again"
                )

    def identity(self) -> list[str | None]:
        """What makes it another parent."""
        return [self.weights_sha256, self.tokenizer_sha256, self.chat_template_sha256]

    def record(self) -> dict[str, Any]:
        keys = ("path", "hub", "stage", "weights_sha256", "revision")
        return {key: getattr(self, key) for key in keys if getattr(self, key) is not None}


def verify_parent(path: str, stages: tuple[str, ...]) -> Parent:
    """Check that `path` is a finished output of one of `stages`, or an external model, and identify it.

    Raises:
        UserError: missing, unfinished, of a wrong stage, or changed since it finished.
    """
    folder = Path(path)
    if folder.is_file():
        raise UserError(f"parent {path!r} is a file; name the model's folder")
    if not folder.exists():
        if is_hub_id(path):
            return _hub_parent(path)
        raise UserError(f"parent {path!r} does not exist; run the stage that writes it first, or correct `parent:`")
    if any(CHECKPOINT.fullmatch(entry.name) for entry in folder.iterdir()):
        raise UserError(
            f"parent {path!r} holds checkpoint-* folders: that stage did not finish; run it again, it will resume"
        )
    lineage = read_lineage(folder)
    if lineage is None:
        check_no_adapter(folder)
        if not (folder / "config.json").is_file():
            raise UserError(f"parent {path!r} has no config.json and no {LINEAGE}: it is no model folder")
        return Parent(path=path, stage=None, weights_sha256=weights_sha256(folder))
    if lineage.get("status") != "complete":
        raise UserError(f"parent {path!r} has status {lineage.get('status')!r} in {LINEAGE}; run that stage again")
    if lineage["stage"] not in stages:
        raise UserError(
            f"parent {path!r} comes from stage {lineage['stage']!r}, expected {' or '.join(stages)}; correct the recipe"
        )
    actual = weights_sha256(folder)
    if actual != lineage["weights_sha256"]:
        raise UserError(f"parent {path!r}: its weights changed after the stage finished (sha256 differs); run it again")
    return Parent(path, lineage["stage"], actual, lineage.get("tokenizer_sha256"), lineage.get("chat_template_sha256"))


def _hub_parent(name: str) -> Parent:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        local = Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise UserError(
            f"parent {name!r} is no local folder and cannot be had from the Hub ({type(error).__name__}); "
            "check the name, the network and your log-in, or download it and give its folder"
        ) from error
    # A snapshot lies under its commit's name.
    return Parent(path=str(local), stage=None, weights_sha256=weights_sha256(local), revision=local.name, hub=name)


def read_lineage(folder: Path) -> dict[str, Any] | None:
    path = folder / LINEAGE
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"not valid JSON ({error}); run the stage again in a new folder", file=path) from error


def tokenizer_hashes(tokenizer: Any) -> tuple[str, str]:
    """Hashes of what a tokenizer does (vocabulary, merges, special tokens) and of its chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    behaviour: Any = tokenizer.get_vocab()
    if backend is not None:
        behaviour = json.loads(backend.to_str())
        behaviour.pop("padding", None), behaviour.pop("truncation", None)
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    return sha256_json([behaviour, special]), sha256_json(tokenizer.chat_template)


# ---------------------------------------------------------------------------------------------- one stage's output


@dataclass
class StageOutput:
    """The output folder of one running stage."""

    folder: Path
    stage: str
    recipe: dict[str, Any]
    inputs: dict[str, Any] = field(default_factory=dict)
    config: str | None = None  # the recipe's file
    seconds_before: float = 0.0  # of the starts that this one resumes
    started: float = field(default_factory=time.time)

    @property
    def seconds(self) -> float:
        """Wall time of this run, over all its starts; what was lost at a kill is not in it."""
        return self.seconds_before + time.time() - self.started

    @property
    def fingerprint(self) -> str:
        """What identifies this run: recipe, parents and data, not where it writes."""
        return sha256_json([self.stage, self._inputs_of_recipe(self.recipe), self.inputs])

    @staticmethod
    def _inputs_of_recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
        kept = {key: value for key, value in recipe.items() if key not in (*NOT_INPUTS, "parent")}
        # Data and models count by their content, whose hashes are in `inputs`, not by where they lie.
        for entries in ("datasets", "center_on", "eval_datasets"):
            kept[entries] = [dict(entry, path=None) for entry in kept.get(entries, [])]
        kept["reward"] = [dict(source, model=None) for source in kept.get("reward", [])]
        return kept

    def finished(self) -> bool:
        """Whether this very run is complete here; its left-over checkpoints are then removed.

        Raises:
            UserError: the folder holds another run.
        """
        lineage = read_lineage(self.folder)
        if lineage is not None:
            self._refuse_other(
                lineage.get("fingerprint"), lineage.get("recipe", {}), lineage.get("stage"), "finished run"
            )
            self._remove_checkpoints()
            return True
        return False

    def _refuse_other(self, fingerprint: str | None, recipe: Mapping[str, Any], stage: str | None, what: str) -> None:
        if fingerprint == self.fingerprint:
            return
        if stage != self.stage:
            reason = f"of stage {stage!r}"
        else:
            ours, theirs = self._inputs_of_recipe(self.recipe), self._inputs_of_recipe(recipe)
            keys = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
            reason = f"with other {', '.join(keys)}" if keys else "on other data or another parent"
        raise UserError(
            f"{self.folder} holds a {what} {reason}; nothing was overwritten: "
            "choose another --output_dir, or delete that folder"
        )

    def resumable(self) -> Path | None:
        """The newest checkpoint with a valid manifest, or None.

        Raises:
            UserError: the newest valid checkpoint belongs to another recipe.
        """
        for checkpoint in sorted(self.checkpoints(), key=checkpoint_step, reverse=True):
            manifest = valid_manifest(checkpoint)
            if manifest is None:
                continue
            self._refuse_other(manifest["fingerprint"], manifest["recipe"], manifest["stage"], "checkpoint")
            return checkpoint
        return None

    def checkpoints(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return [entry for entry in self.folder.iterdir() if CHECKPOINT.fullmatch(entry.name) and entry.is_dir()]

    def begin(self, checkpoint: Path | None) -> list[int]:
        """Go back to where `checkpoint` (or nothing) was sealed: history, clock, no half-written checkpoints.

        Returns:
            the steps at which this run was resumed, this start included.
        """
        step = checkpoint_step(checkpoint) if checkpoint else 0
        resumes = self.folder / RESUMES
        rows = 0
        steps: list[int] = []
        if checkpoint:
            manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
            self.seconds_before, rows = manifest["seconds"], manifest["history_rows"]
            steps = [*(json.loads(resumes.read_text()) if resumes.is_file() else []), step]
        history.rewind(self.folder, rows)
        write_json(resumes, steps)
        for stray in [
            *self.folder.glob("checkpoint-*.tmp"),
            *(c for c in self.checkpoints() if checkpoint_step(c) > step),
        ]:
            shutil.rmtree(stray)
        return steps

    def seal(self, checkpoint: Path) -> None:
        """Write the manifest of a checkpoint whose files are all there."""
        files = {
            str(path.relative_to(checkpoint)): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
            for path in sorted(checkpoint.rglob("*"))
            if path.is_file() and path.name not in (MANIFEST, MANIFEST + ".tmp")
        }
        manifest = {
            "stage": self.stage,
            "fingerprint": self.fingerprint,
            "recipe": self.recipe,
            "files": files,
            "seconds": self.seconds,
            "history_rows": len(history.read(self.folder)),
        }
        write_json(checkpoint / MANIFEST, manifest)

    def prune(self, keep: int, also: Iterable[Path] = ()) -> None:
        """Remove all but the `keep` newest sealed checkpoints, those in `also`, and broken older ones."""
        sealed = sorted((c for c in self.checkpoints() if (c / MANIFEST).is_file()), key=checkpoint_step)
        if not sealed:
            return
        kept = {path.resolve() for path in [*sealed[-keep:], *also]}
        for checkpoint in self.checkpoints():
            if checkpoint.resolve() not in kept and checkpoint_step(checkpoint) <= checkpoint_step(sealed[-1]):
                shutil.rmtree(checkpoint)

    def finish(self, lineage: dict[str, Any], metrics: dict[str, Any]) -> None:
        """Write metrics.json, then lineage.json by rename, then drop the resumable checkpoints."""
        write_json(self.folder / "metrics.json", metrics)
        lineage = {
            "stage": self.stage,
            "status": "complete",
            "recipe": self.recipe,
            "config": self.config,
            "fingerprint": self.fingerprint,
            **lineage,
            "weights_sha256": weights_sha256(self.folder),
            "code": code_version(),
            "packages": package_versions(),
            "hardware": hardware(),
            "metrics": metrics,
        }
        (self.folder / RESUMES).unlink(missing_ok=True)
        write_json(self.folder / LINEAGE, lineage)
        self._remove_checkpoints()

    def _remove_checkpoints(self) -> None:
        for checkpoint in self.checkpoints():
            shutil.rmtree(checkpoint)
        for stray in self.folder.glob("checkpoint-*.tmp"):
            shutil.rmtree(stray)


def checkpoint_step(path: Path) -> int:
    match = CHECKPOINT.fullmatch(path.name)
    assert match, path
    return int(match[1])


def valid_manifest(checkpoint: Path) -> dict[str, Any] | None:
    """The manifest, if every file it lists is there with its size and hash."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    for name, facts in manifest["files"].items():
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != facts["bytes"] or sha256_file(path) != facts["sha256"]:
            return None
    return manifest


@contextlib.contextmanager
def writing(checkpoint: Path) -> Iterator[Path]:
    """A temporary folder that becomes `checkpoint` by rename when the block ends without an error."""
    temporary = checkpoint.with_name(checkpoint.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for path in temporary.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    shutil.rmtree(checkpoint, ignore_errors=True)
    os.replace(temporary, checkpoint)


# ---------------------------------------------------------------------------------------------- provenance


def code_version() -> dict[str, Any]:
    root = Path(pipeline.__file__).parent.parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    status = git("status", "--porcelain", "--untracked-files=no")
    return {
        "version": pipeline.__version__,
        "git_commit": git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
    }


def package_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def hardware() -> dict[str, Any]:
    import torch

    facts: dict[str, Any] = {"machine": platform.machine(), "cpus": os.cpu_count(), "threads": torch.get_num_threads()}
    with contextlib.suppress(OSError):
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        facts["cpu"] = names[0] if names else platform.processor()
    if torch.cuda.is_available():
        facts["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return facts

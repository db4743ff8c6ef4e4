"""lineage.json, which makes an output folder a finished one, and the parents that are verified by it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pipeline
from pipeline.errors import UserError
from pipeline.training.checkpoints import checkpoint_folders
from pipeline.training.identity import (
    ModelIdentity,
    as_inputs,
    model_identity,
    same_tokenizer,
    tokenizer_hashes,
)
from pipeline.training.json_files import NotAnObject, read_json_object
from pipeline.training.parent_names import check_no_adapter, is_hub_id, missing_parent

LINEAGE = "lineage.json"
COMPLETE = "complete"
PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "peft", "tokenizers", "bitsandbytes", "evaluate")
HUB_CACHE = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/")
REQUIRED: dict[str, type] = {"stage": str, "weights_sha256": str}  # of a complete lineage
# What a lineage may hold, and what stands for an entry that it lacks.
DEFAULTS: dict[str, Any] = {
    "recipe": {}, "inputs": {}, "parents": [], "datasets": [], "metrics": {}, "code": {}, "packages": {}, "hardware": {},
    "resumed_from": [], "seconds": 0.0, "flops": 0.0, "processes": 1,
}  # fmt: skip
TEXTS = ("config", "fingerprint", "config_sha256", "adapter_sha256", "tokenizer_sha256", "chat_template_sha256")
DATASET: dict[str, type] = {"name": str, "rows": int, "sha256": str}
PARENT: dict[str, type] = {"path": str, "weights_sha256": str}
TYPE_NAMES = {str: "text", int: "a number", float: "a number", dict: "an object", list: "a list"}


def read_lineage(folder: Path) -> dict[str, Any] | None:
    """A folder's lineage with every entry of `DEFAULTS`, or None where it has none: it is not finished, or external.

    Raises:
        UserError: the file is damaged or has another shape.
    """
    path = folder / LINEAGE
    if not path.exists():
        return None
    try:
        lineage = read_json_object(path)
    except NotAnObject as error:
        raise UserError(f"{error}; run the stage again in a new folder", file=path) from error
    if lineage.get("status") == COMPLETE:
        _check_shape(path, lineage)
    return {**DEFAULTS, **lineage}


def _check_shape(path: Path, lineage: Mapping[str, Any]) -> None:
    _check_types(path, "", lineage, REQUIRED)
    present: dict[str, type] = {name: type(default) for name, default in DEFAULTS.items() if name in lineage}
    present |= {name: str for name in TEXTS if lineage.get(name) is not None}
    _check_types(path, "", lineage, present)
    for name, types in (("datasets", DATASET), ("parents", PARENT)):
        for number, entry in enumerate(lineage.get(name, [])):
            _check_types(path, f"{name}[{number}]", {"": entry}, {"": dict})
            _check_types(path, f"{name}[{number}].", entry, types)


def _check_types(path: Path, prefix: str, values: Mapping[str, Any], types: Mapping[str, type]) -> None:
    for name, expected in types.items():
        value = values.get(name)
        right = isinstance(value, int | float if expected is float else expected) and not isinstance(value, bool)
        if not right:
            what = "is missing" if name not in values else f"is {value!r:.60}, not {TYPE_NAMES[expected]}"
            raise UserError(f"{prefix}{name} {what}; run the stage again in a new folder", file=path)


# ---------------------------------------------------------------------------------------------- parents


@dataclass(frozen=True)
class Parent:
    """A model that a stage starts from: a former stage's folder, or an external one (folder or Hub id).

    Attributes:
        path: where it lies; for a Hub id, in the Hub's cache.
        tokenizer_sha256, chat_template_sha256: as its stage recorded them; None for an external model.
        revision: commit of the Hub.
        hub: the id that `path` was fetched by.
        base_model: Hub id of the external model at the root of its lineage, where there is one.
    """

    path: str
    stage: str | None
    identity: ModelIdentity
    tokenizer_sha256: str | None = None
    chat_template_sha256: str | None = None
    revision: str | None = None
    hub: str | None = None
    base_model: str | None = None

    @property
    def weights_sha256(self) -> str:
        return self.identity.weights_sha256

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Refuse another tokenizer or template than those that the parent's stage finished with."""
        changed = []
        if self.tokenizer_sha256 is not None and not same_tokenizer(tokenizer, self.tokenizer_sha256):
            changed.append("tokenizer")
        if self.chat_template_sha256 not in (None, tokenizer_hashes(tokenizer)[1]):
            changed.append("chat template")
        if changed:
            raise UserError(
                f"parent {self.path!r}: its {changed[0]} changed after the stage finished (sha256 differs); "
                "restore it, or run that stage again"
            )

    def as_inputs(self, tokenizer: Any) -> dict[str, Any]:
        """The parent's identity; `tokenizer` is the one in its folder."""
        return as_inputs(self.identity, tokenizer)

    def as_source(self, name: str, temperature: float) -> dict[str, Any]:
        """What is recorded beside answers that it samples. name: as the user gave it."""
        known = {
            "model": name, "stage": self.stage, "weights_sha256": self.weights_sha256,
            "adapter_sha256": self.identity.adapter_sha256, "revision": self.revision, "temperature": temperature,
        }  # fmt: skip
        return {key: value for key, value in known.items() if value is not None}

    def record(self) -> dict[str, Any]:
        """Its entry in the lineage of a stage that starts from it."""
        entries = {
            "path": self.path, "hub": self.hub, "stage": self.stage, "weights_sha256": self.weights_sha256,
            "config_sha256": self.identity.config_sha256, "adapter_sha256": self.identity.adapter_sha256,
            "revision": self.revision, "base_model": self.base_model,
        }  # fmt: skip
        return {key: value for key, value in entries.items() if value is not None}


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
        raise UserError(missing_parent(path))
    if checkpoint_folders(folder):
        raise UserError(
            f"parent {path!r} holds checkpoint-* folders: that stage did not finish; run it again, it will resume"
        )
    lineage = read_lineage(folder)
    if lineage is None:
        return _external_parent(folder, path)
    if lineage.get("status") != COMPLETE:
        raise UserError(f"parent {path!r} has status {lineage.get('status')!r} in {LINEAGE}; run that stage again")
    if lineage["stage"] not in stages:
        raise UserError(
            f"parent {path!r} comes from stage {lineage['stage']!r}, expected {' or '.join(stages)}; correct the recipe"
        )
    return Parent(
        path,
        lineage["stage"],
        _unchanged_identity(folder, path, lineage),
        tokenizer_sha256=lineage.get("tokenizer_sha256"),
        chat_template_sha256=lineage.get("chat_template_sha256"),
        base_model=_base_model(lineage),
    )


def _unchanged_identity(folder: Path, path: str, lineage: Mapping[str, Any]) -> ModelIdentity:
    """The folder's identity, refused where it is not the recorded one; old lineages recorded the weights alone."""
    identity = model_identity(folder)
    now = identity.as_json()
    for key, what in (
        ("weights_sha256", "weights"),
        ("config_sha256", "config.json"),
        ("adapter_sha256", "adapter"),
        ("stop_tokens", "stop tokens (eos_token_id in generation_config.json)"),
    ):
        if lineage.get(key) is not None and lineage[key] != now[key]:
            raise UserError(
                f"parent {path!r}: its {what} changed after the stage finished; restore it, or run that stage again"
            )
    return identity


def _base_model(lineage: Mapping[str, Any]) -> str | None:
    first: dict[str, Any] = next(iter(lineage["parents"]), {})
    name = first.get("hub") or first.get("base_model")
    return name if isinstance(name, str) else None


def _external_parent(folder: Path, path: str) -> Parent:
    check_no_adapter(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"parent {path!r} has no config.json and no {LINEAGE}: it is no model folder")
    cached = HUB_CACHE.search(f"{folder.resolve()}/")
    hub = f"{cached['owner']}/{cached['name']}" if cached else None
    return Parent(path, None, model_identity(folder), base_model=hub)


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
    return Parent(str(local), None, model_identity(local), revision=local.name, hub=name, base_model=name)


# ---------------------------------------------------------------------------------------------- provenance


def code_version() -> dict[str, Any]:
    """Version of this package and the git commit that it runs from."""
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
    from pipeline.models.precision import gpu_count

    import torch

    facts: dict[str, Any] = {"machine": platform.machine(), "cpus": os.cpu_count(), "threads": torch.get_num_threads()}
    with contextlib.suppress(OSError):
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        facts["cpu"] = names[0] if names else platform.processor()
    if gpus := gpu_count():
        facts["gpus"] = [torch.cuda.get_device_name(i) for i in range(gpus)]
    return facts

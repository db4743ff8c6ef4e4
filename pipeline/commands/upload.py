"""What is shipped of a finished stage, to a repository of the Hub: weights, tokenizer, card, and the adapter where it helps."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.commands.shipped_model import export
from pipeline.errors import UserError
from pipeline.models.loading import one_line
from pipeline.training.lineage import Parent, read_lineage

import httpx
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

EXISTS = 409  # HTTP status
HUB_ERRORS = (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled, httpx.HTTPError)


@dataclass(frozen=True, kw_only=True)
class Upload:
    """The flags of `rlhf push`."""

    repository: str
    dtype: str = "fp32"
    public: bool = False
    update: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        """Raises UserError where they do not go together."""
        try:
            validate_repo_id(self.repository)
        except HFValidationError as error:
            raise UserError(f"--to {self.repository!r} is no name of a repository: {one_line(error)}") from error
        if self.public and self.update:
            raise UserError("--public is for a new repository; change one that exists on its page of the Hub")


def push(source: Path, upload: Upload, api: Any) -> None:
    """Export a finished stage to a temporary folder and upload that folder in one commit.

    Args:
        api: a `huggingface_hub.HfApi`.

    Raises:
        UserError: the stage cannot be exported, or the Hub refuses.
    """
    if not upload.dry_run:
        with _hub("log in with `hf auth login`, or set HF_TOKEN"):
            api.whoami()
    with tempfile.TemporaryDirectory(prefix="rlhf-push-") as scratch:
        folder = Path(scratch) / "model"
        stage = export(source, folder, upload.dtype, upload.repository.split("/")[-1])
        note = add_adapter(stage, folder)
        _list(stage, folder, upload)
        if note:
            print(note)
        if not upload.dry_run:
            _send(folder, stage, upload, api)


def add_adapter(stage: Parent, folder: Path) -> str | None:
    """Put a stage's LoRA adapter into `folder`, where others have its base: a model of the Hub.

    Returns:
        a line where an adapter is left out.
    """
    adapter = Path(stage.path) / "adapter"
    if not (adapter / "adapter_model.safetensors").is_file():
        return None
    lineage = read_lineage(Path(stage.path))
    base: dict[str, Any] = next(iter(lineage["parents"] if lineage else []), {})
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    if "hub" not in base or config.get("base_model_name_or_path") not in (base["hub"], base["path"]):
        return "the adapter is left out: its base is no model of the Hub; the weights have it merged in"
    (folder / "adapter").mkdir()
    config |= {"base_model_name_or_path": base["hub"], "revision": base.get("revision")}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(adapter / "adapter_model.safetensors", folder / "adapter" / "adapter_model.safetensors")
    return None


def _list(stage: Parent, folder: Path, upload: Upload) -> None:
    """Print the files with their sizes, and the card's metadata."""
    seen = "a new commit" if upload.update else "public" if upload.public else "private"
    what = "would be uploaded" if upload.dry_run else "is uploaded"
    print(f"push: {stage.stage} of {stage.path}, {upload.dtype}, {what} to {upload.repository} ({seen})")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        print(f"  {path.stat().st_size:>15,} bytes  {path.relative_to(folder)}")
    print(f"  {sum(path.stat().st_size for path in files):>15,} bytes in {len(files)} files")
    print("card:", *ModelCard.load(folder / "README.md").data.to_yaml().splitlines(), sep="\n  ")


def _send(folder: Path, stage: Parent, upload: Upload, api: Any) -> None:
    name = upload.repository
    if not upload.update:
        with _hub("give another name, or --update to add a commit to it"):
            name = api.create_repo(name, private=not upload.public, repo_type="model").repo_id
    with _hub("run the same command with --update" if not upload.update else "run the same command again"):
        commit = api.upload_folder(
            repo_id=name, folder_path=folder, repo_type="model", commit_message=f"rlhf push: {stage.stage}"
        )
    print(f"push: done, {commit.commit_url}")


@contextlib.contextmanager
def _hub(remedy: str) -> Iterator[None]:
    """Whatever the Hub or the way to it refuses becomes one line."""
    try:
        yield
    except HUB_ERRORS as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        what = "there is such a repository already" if status == EXISTS else one_line(error)
        raise UserError(f"the Hub: {what}; {remedy}") from error

"""What a stage leaves, verifies and refuses."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.training import output as checkpoints
from pipeline.training.output import (
    LINEAGE,
    MANIFEST,
    StageOutput,
    read_lineage,
    tokenizer_hashes,
    valid_manifest,
    verify_parent,
    weights_sha256,
    write_json,
    writing,
)

import pytest
import torch
from safetensors.torch import save_file

RECIPE = {"learning_rate": 1e-3, "output_dir": "x", "datasets": [{"path": "a", "weight": None}], "seed": 0}


def output(folder: Path, **changes: Any) -> StageOutput:
    return StageOutput(folder, "sft", {**RECIPE, **changes}, {"data": "d", "parent": "p"})


def finished(folder: Path, **changes: Any) -> StageOutput:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"w": torch.zeros(2)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    run = output(folder, **changes)
    run.finish({"parents": [], "datasets": [], "seconds": 1.0}, {"loss": 1.0})
    return run


def sealed(run: StageOutput, step: int) -> Path:
    folder = run.folder / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "optimizer.pt").write_bytes(b"state" * step)
    run.seal(folder)
    return folder


def test_a_finished_run_is_known_again(tmp_path: Path) -> None:
    run = finished(tmp_path / "out")
    assert run.finished()
    assert output(tmp_path / "out", output_dir="elsewhere", quiet=True, threads=3).finished(), (
        "where it writes and how it talks are no inputs"
    )
    assert not output(tmp_path / "new").finished()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"learning_rate": 1e-4}, "with other learning_rate"),
        ({"seed": 1}, "with other seed"),
        ({"datasets": [{"path": "a", "weight": 2.0}]}, "with other datasets"),
    ],
)
def test_another_recipes_run_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    finished(tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(UserError, match=words):
        output(tmp_path / "out", **changes).finished()
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_other_data_is_refused_though_the_path_is_the_same(tmp_path: Path) -> None:
    finished(tmp_path / "out")
    other = output(tmp_path / "out")
    other.inputs = {**other.inputs, "data": "changed"}
    with pytest.raises(UserError, match="on other data or another parent; nothing was overwritten"):
        other.finished()


def test_only_the_newest_whole_checkpoint_resumes(tmp_path: Path) -> None:
    run = output(tmp_path)
    first, second, third = (sealed(run, step) for step in (10, 20, 100))
    assert run.resumable() == third
    (third / "optimizer.pt").write_bytes(b"state" * 99)  # cut short by a kill
    assert run.resumable() == second
    (second / MANIFEST).unlink()
    assert run.resumable() == first
    flipped = bytearray((first / "optimizer.pt").read_bytes())
    flipped[3] ^= 1
    (first / "optimizer.pt").write_bytes(bytes(flipped))
    assert run.resumable() is None
    assert valid_manifest(first) is None


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    sealed(output(tmp_path), 10)
    with pytest.raises(UserError, match="holds a checkpoint with other seed"):
        output(tmp_path, seed=5).resumable()


def test_pruning_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    run = output(tmp_path)
    for step in (10, 20, 30, 40):
        sealed(run, step)
    (tmp_path / "checkpoint-50").mkdir()  # being written: not sealed yet
    run.prune(1, also=[tmp_path / "checkpoint-20"])
    assert sorted(path.name for path in run.checkpoints()) == ["checkpoint-20", "checkpoint-40", "checkpoint-50"]


def test_a_failed_write_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Disk full while a checkpoint is written: the one before stays usable, no half of the new one remains."""
    run = output(tmp_path)
    good = sealed(run, 10)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    def save(name: str, text: str, then: Callable[[], None]) -> None:
        with writing(tmp_path / name) as folder:
            (folder / "part").write_text(text)
            then()

    with pytest.raises(OSError, match="No space"):
        save("checkpoint-20", "half", full)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save("checkpoint-30", "whole, but not on the disk", lambda: None)
    with pytest.raises(OSError, match="No space"):
        write_json(tmp_path / LINEAGE, {"status": "complete"})
    assert run.resumable() == good
    assert read_lineage(tmp_path) is None
    assert [p.name for p in run.checkpoints()] == ["checkpoint-10"]


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


# ---------------------------------------------------------------------------------------------- parents


def test_parents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished(tmp_path / "sft")
    parent = verify_parent(str(tmp_path / "sft"), ("pretrain", "sft"))
    assert parent.stage == "sft"
    assert parent.weights_sha256 == weights_sha256(tmp_path / "sft")
    with pytest.raises(UserError, match="comes from stage 'sft', expected reward"):
        verify_parent(str(tmp_path / "sft"), ("reward",))
    with pytest.raises(UserError, match="does not exist; run the stage that writes it first"):
        verify_parent("runs/none/sft", ("sft",))
    (tmp_path / "sft" / "checkpoint-10").mkdir()
    with pytest.raises(UserError, match="did not finish; run it again"):
        verify_parent(str(tmp_path / "sft"), ("sft",))
    (tmp_path / "sft" / "checkpoint-10").rmdir()
    save_file({"w": torch.ones(2)}, tmp_path / "sft" / "model.safetensors")
    with pytest.raises(UserError, match="weights changed after the stage finished"):
        verify_parent(str(tmp_path / "sft"), ("sft",))
    (tmp_path / "sft" / LINEAGE).unlink()
    assert verify_parent(str(tmp_path / "sft"), ("sft",)).stage is None, (
        "an external model: config and weights, no lineage"
    )
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is no model folder"):
        verify_parent(str(tmp_path / "empty"), ("sft",))


def test_a_hub_id_is_had_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hub parent is read from a cache of the Hub's own layout, offline; its revision is recorded."""
    revision = "a" * 40
    snapshot = tmp_path / "models--org--base" / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (tmp_path / "models--org--base" / "refs").mkdir()
    (tmp_path / "models--org--base" / "refs" / "main").write_text(revision)
    save_file({"w": torch.zeros(2)}, snapshot / "model.safetensors")
    (snapshot / "config.json").write_text("{}")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    import huggingface_hub

    download = huggingface_hub.snapshot_download
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **options: download(name, cache_dir=tmp_path, **options)
    )
    parent = verify_parent("org/base", ("sft",))
    assert (parent.stage, parent.revision) == (None, revision)
    assert parent.weights_sha256 == weights_sha256(snapshot)
    with pytest.raises(UserError, match="cannot be had from the Hub"):
        verify_parent("org/other", ("sft",))


def test_tokenizer_hashes_see_what_matters(tokenizer: Any) -> None:
    same, other = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    same.padding_side = "left"
    assert tokenizer_hashes(same) == tokenizer_hashes(tokenizer)
    other.chat_template = "{{ messages }}"
    assert tokenizer_hashes(other)[0] == tokenizer_hashes(tokenizer)[0]
    assert tokenizer_hashes(other)[1] != tokenizer_hashes(tokenizer)[1]
    other.add_tokens(["new"])
    assert tokenizer_hashes(other)[0] != tokenizer_hashes(tokenizer)[0]


def test_provenance_names_code_and_machine() -> None:
    assert set(checkpoints.code_version()) == {"version", "git_commit", "dirty"}
    assert {"torch", "transformers", "trl"} <= set(checkpoints.package_versions())
    assert checkpoints.hardware()["cpus"] >= 1

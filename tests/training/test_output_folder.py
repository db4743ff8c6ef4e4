"""The output folder of a stage: whose run it holds, where it resumes, what a finished one leaves."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers.outputs import RECIPE, finished, output, sealed
from pipeline.errors import UserError
from pipeline.training import history
from pipeline.training.checkpoints import MANIFEST, valid_manifest, writing
from pipeline.training.json_files import write_json
from pipeline.training.lineage import LINEAGE, read_lineage
from pipeline.training.output_folder import RESUMES, StageOutput, holds_a_run

import pytest


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


# ---------------------------------------------------------------------------------------------- whose run


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"reward": {"kind:score": "other"}}, "with other reward kind:score"),
        ({"parent": {"weights_sha256": "p", "config_sha256": "other"}}, "on other data or another parent"),
        ({"tokenizer": "other", "data": "other"}, "with other data, tokenizer"),
    ],
)
def test_another_input_is_named(tmp_path: Path, inputs: dict[str, Any], words: str) -> None:
    known = {
        "data": "d", "tokenizer": "t", "parent": {"weights_sha256": "p", "config_sha256": "c"},
        "reward": {"kind:score": "f", "model 1": {"weights_sha256": "r"}},
    }  # fmt: skip
    finished(tmp_path / "out", inputs=known)
    other = StageOutput(
        tmp_path / "out",
        "sft",
        RECIPE,
        {**known, **{k: known[k] | v if isinstance(v, dict) else v for k, v in inputs.items()}},
    )
    with pytest.raises(UserError, match=words):
        other.finished()


@pytest.mark.parametrize("key", ["datasets", "eval_datasets", "ptx_datasets", "center_on"])
def test_where_data_lies_is_no_input(tmp_path: Path, key: str) -> None:
    finished(tmp_path / "out", **{key: [{"path": "here/a", "weight": 1.0}]})
    assert output(tmp_path / "out", **{key: [{"path": "/there/a", "weight": 1.0}]}).finished()


@pytest.mark.parametrize("key", ["reward", "score"])
def test_where_a_reward_model_lies_is_no_input(tmp_path: Path, key: str) -> None:
    finished(tmp_path / "out", **{key: [{"model": "here/reward", "function": None, "weight": 1.0}]})
    assert output(tmp_path / "out", **{key: [{"model": "/there/reward", "function": None, "weight": 1.0}]}).finished()
    with pytest.raises(UserError, match=f"with other {key}"):
        output(tmp_path / "out", **{key: [{"model": "here/reward", "function": None, "weight": 2.0}]}).finished()


def test_secrets_are_recorded_nowhere(tmp_path: Path) -> None:
    options = {
        "hub_token": "hf_secretsecretsecretsecret",
        "nested": {"api_key": "private", "url": "https://me:pass@host/a"},
    }
    run = finished(tmp_path / "out", trainer_options=options, run_name="hf_secretsecretsecretsecret")
    checkpoint = sealed(output(tmp_path / "other", trainer_options=options), 10)
    for path in (tmp_path / "out" / LINEAGE, checkpoint / MANIFEST):
        text = path.read_text()
        assert "secret" not in text
        assert "me:pass" not in text
        assert "private" not in text
    assert run.recipe["stop_tokens"] == ["<|im_end|>"], "what is called token is not always secret"
    assert run.finished()


# ---------------------------------------------------------------------------------------------- copies and modes


@pytest.mark.parametrize("made", ["finished", "interrupted", "new"])
def test_a_folder_copied_without_hidden_files_is_known(tmp_path: Path, made: str) -> None:
    if made == "finished":
        finished(tmp_path / "out")
    else:
        output(tmp_path / "out").folder.mkdir()
        output(tmp_path / "out").begin(None)
    if made == "interrupted":
        sealed(output(tmp_path / "out"), 10)
        (tmp_path / "out" / RESUMES).unlink()
    assert holds_a_run(tmp_path / "out")
    (tmp_path / "foreign" / "checkpoint-3").mkdir(parents=True)
    (tmp_path / "foreign" / "notes.txt").write_text("mine")
    assert not holds_a_run(tmp_path / "foreign")


def test_files_have_the_users_mode(tmp_path: Path) -> None:
    """safetensors writes through a temporary file of mode 0600."""
    folder = tmp_path / "out"
    (folder / "adapter").mkdir(parents=True)
    for name in ("private.safetensors", "adapter/private.safetensors"):
        (folder / name).write_bytes(b"")
        (folder / name).chmod(0o600)
    (tmp_path / "elsewhere").write_text("")
    (tmp_path / "elsewhere").chmod(0o600)
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    before = os.umask(0o027)
    try:
        finished(folder)
    finally:
        os.umask(before)
    modes = {
        path.name: path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file() and not path.is_symlink()
    }
    assert set(modes.values()) == {0o640}, modes
    assert (tmp_path / "elsewhere").stat().st_mode & 0o777 == 0o600


def test_metrics_are_json_whatever_was_measured(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    finished(folder, metrics={"judge": float("nan"), "parts": [float("inf"), 1.0]})

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    for name in ("metrics.json", LINEAGE):
        json.loads((folder / name).read_text(), parse_constant=refuse)
    assert json.loads((folder / "metrics.json").read_text()) == {"judge": None, "parts": [None, 1.0]}


# ---------------------------------------------------------------------------------------------- damage


def interrupted(folder: Path) -> StageOutput:
    """A run with two logged steps at 10, three at 20 and four when it was killed."""
    run = output(folder)
    folder.mkdir()
    run.begin(None)
    for step, rows in ((10, 2), (20, 3)):
        while len(history.read(folder)) < rows:
            history.append(folder, {"step": len(history.read(folder)), "loss": 1.0})
        sealed(run, step)
    history.append(folder, {"step": 3, "loss": 1.0})
    return output(folder)


DAMAGES: dict[str, tuple[str, Any]] = {
    "manifest is empty": ("checkpoint-20/manifest.json", b""),
    "manifest is cut": ("checkpoint-20/manifest.json", b'{"stage": "sf'),
    "manifest is a list": ("checkpoint-20/manifest.json", b"[1, 2]"),
    "manifest is null": ("checkpoint-20/manifest.json", b"null"),
    "manifest has no entries": ("checkpoint-20/manifest.json", b"{}"),
    "manifest is binary": ("checkpoint-20/manifest.json", b"\xff\xfe\x00"),
    "manifest is deep": ("checkpoint-20/manifest.json", b"[" * 200_000),
    "manifest's files are a list": ("checkpoint-20/manifest.json", {"files": ["optimizer.pt"]}),
    "a file is listed as text": ("checkpoint-20/manifest.json", {"files": {"optimizer.pt": "sha"}}),
    "a file is listed outside": ("checkpoint-20/manifest.json", {"files": {"../history.jsonl": {"bytes": 1, "sha256": ""}}}),
    "seconds are text": ("checkpoint-20/manifest.json", {"seconds": "3"}),
    "seconds are not finite": ("checkpoint-20/manifest.json", {"seconds": 1e999}),
    "the recipe is text": ("checkpoint-20/manifest.json", {"recipe": "r"}),
    "another step's manifest": ("checkpoint-20/manifest.json", {"step": 10}),
    "the best is lost": ("checkpoint-20/manifest.json", {"best": "checkpoint-15"}),
    "the best is no checkpoint": ("checkpoint-20/manifest.json", {"best": "../elsewhere"}),
    "resumes are empty": ("resumes.json", b""),
    "resumes are a list": ("resumes.json", b"[10]"),
    "resumes are text": ("resumes.json", b'{"steps": "10"}'),
    "resumes are binary": ("resumes.json", b"\xff"),
    "history is empty": ("history.jsonl", b""),
    "history is binary": ("history.jsonl", b"\xff\xfe\n\x00"),
    "history holds a list": ("history.jsonl", b"[1]\n2\n"),
    "history is deep": ("history.jsonl", b"[" * 200_000 + b"\n"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_passed_over(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damaged checkpoint is passed over with a warning; the history comes from the checkpoint, whatever happened to it."""
    run = interrupted(tmp_path / "out")
    name, content = DAMAGES[damage]
    path = run.folder / name
    path.write_bytes(
        content if isinstance(content, bytes) else json.dumps({**json.loads(path.read_text()), **content}).encode()
    )
    monkeypatch.setattr(logging.getLogger("pipeline"), "propagate", True)
    checkpoint = run.resumable()
    broken = name.startswith("checkpoint")
    assert checkpoint == run.folder / ("checkpoint-10" if broken else "checkpoint-20")
    steps = run.begin(checkpoint)
    assert steps == [10 if broken else 20]
    assert len(history.read(run.folder)) == (2 if broken else 3)
    assert [path.name for path in run.checkpoints()] == ["checkpoint-10", "checkpoint-20"][: 1 if broken else 2]
    assert broken == any("is passed over" in record.getMessage() for record in caplog.records)
    finished(run.folder)
    assert sorted(p.name for p in run.folder.iterdir() if "checkpoint" in p.name or p.name == RESUMES) == []


@pytest.mark.parametrize("kind", ["link", "dangling", "file", "fifo"])
@pytest.mark.parametrize("name", ["checkpoint-20", "checkpoint-15", "checkpoint-30", "checkpoint-20.tmp"])
def test_what_has_a_checkpoints_name_is_resumed_from_or_refused(tmp_path: Path, kind: str, name: str) -> None:
    run = interrupted(tmp_path / "out")
    path = run.folder / name
    elsewhere = tmp_path / "elsewhere" / name
    if kind == "link":
        shutil.move(run.folder / "checkpoint-20", elsewhere)
        path.symlink_to(elsewhere)
    else:
        shutil.rmtree(path, ignore_errors=True)
        {
            "dangling": lambda: path.symlink_to("nowhere"),
            "file": lambda: path.write_text("x"),
            "fifo": lambda: os.mkfifo(path),
        }[kind]()
    if kind != "link" and not name.endswith(".tmp"):
        with pytest.raises(UserError, match="is no folder, but has a checkpoint's name; move it away"):
            run.resumable()
        return
    checkpoint = run.resumable()
    run.begin(checkpoint)
    assert checkpoint is not None
    assert checkpoint.name == ("checkpoint-10" if kind == "link" and name != "checkpoint-20" else "checkpoint-20")
    sealed(run, 40)
    run.prune(1)
    assert [c.name for c in run.checkpoints()] == ["checkpoint-40"]
    if kind == "link":
        assert (elsewhere / MANIFEST).is_file(), "what a link points to is not ours to delete"


@pytest.mark.parametrize("name", ["metrics.json", LINEAGE, RESUMES, "history.jsonl", "README.md"])
def test_a_folder_where_a_file_is_written_is_refused_at_the_start(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match="is a folder where this stage writes a file; move it away"):
        output(tmp_path).finished()

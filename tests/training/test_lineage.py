"""What lineage.json says of a folder, and which folders may be parents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helpers.outputs import finished
from pipeline.errors import UserError
from pipeline.training.identity import weights_sha256
from pipeline.training.lineage import LINEAGE, code_version, hardware, package_versions, read_lineage, verify_parent

import pytest
import torch
from safetensors.torch import save_file


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


def test_provenance_names_code_and_machine() -> None:
    assert set(code_version()) == {"version", "git_commit", "dirty"}
    assert {"torch", "transformers", "trl"} <= set(package_versions())
    assert hardware()["cpus"] >= 1


def test_the_base_model_is_handed_down(tmp_path: Path) -> None:
    """A folder of the Hub's cache is known by its id, through as many stages as follow."""
    snapshot = tmp_path / "models--org--base" / "snapshots" / ("b" * 40)
    snapshot.mkdir(parents=True)
    save_file({"w": torch.zeros(2)}, snapshot / "model.safetensors")
    (snapshot / "config.json").write_text("{}")
    parent = verify_parent(str(snapshot), ("sft",))
    for name in ("one", "two", "three"):
        folder = tmp_path / name
        run = finished(folder)
        run.finish({"parents": [parent.record()], "datasets": []}, {})
        parent = verify_parent(str(folder), ("sft",))
        assert parent.base_model == "org/base"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("[]", "holds a list, not an object; run the stage again in a new folder"),
        ("null", "holds a NoneType, not an object"),
        ("{", "not valid JSON"),
        ("[" * 200_000, "not valid JSON"),
        ({"stage": None}, "stage is None, not text"),
        ({"weights_sha256": 5}, "weights_sha256 is 5, not text"),
        ({"metrics": []}, r"metrics is \[\], not an object"),
        ({"recipe": "x"}, "recipe is 'x', not an object"),
        ({"parents": {}}, "parents is {}, not a list"),
        ({"parents": ["x"]}, r"parents\[0\] is 'x', not an object"),
        ({"parents": [{"path": "x"}]}, r"parents\[0\].weights_sha256 is missing"),
        ({"datasets": [{"name": "a", "rows": "many", "sha256": ""}]}, r"datasets\[0\].rows is 'many', not a number"),
        ({"seconds": "1"}, "seconds is '1', not a number"),
        ({"processes": True}, "processes is True, not a number"),
        ({"chat_template_sha256": 1}, "chat_template_sha256 is 1, not text"),
    ],
)
def test_a_damaged_lineage_is_one_line(tmp_path: Path, change: Any, words: str) -> None:
    finished(tmp_path)
    path = tmp_path / LINEAGE
    path.write_text(change if isinstance(change, str) else json.dumps({**json.loads(path.read_text()), **change}))
    for reader in (lambda: read_lineage(tmp_path), lambda: verify_parent(str(tmp_path), ("sft",))):
        with pytest.raises(UserError, match=words) as error:
            reader()
        assert str(error.value).startswith(f"{path}: ")


def test_an_old_lineage_lacks_entries_without_harm(tmp_path: Path) -> None:
    finished(tmp_path)
    path = tmp_path / LINEAGE
    old = json.loads(path.read_text())
    for key in ("config_sha256", "adapter_sha256", "inputs", "hardware"):
        del old[key]
    path.write_text(json.dumps(old))
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert verify_parent(str(tmp_path), ("sft",)).stage == "sft"
    lineage = read_lineage(tmp_path)
    assert lineage is not None
    assert lineage["hardware"] == {}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", "[1]", "holds a list, not an object"),
        ("config.json", "{", "not valid JSON"),
        ("generation_config.json", '{"eos_token_id": "2"}', "eos_token_id is neither a token id nor a list of them"),
        ("generation_config.json", '{"eos_token_id": [2, null]}', "eos_token_id is neither"),
        ("generation_config.json", "7", "holds a int, not an object"),
    ],
)
def test_a_parents_damaged_settings_are_one_line(tmp_path: Path, name: str, content: str, words: str) -> None:
    finished(tmp_path)
    (tmp_path / LINEAGE).unlink()
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=words):
        verify_parent(str(tmp_path), ("sft",))

"""`rlhf export` leaves what is shipped of a run, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helpers.launches import rlhf_here
from helpers.runs import change_lineage, make_run

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

SHIPPED = {
    "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    "tokenizer_config.json",
}  # fmt: skip
IDS = torch.tensor([[5, 9, 11, 40, 7]])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A finished run with all that its stages leave beside the model."""
    folder = make_run(tmp_path_factory.mktemp("exported") / "run", tokenizer)
    ppo = folder / "ppo"
    for name in ("samples", "value", "adapter", "wandb"):
        (ppo / name).mkdir()
        (ppo / name / "private.json").write_text("{}")
    save_file({"w": torch.zeros(2)}, ppo / "value" / "model.safetensors")
    for name in ("samples.json", "history.jsonl", "log.txt", "metrics.json", "wandb_id"):
        (ppo / name).write_text("My parcel number 1 never arrived")
    (ppo / "model.safetensors").chmod(0o600)
    return folder


@torch.no_grad()
def logits(folder: Path, auto: Any = AutoModelForCausalLM, **options: Any) -> Any:
    return auto.from_pretrained(folder, **options).eval()(input_ids=IDS).logits


def test_the_policy_is_shipped_with_identical_logits(run: Path, tmp_path: Path) -> None:
    out, _ = rlhf_here("export", run, "--to", tmp_path / "shipped")
    shipped = tmp_path / "shipped"
    assert f"export: ppo of {run / 'ppo'} in {shipped}, fp32" in out
    assert {path.name for path in shipped.rglob("*")} == SHIPPED
    assert torch.equal(logits(shipped), logits(run / "ppo"))
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (shipped, run / "ppo"))
    message = [{"role": "user", "content": "Where is it?"}]
    assert ours.apply_chat_template(message, tokenize=False) == theirs.apply_chat_template(message, tokenize=False)
    assert len({path.stat().st_mode & 0o777 for path in shipped.iterdir()}) == 1, "weights are as readable as the card"
    for path in shipped.iterdir():
        for private in (str(run), str(run.parent), "My parcel"):
            assert private.encode() not in path.read_bytes(), f"{private} stands in {path.name}"
    stops = json.loads((shipped / "generation_config.json").read_text())["eos_token_id"]
    assert ours.eos_token_id in ([stops] if isinstance(stops, int) else stops)


def test_one_stage_is_shipped_in_bf16(run: Path, tmp_path: Path) -> None:
    rlhf_here("export", run / "sft", "--to", tmp_path / "shipped", "--dtype", "bf16")
    assert {tensor.dtype for tensor in load_file(tmp_path / "shipped" / "model.safetensors").values()} == {
        torch.bfloat16
    }
    assert torch.equal(logits(tmp_path / "shipped"), logits(run / "sft", dtype=torch.bfloat16))


def test_a_reward_model_is_shipped_with_its_offset(run: Path, tmp_path: Path) -> None:
    rlhf_here("export", run / "reward", "--to", tmp_path / "shipped")
    assert {path.name for path in (tmp_path / "shipped").iterdir()} == SHIPPED - {"generation_config.json"}
    auto = AutoModelForSequenceClassification
    assert torch.equal(logits(tmp_path / "shipped", auto), logits(run / "reward", auto))


def test_the_card_names_the_base_model_and_no_path(run: Path, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    parent = {"path": "/home/me/cache", "weights_sha256": "a" * 64, "hub": "org/base", "stage": None}
    change_lineage(run, "sft", parents=[parent])
    rlhf_here("export", run / "sft", "--to", tmp_path / "shipped")
    card = ModelCard.load(tmp_path / "shipped" / "README.md")
    assert card.data.base_model == "org/base"
    assert "/home/me" not in card.content
    assert "lineage.json" not in card.content
    assert "org/base, weights sha256" in card.content


@pytest.mark.parametrize("kind", ["file", "full"])
def test_nothing_is_overwritten(run: Path, tmp_path: Path, kind: str) -> None:
    target = tmp_path / "there"
    if kind == "file":
        target.write_text("mine")
    else:
        target.mkdir()
        (target / "notes").write_text("mine")
    _, err = rlhf_here("export", run, "--to", target, code=2)
    assert "is no empty folder; nothing is overwritten, name a new one" in err
    assert (target if kind == "file" else target / "notes").read_text() == "mine"


def test_what_is_not_finished_or_changed_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    _, err = rlhf_here("export", tmp_path / "empty", "--to", tmp_path / "to", code=2)
    assert "holds no finished stage" in err
    _, err = rlhf_here("export", tmp_path / "nowhere", "--to", tmp_path / "to", code=2)
    assert "is no folder; name a run's or a stage's" in err
    change_lineage(run, "pretrain", weights_sha256="0" * 64)
    _, err = rlhf_here("export", run / "pretrain", "--to", tmp_path / "to", code=2)
    assert "its weights changed after the stage finished" in err
    assert not (tmp_path / "to").exists()
    assert not (tmp_path / "to.tmp").exists()

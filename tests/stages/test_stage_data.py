"""What the stages do with their data: weights, splits that leave nothing, ties only, rows that nothing is learnt from."""

from __future__ import annotations

import copy
import importlib
import json
from pathlib import Path
from typing import Any

from helpers.launches import lineage
from helpers.ppo_training import with_training
from helpers.tiny_models import make_lm
from pipeline.config.stages import STAGES
from pipeline.data.encoding import IGNORE, ROLE_TEMPLATE
from pipeline.training import history
from pipeline.training.stage import launch

import numpy as np
import pytest
import torch
import yaml
from transformers import OPTConfig, OPTForCausalLM


@pytest.fixture(scope="module")
def parent(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a chat template, as from somebody else."""
    return save_parent(make_lm("llama", tokenizer), tokenizer, tmp_path_factory.mktemp("parent"))


def save_parent(model: Any, tokenizer: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    with_template = copy.deepcopy(tokenizer)
    with_template.chat_template = ROLE_TEMPLATE
    with_template.save_pretrained(folder)
    return folder


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(stage: str, folder: Path, datasets: list[dict[str, Any]], **more: Any) -> tuple[dict[str, Any], str]:
    """Two steps of a stage: its metrics and its log."""
    recipe = {
        "output_dir": str(folder / "out"), "datasets": datasets, "max_steps": 2, "examples_per_step": 4,
        "examples_per_device": 4, "save_steps": 10, "precision": "fp32", "held_out_fraction": 0.2, **more,
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    module = importlib.import_module(f"pipeline.{stage}")
    launch(stage, STAGES[stage], module.main, ["--config", str(folder / "recipe.yaml")])
    return lineage(folder / "out")["metrics"], (folder / "out" / "log.txt").read_text()


def refused(
    capsys: pytest.CaptureFixture[str], stage: str, folder: Path, datasets: list[dict[str, Any]], **more: Any
) -> str:
    with pytest.raises(SystemExit) as ended:
        run(stage, folder, datasets, **more)
    assert ended.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def pairs(count: int, name: str = "p") -> list[dict[str, Any]]:
    return [{"prompt": f"Kettle {name} {n}?", "chosen": f"Sorry {n}.", "rejected": f"No {n}."} for n in range(count)]


def demonstrations(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"Kettle {n}?", "response": f"Sorry {n}."} for n in range(count)]


def test_weights_decide_the_rankings_of_an_epoch(parent: Path, tmp_path: Path) -> None:
    rows = [{**row, "split": "test" if n < 4 else "train"} for n, row in enumerate(pairs(24))]
    files = [
        {"path": write(tmp_path / "a.jsonl", rows), "weight": 0.9},
        {"path": write(tmp_path / "b.jsonl", [{**row, "prompt": "Other " + row["prompt"]} for row in rows]), "weight": 0.1},
    ]  # fmt: skip
    metrics, _ = run("reward", tmp_path, files, parent=str(parent), max_tokens=100)
    assert metrics["rankings"] == 20 * 9 + 20


@pytest.mark.parametrize("ties", ["half", "margin"])
def test_held_out_rankings_may_all_tie(parent: Path, tmp_path: Path, ties: str) -> None:
    rows = [
        {"prompt": f"Kettle {n}?", "responses": ["Sorry.", "No."], "ranks": [1, 2 if n < 16 else 1],
         "split": "train" if n < 16 else "test"} for n in range(20)
    ]  # fmt: skip
    dataset = [{"path": write(tmp_path / "a.jsonl", rows)}]
    metrics, log = run("reward", tmp_path, dataset, parent=str(parent), max_tokens=100, ties=ties)
    assert metrics["accuracy"] is None
    assert metrics["held_out_pairs"] == 0


def test_rankings_whose_responses_are_the_same_tokens_are_left_out(parent: Path, tmp_path: Path) -> None:
    """A response that is the beginning of the other is told apart; the same tokens are not."""
    stripping = tmp_path / "parent"
    import shutil

    shutil.copytree(parent, stripping)
    template = ROLE_TEMPLATE.replace("message['content'] }}", "message['content'] | trim }}")
    (stripping / "chat_template.jinja").write_text(template)
    rows = [{"prompt": f"Kettle {n}?", "chosen": "Sorry", "rejected": "Sorry, no."} for n in range(16)]
    rows.append({"prompt": "Kettle?", "chosen": "Sorry.", "rejected": "Sorry. ", "split": "train"})
    dataset = [{"path": write(tmp_path / "a.jsonl", rows)}]
    metrics, log = run("reward", tmp_path, dataset, parent=str(stripping), max_tokens=100)
    assert "training rankings hold responses that are the same tokens and are left out (lines 17)" in log
    assert metrics["held_out_pairs"] > 0


def test_a_source_may_have_no_document_held_out(parent: Path, tmp_path: Path) -> None:
    texts = [{"text": f"The kettle number {n} is broken.", "split": "test" if n < 2 else "train"} for n in range(40)]
    only_train = [{"text": f"The lamp number {n} is broken.", "split": "train"} for n in range(40)]
    files = [{"path": write(tmp_path / "a.jsonl", texts)}, {"path": write(tmp_path / "b.jsonl", only_train)}]
    metrics, _ = run("pretrain", tmp_path, files, parent=str(parent), block_tokens=32)
    assert metrics["held_out_bytes"] == sum(len(row["text"]) for row in texts[:2])


def test_nothing_left_to_learn_is_one_line(parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    all_test = [{**row, "split": "test"} for row in demonstrations(8)]
    line = refused(
        capsys, "sft", tmp_path, [{"path": write(tmp_path / "a.jsonl", all_test)}], parent=str(parent), max_tokens=100
    )
    assert "no demonstration is left to train on" in line
    all_train = [{**row, "split": "train"} for row in demonstrations(8)]
    line = refused(
        capsys, "sft", tmp_path, [{"path": write(tmp_path / "b.jsonl", all_train)}], parent=str(parent), max_tokens=100
    )
    assert "no demonstration was held out" in line


def test_a_turn_that_is_not_to_be_learnt_has_no_label(parent: Path, tmp_path: Path) -> None:
    """The stage's own examples: the first answer says `weight: 0`, the second is learnt."""
    from pipeline.config.sft import SFTArguments
    from pipeline.data.encoding import IGNORE, ChatEncoder
    from pipeline.data.entries import DatasetEntry
    from pipeline.data.sources import read_source
    from pipeline.models.tokenizers import load_tokenizer
    from pipeline.sft import encode

    turns = [
        {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Go away.", "weight": 0},
        {"role": "user", "content": "Pardon?"}, {"role": "assistant", "content": "On its way."},
    ]  # fmt: skip
    write(tmp_path / "a.jsonl", [{"messages": turns}])
    entry = DatasetEntry(path="a.jsonl")
    source = read_source(entry, "demonstration", tmp_path)
    args = SFTArguments(output_dir="x", parent="x", datasets=[entry])
    tokenizer = load_tokenizer(str(parent))
    ((ids, labels),), _, _ = encode(ChatEncoder(tokenizer), source, np.array([False]), args)
    assert tokenizer.decode([label for label in labels if label != IGNORE]).startswith("On its way.")
    assert "Go away." in tokenizer.decode(ids)


@pytest.fixture
def opt(tokenizer: Any, tmp_path: Path) -> Path:
    """It takes its positions from the attention mask, so documents that share a row see each other."""
    sizes = {
        "hidden_size": 16,
        "ffn_dim": 32,
        "word_embed_proj_dim": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    torch.manual_seed(0)
    config = OPTConfig(vocab_size=len(tokenizer), max_position_embeddings=128, **sizes, **ids)
    return save_parent(OPTForCausalLM(config), tokenizer, tmp_path / "parent")


def test_packed_examples_that_would_see_each_other_get_a_row_each(opt: Path, tmp_path: Path) -> None:
    """SFT with packing is then SFT without it."""
    data = [{"path": write(tmp_path / "rows.jsonl", demonstrations(40))}]
    losses = []
    for packing in (True, False):
        (tmp_path / str(packing)).mkdir()
        common = {"parent": str(opt), "packing": packing, "max_tokens": 64, "logging_steps": 1}
        _, log = run("sft", tmp_path / str(packing), data, **common)
        assert ("see each other" in log) == packing
        losses.append([row["loss"] for row in history.read(tmp_path / str(packing) / "out") if "loss" in row])
    assert losses[0] == losses[1]


def test_text_for_ptx_that_would_see_its_neighbours_gets_a_block_each(opt: Path, tmp_path: Path) -> None:
    write(tmp_path / "prompts.jsonl", [{"prompt": f"Kettle {n}?"} for n in range(8)])
    texts = write(tmp_path / "text.jsonl", [{"text": f"Sorry for kettle {n}. " * (1 + n % 3)} for n in range(40)])
    ptx = {"ptx_coef": 1.0, "ptx_datasets": [{"path": texts}], "ptx_block_tokens": 64, "max_prompt_tokens": 32}
    pretraining = with_training(
        tmp_path / "run", opt, "return 0.0", lambda training, _: training.learner.pretraining, **ptx
    )
    assert pretraining is not None
    assert not pretraining.isolated
    assert [int((np.asarray(block["labels"]) == IGNORE).sum()) for block in pretraining.blocks] == [1] * 40
    assert "see each other" in (tmp_path / "run" / "out" / "log.txt").read_text()


def test_prompts_are_drawn_by_weight_and_held_out_ones_never(parent: Path, tmp_path: Path) -> None:
    """Rows whose own `split` holds them out are not trained on, whether or not `eval_datasets` are given."""
    from types import SimpleNamespace

    from pipeline.data.encoding import ChatEncoder
    from pipeline.data.entries import DatasetEntry
    from pipeline.data.sources import read_sources
    from pipeline.models.tokenizers import load_tokenizer
    from pipeline.rollout.prompts import prepare_prompts

    args = SimpleNamespace(held_out_fraction=0.0, max_prompt_tokens=64, long_prompts="error", seed=0)
    rows = [{"prompt": f"Kettle {n}?", "split": "test" if n < 4 else "train"} for n in range(24)]
    write(tmp_path / "a.jsonl", rows)
    write(tmp_path / "b.jsonl", [{**row, "prompt": "Other " + str(row["prompt"])} for row in rows])
    entries = [DatasetEntry(path="a.jsonl", weight=0.9), DatasetEntry(path="b.jsonl", weight=0.1)]
    encoder = ChatEncoder(load_tokenizer(str(parent)))
    sources = read_sources(entries, "prompt", str(tmp_path))
    evaluated = read_sources([DatasetEntry(path="a.jsonl", split="test")], "prompt", str(tmp_path))
    for eval_sources, held_out in (([], 8), (evaluated, 4)):
        prompts = prepare_prompts(sources, eval_sources, encoder, args)
        assert (len(prompts.train), len(prompts.epoch), len(prompts.held_out)) == (40, 200, held_out)


def test_a_template_that_refuses_a_role_names_the_row(
    parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[Any] = demonstrations(12)
    rows[6] = {"messages": [{"role": "tool", "content": "x"}, {"role": "assistant", "content": "y"}]}
    line = refused(
        capsys, "sft", tmp_path, [{"path": write(tmp_path / "a.jsonl", rows)}], parent=str(parent), max_tokens=100
    )
    assert f"{tmp_path / 'a.jsonl'}:7: " in line

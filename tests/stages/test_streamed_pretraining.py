"""Pretraining on a streamed Hub dataset: lineage, check and plan; processes, kills and wrong rows."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

from helpers.launches import FSDP2, ROOT, flags_of, kill_when, launch, lineage, rlhf_here
from pipeline import pretrain
from pipeline.config.pretrain import PretrainArguments
from pipeline.training import stage

import pytest
import yaml

RECIPE: dict[str, Any] = {
    "config_class": "LlamaConfig", "block_tokens": 32, "precision": "fp32", "threads": 1, "held_out_fraction": 0.1,
    "held_out_documents": 8, "examples_per_step": 8, "examples_per_device": 2, "learning_rate": 1e-3, "max_steps": 30,
    "logging_steps": 5, "save_steps": 5, "quiet": True,
    "model_config": {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "max_position_embeddings": 64,
    },
}  # fmt: skip
ROWS = 80  # 30 steps read them more than once


@pytest.fixture
def recipe(tmp_path: Path, tokenizer: Any) -> Path:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    write_rows(tmp_path / "hub")
    values = {**RECIPE, "tokenizer": str(tmp_path / "tokenizer"), "output_dir": str(tmp_path / "out")}
    values["datasets"] = [{"hub": str(tmp_path / "hub"), "streaming": True}]
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "pretrain.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "recipe" / "pretrain.yaml"


def write_rows(hub: Path, wrong: int | None = None) -> None:
    hub.mkdir(exist_ok=True)
    chance = random.Random(0)
    texts = [
        " ".join(chance.choices(["parcel", "late", "thanks", "my", "is"], k=chance.randint(5, 40))) for _ in range(ROWS)
    ]
    for number in range(2):
        rows = [{"text": None if n == wrong else text} for n, text in enumerate(texts, 1)][number::2]
        (hub / f"train-{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.utime(hub / f"train-{number}.jsonl", (1, 1))


def batches(recipe: Path, out: Path, processes: int, more: dict[str, str] | None = None) -> list[list[list[int]]]:
    """The rows of each step over all processes, sorted."""
    flags = ["pretrain", str(out), "--", "--config", str(recipe), *flags_of({"output_dir": f"{out}-run"})]
    launch(str(ROOT / "tests" / "helpers" / "record_batches.py"), flags, processes=processes, more=more)
    shares = [json.loads(out.with_name(f"{out.name}-{rank}.json").read_text()) for rank in range(processes)]
    each = len(shares[0]) // RECIPE["max_steps"]
    return [
        sorted(row for share in shares for batch in share[step * each : (step + 1) * each] for row in batch)
        for step in range(RECIPE["max_steps"])
    ]


def test_a_streamed_run_says_what_it_read_and_check_and_plan_what_they_did_not(recipe: Path, tmp_path: Path) -> None:
    stage.launch("pretrain", PretrainArguments, pretrain.main, ["--config", str(recipe)])
    (dataset,) = lineage(tmp_path / "out")["datasets"]
    assert dataset["location"] == str(tmp_path / "hub")
    assert dataset["train_tokens"] <= 30 * 8 * 32
    assert dataset["train_tokens"] > 0.95 * 30 * 8 * 32
    assert dataset["passes"] == dataset["rows"] // ROWS - (dataset["rows"] % ROWS == 0) >= 1
    assert dataset["rows_left_out"] == 0
    assert lineage(tmp_path / "out")["metrics"]["held_out_tokens"] > 0
    out, _ = rlhf_here("check", recipe.parent)
    assert "streamed" in out
    out, _ = rlhf_here("plan", recipe.parent, "--gpu", "h100")
    assert "is streamed and was not read" in " ".join(out.split())


def test_a_run_that_failed_after_its_last_step_reads_no_further_row(recipe: Path, tmp_path: Path) -> None:
    def train(name: str) -> None:
        flags = ["--config", str(recipe), "--output_dir", str(tmp_path / name), "--max_steps", "10"]
        stage.launch("pretrain", PretrainArguments, pretrain.main, flags)

    train("whole")
    in_the_way = tmp_path / "failed" / "model.safetensors"
    in_the_way.mkdir(parents=True)  # the weights cannot be saved
    (tmp_path / "failed" / ".lock").touch()
    with pytest.raises(Exception, match=r"model\.safetensors|directory"):
        train("failed")
    in_the_way.rmdir()
    train("failed")
    a, b = (lineage(tmp_path / name) for name in ("whole", "failed"))
    assert b["resumed_from"] == [10]
    assert [b[key] for key in ("weights_sha256", "metrics", "datasets")] == [
        a[key] for key in ("weights_sha256", "metrics", "datasets")
    ]


@pytest.mark.full
def test_any_number_of_processes_trains_on_the_same_batches(recipe: Path, tmp_path: Path) -> None:
    one = batches(recipe, tmp_path / "one", 1)
    assert len({json.dumps(step) for step in one}) > 20
    assert batches(recipe, tmp_path / "two", 2) == one
    assert batches(recipe, tmp_path / "sharded", 2, FSDP2) == one


@pytest.mark.full
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_and_started_again_it_ends_the_same(recipe: Path, tmp_path: Path, processes: int) -> None:
    whole, killed = (["--config", str(recipe), "--output_dir", str(tmp_path / name)] for name in ("whole", "killed"))
    launch("pretrain", whole, processes)
    code = kill_when(
        "pretrain", killed, lambda: any((tmp_path / "killed").glob("checkpoint-*5/manifest.json")), processes=processes
    )
    assert code != 0
    launch("pretrain", killed, processes)
    a, b = (lineage(tmp_path / name) for name in ("whole", "killed"))
    assert b["resumed_from"]
    assert a["weights_sha256"] == b["weights_sha256"]
    assert a["metrics"] == b["metrics"]
    assert a["datasets"] == b["datasets"]


@pytest.mark.full
def test_a_wrong_row_ends_all_processes_with_one_line(recipe: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "hub", wrong=61)
    ended = launch("pretrain", ["--config", str(recipe)], processes=2, check=False)
    assert ended.returncode == 2
    (line,) = {line for line in ended.stderr.splitlines() if line.startswith("error: ")}
    assert line.startswith(f"error: {tmp_path / 'hub'} (train):31: no column `text`")
    assert "Traceback" not in ended.stderr

"""`rlhf init` writes a recipe that its own check accepts and its own plan fits to the hardware."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from helpers.launches import rlhf_here
from helpers.runs import make_run
from pipeline.commands.init import ask_for_missing
from pipeline.commands.look import look
from pipeline.config.reader import load, read_recipe
from pipeline.config.stages import STAGES
from pipeline.planning.memory import GIB
from pipeline.planning.plan import PlanOptions, plan

import pytest

ANSWERS = ["We are sorry. We will send a new one.", "No.", "Please write to us again tomorrow."]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A model to start from, and small files whose columns have names of their own."""
    folder = tmp_path_factory.mktemp("data")
    make_run(folder / "run", tokenizer)
    asked = [f"My parcel number {i} never arrived." for i in range(60)]
    write(folder / "demos.jsonl", [{"Question": q, "answer": ANSWERS[0], "topic": "x"} for q in asked])
    write(folder / "pairs.jsonl", [{"prompt": q, "chosen": ANSWERS[0], "rejected": ANSWERS[1]} for q in asked])
    write(folder / "ours.jsonl", [{"frage": q, "antwort": ANSWERS[2]} for q in asked])
    write(folder / "text.jsonl", [{"text": f"{q} {a}"} for q in asked for a in ANSWERS])
    return folder


def keys(recipe: Path, stage: str) -> dict[str, Any]:
    return read_recipe(recipe / f"{stage}.yaml", STAGES[stage])


@pytest.mark.full
def test_a_recipe_for_a_model_and_its_data(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    flags = [
        "--demonstrations",
        data / "demos.jsonl",
        "--comparisons",
        data / "pairs.jsonl",
        "--task",
        "Answer customers.",
    ]
    out, _ = rlhf_here("init", "shop", "--base", data / "run" / "sft", *flags, "--gpu", "l4")
    recipe = tmp_path / "shop"
    assert sorted(path.name for path in recipe.iterdir()) == ["README.md", "ppo.yaml", "reward.yaml", "sft.yaml"]
    sft, reward, ppo = (keys(recipe, stage) for stage in ("sft", "reward", "ppo"))
    assert sft["parent"] == str(data / "run" / "sft")
    assert (sft["datasets"][0].path, sft["datasets"][0].columns) == (str(data / "demos.jsonl"), {"prompt": "Question", "response": "answer"})  # fmt: skip
    assert "prompt ← Question, response ← answer (guessed from their names" in out
    assert reward["parent"] == ppo["parent"] == "runs/shop/sft"
    assert ppo["reward"][0].model == "runs/shop/reward"
    assert ppo["datasets"][0].path == str(data / "pairs.jsonl"), "PPO takes the comparisons' prompts"
    assert ppo["max_prompt_tokens"] + ppo["max_response_tokens"] <= 128, "the model's context"
    assert sft["max_tokens"] <= 128
    assert "shop: fine" in out
    assert "on 1 × l4" in out
    readme = (recipe / "README.md").read_text()
    assert "Answer customers." in readme
    assert "60 demonstrations" in readme


def test_no_default_is_written_a_second_time(data: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe"
    rlhf_here("init", recipe, "--base", data / "run" / "sft", "--comparisons", data / "pairs.jsonl", "--gpu", "l4")
    for stage in ("reward", "ppo"):
        arguments = load(STAGES[stage], ["--config", str(recipe / f"{stage}.yaml")])
        fields = {field.name: field for field in dataclasses.fields(STAGES[stage])}
        text = (recipe / f"{stage}.yaml").read_text()
        for name in keys(recipe, stage):
            (line,) = [line for line in text.splitlines() if line.startswith(f"{name}:")]
            assert getattr(arguments, name) != fields[name].default or "#" in line, f"{name} stands there for nothing"


@pytest.mark.full
def test_a_model_from_nothing(data: Path, tmp_path: Path) -> None:
    out, _ = rlhf_here("init", tmp_path / "new", "--documents", data / "text.jsonl", "--gpu", "cpu")
    pretrain = keys(tmp_path / "new", "pretrain")
    assert "parent" not in pretrain
    assert pretrain["model_config"]["hidden_size"] == 256
    assert "fine" in out
    assert not (tmp_path / "new" / "sft.yaml").exists()


@pytest.mark.full
def test_what_does_not_fit_takes_the_switches_of_the_plan(data: Path, tmp_path: Path) -> None:
    flags = ["--base", data / "run" / "sft", "--demonstrations", data / "demos.jsonl"]
    rlhf_here("init", tmp_path / "large", *flags, "--gpu", "l4")
    whole = plan(PlanOptions(recipe=str(tmp_path / "large"), gpu="l4"))["stages"]["sft"]["memory_total"]
    out, _ = rlhf_here("init", tmp_path / "small", *flags, "--memory", whole / GIB)  # 5 % of it are not usable
    assert "init: sft takes gradient_checkpointing" in out
    assert keys(tmp_path / "small", "sft")["gradient_checkpointing"] is True
    assert "# so that it fits the device" in (tmp_path / "small" / "sft.yaml").read_text()


def test_nothing_is_overwritten(data: Path, tmp_path: Path) -> None:
    (tmp_path / "sft.yaml").write_text("mine")
    _, err = rlhf_here("init", tmp_path, "--documents", data / "text.jsonl", code=2)
    assert "is there already; nothing is overwritten, name a new folder" in err
    assert (tmp_path / "sft.yaml").read_text() == "mine"


def test_columns_that_nobody_could_guess_are_asked_for(data: Path, tmp_path: Path) -> None:
    words = [
        "init",
        tmp_path / "new",
        "--base",
        data / "run" / "sft",
        "--demonstrations",
        data / "ours.jsonl",
        "--gpu",
        "l4",
    ]
    _, err = rlhf_here(*words, code=2)
    assert (
        f"{data / 'ours.jsonl'}:1: no demonstration (prompt, response); its columns are: frage, antwort; say --column"
        in err
    )
    assert not (tmp_path / "new").exists()
    asked = []

    def ask(question: str) -> str:
        asked.append(question)
        return "frage" if "`prompt`" in question else "antwort"

    dataset = look(str(data / "ours.jsonl"), "demonstration", {}, ask)
    assert dataset.entry.columns == {"prompt": "frage", "response": "antwort"}
    assert len(asked) == 2
    dataset = look(str(data / "ours.jsonl"), "demonstration", {"prompt": "frage", "response": "antwort"}, None)
    assert dataset.rows == 60


def test_questions_ask_for_what_no_flag_says() -> None:
    args = argparse.Namespace(
        task=None, base=None, documents=[], demonstrations=[], comparisons=[], prompts=[], gpu=None, gpus=1, memory=None
    )
    answers = iter(["Be kind.", "org/model", "", "a.jsonl b.jsonl", "", "", "h100", "8"])
    ask_for_missing(args, lambda _: next(answers))
    assert (args.task, args.base, args.demonstrations) == ("Be kind.", "org/model", ["a.jsonl", "b.jsonl"])
    assert (args.documents, args.gpu, args.gpus) == ([], "h100", 8)


def test_wrong_words_are_refused_before_anything_is_written(data: Path, tmp_path: Path) -> None:
    base = ["--base", data / "run" / "sft"]
    for words, message in (
        ([], "no data; give one of --documents, --demonstrations, --comparisons, --prompts"),
        (
            ["--demonstrations", data / "demos.jsonl"],
            "without --base a model is trained from nothing, which needs --documents",
        ),
        ([*base, "--prompts", data / "demos.jsonl"], "which needs a reward: give --comparisons, or --reward"),
        ([*base, "--demonstrations", tmp_path / "none.jsonl"], f"{tmp_path / 'none.jsonl'}: does not exist"),
        ([*base, "--demonstrations", data / "demos.jsonl", "--gpu", "abacus"], "--gpu 'abacus' is not in the table"),
        ([*base, "--demonstrations", data / "demos.jsonl", "--gpus", "0"], "must be above 0"),
        ([*base, "--demonstrations", data / "demos.jsonl", "--column", "prompt"], "write OURS=THEIRS"),
        (["--base", tmp_path, "--demonstrations", data / "demos.jsonl"], "no model can be loaded from"),
    ):
        _, err = rlhf_here("init", tmp_path / "new", *words, code=2)
        assert message in err, (words, err)
        assert len(err.splitlines()) == 1
        assert not (tmp_path / "new").exists()

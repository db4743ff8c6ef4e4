"""Recipes: what they may say, and one line with file and line for what they may not."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from pipeline.config import arguments
from pipeline.config.arguments import STAGES, RewardSource, load
from pipeline.errors import UserError

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*/*.yaml"))
SFT = "parent: p\noutput_dir: o\ndatasets:\n  - path: d.jsonl\n"


def write(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return ["--config", str(path)]


@pytest.mark.parametrize(
    "path", [p for p in RECIPES if p.parent.name != "accelerate"], ids=lambda p: f"{p.parent.name}/{p.name}"
)
def test_every_recipe_parses(path: Path) -> None:
    args = load(STAGES[path.stem], ["--config", str(path)])
    assert args.output_dir.startswith("runs/")
    assert path.read_text().startswith("# ")


@pytest.mark.parametrize("path", [p for p in RECIPES if p.parent.name == "accelerate"], ids=lambda p: p.name)
def test_every_accelerate_file_loads(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes >= 1
    assert path.read_text().startswith("# ")


def test_every_accelerate_file_says_where_it_ran() -> None:
    for path in (ROOT / "recipes" / "accelerate").glob("*.yaml"):
        head = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
        assert re.search(r"ran under it|[Nn]ot run by us yet|not been run by us yet", head), path.name


def test_no_dead_options() -> None:
    """Every key that a recipe may say is read somewhere outside arguments.py."""
    code = "".join(path.read_text() for path in (ROOT / "pipeline").rglob("*.py") if path.name != "arguments.py")
    classes = [
        *STAGES.values(),
        arguments.DatasetEntry,
        arguments.LoraOptions,
        arguments.TokenizerOptions,
        RewardSource,
    ]
    for cls in classes:
        for field in dataclasses.fields(cls):
            assert re.search(rf"\.{field.name}\b|\"{field.name}\"", code), (
                f"{cls.__name__}.{field.name} is read nowhere"
            )
            assert field.metadata.get("help") or field.name in ("parent",), f"{cls.__name__}.{field.name} has no help"


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("learning_rat: 1.0e-4\n", 5, "unknown key 'learning_rat'; did you mean 'learning_rate'?"),
        ("epochs: 1\nepochs: 2\n", 6, "key 'epochs' stands twice"),
        ("examples_per_step: 2.5\n", 5, "examples_per_step: expected a whole number, got 2.5"),
        ("examples_per_step: [1]\n", 5, "expected a whole number, got a list"),
        ("examples_per_step: null\n", 5, "expected a whole number, got None"),
        ("packing: 1\n", 5, "packing: expected true or false, got 1"),
        ("learning_rate: fast\n", 5, "learning_rate: expected a number, got 'fast'"),
        ("learning_rate: -1.0\n", 5, "learning_rate: -1.0 is out of range"),
        ("learning_rate: .nan\n", 5, "NaN"),
        ("lr_schedule: cosin\n", 5, "'cosin' is not known; did you mean 'cosine'?"),
        ("lora:\n  rank: 8\n", 6, "unknown key 'rank'"),
        ("lora:\n  r: 0\n", 6, "r: 0 is out of range"),
        ("report_to: wandb\n", 5, "report_to: expected a list"),
        ("a: [1\n", 6, "not valid YAML"),
    ],
)
def test_a_wrong_recipe_is_named_by_its_line(tmp_path: Path, text: str, line: int, words: str) -> None:
    with pytest.raises(UserError) as caught:
        load(STAGES["sft"], write(tmp_path, SFT + text))
    assert str(caught.value).startswith(f"{tmp_path / 'recipe.yaml'}:{line}: "), caught.value
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("stage", "text", "words"),
    [
        ("sft", "output_dir: o\ndatasets:\n  - path: d\n", "parent is missing"),
        ("sft", "parent: p\ndatasets:\n  - path: d\n", "output_dir is missing"),
        ("sft", "parent: p\noutput_dir: o\n", "datasets is missing"),
        ("sft", SFT + "quantization: 4bit\n", "quantization needs `lora:`"),
        ("sft", SFT + "best_metric: loss\n", "best_metric needs `eval_steps:`"),
        ("sft", SFT + "save_steps: 15\n", "must be a multiple of logging_steps"),
        ("sft", SFT + "report_to: [mlflow]\n", "unknown tracker 'mlflow'"),
        ("pretrain", "output_dir: o\ndatasets:\n  - path: d\n", "needs `train_tokenizer:`"),
        ("ppo", SFT, "reward is missing"),
        ("ppo", SFT + "reward: m:f\nvalue_init: reward\n", "value_init: reward needs a reward model"),
        ("ppo", SFT + "reward: r\nminibatches: 3\n", "must divide prompts_per_rollout"),
    ],
)
def test_keys_that_do_not_go_together(tmp_path: Path, stage: str, text: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        load(STAGES[stage], write(tmp_path, text))
    assert words in str(caught.value)


def test_flags_override_the_recipe(tmp_path: Path) -> None:
    config = write(tmp_path, SFT + "learning_rate: 1e-4\nlora:\n  r: 4\n")
    args: Any = load(STAGES["sft"], [*config, "--learning_rate", "3e-4", "--packing", "false", "--seed", "7"])
    assert (args.learning_rate, args.packing, args.seed, args.lora.r) == (3e-4, False, 7, 4)
    with pytest.raises(UserError, match="unknown flag '--learning_rat'; did you mean --learning_rate"):
        load(STAGES["sft"], [*config, "--learning_rat", "1"])
    with pytest.raises(UserError, match="unknown flag '--no-such-key'; `--help` lists the keys"):
        load(STAGES["sft"], [*config, "--no-such-key", "1"])
    with pytest.raises(UserError, match="out of range"):
        load(STAGES["sft"], [*config, "--learning_rate", "11"])
    with pytest.raises(UserError, match="no such recipe"):
        load(STAGES["sft"], ["--config", str(tmp_path / "none.yaml")])


def test_rewards_of_every_form(tmp_path: Path) -> None:
    one: Any = load(STAGES["ppo"], write(tmp_path, SFT + "reward: runs/demo/reward\n"))
    assert one.reward == [RewardSource(model="runs/demo/reward")]
    both: Any = load(STAGES["ppo"], write(tmp_path, SFT + "reward:\n  - model: r\n    weight: 0.5\n  - rubric:score\n"))
    assert both.reward == [RewardSource(model="r", weight=0.5), RewardSource(function="rubric:score")]
    flag: Any = load(STAGES["ppo"], [*write(tmp_path, SFT + "reward: r\n"), "--reward", "runs/x/reward"])
    assert flag.reward == [RewardSource(model="runs/x/reward")]
    weighted: Any = load(STAGES["ppo"], [*write(tmp_path, SFT + "reward: r\n"), "--reward", "runs/x*0.5", "m:f*-2"])
    assert weighted.reward == [RewardSource(model="runs/x", weight=0.5), RewardSource(function="m:f", weight=-2.0)]
    assert [str(source) for source in weighted.reward] == ["runs/x*0.5", "m:f*-2"], "and back"
    for stage, key in (
        ("ppo", "reward"),
        ("sft", "best_metric: score\neval_steps: 5\nsave_steps: 5\nlogging_steps: 5\nscore"),
    ):
        with pytest.raises(UserError, match="exactly one of `model:` and `function:`"):
            load(STAGES[stage], write(tmp_path, SFT + f"{key}:\n  - weight: 1.0\n"))


def test_a_resolved_recipe_is_a_recipe_again(tmp_path: Path) -> None:
    """What lineage.json records can be run again."""
    args = load(STAGES["sft"], ["--config", str(ROOT / "recipes" / "demo" / "sft.yaml")])
    again = load(STAGES["sft"], write(tmp_path, yaml.safe_dump(arguments.as_dict(args))))
    assert again == args

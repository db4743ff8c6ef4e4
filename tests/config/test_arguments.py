"""Recipes: what they may say, and one line with file and line for what they may not."""

from __future__ import annotations

import ast
import dataclasses
import os
import re
import typing
from pathlib import Path
from typing import Any

from pipeline.config.pretrain import TokenizerOptions
from pipeline.config.reader import load
from pipeline.config.rewards import RewardSource
from pipeline.config.round import RoundArguments
from pipeline.config.stages import STAGES
from pipeline.config.trainer import LoraOptions
from pipeline.data.entries import DatasetEntry
from pipeline.errors import UserError

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(path for path in (ROOT / "recipes").glob("*/*.yaml") if path.name != "round.yaml")
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


CLASSES = [*STAGES.values(), RoundArguments, DatasetEntry, LoraOptions, TokenizerOptions, RewardSource]


def test_no_dead_options() -> None:
    """Every key that a recipe may say is read as an attribute somewhere in pipeline/ outside config/."""
    read = set()
    for path in (ROOT / "pipeline").rglob("*.py"):
        if path.parent.name != "config":
            nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
            read |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
            read |= {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    # `report_to` is read through the property `trackers`.
    names = {field.name for cls in CLASSES for field in dataclasses.fields(cls)} - {"report_to"}
    assert names - read == set()
    assert "trackers" in read


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_key_has_help_and_every_number_a_range(cls: type) -> None:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        assert field.metadata["help"], field.name
        assert not re.search(r"\((A|I|S|Z)\d|N\+", field.metadata["help"]), f"{field.name}: spell the paper out"
        if re.search(r"\b(int|float)\b", str(hints[field.name])):
            assert field.metadata["low"] < field.metadata["high"], field.name


@pytest.mark.parametrize("stage", STAGES)
def test_help_shows_every_key_once_and_the_common_ones_first(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        load(STAGES[stage], ["--help"])
    assert ended.value.code == 0
    shown = re.findall(r"^  --(\w+)", capsys.readouterr().out, re.MULTILINE)
    assert sorted(shown) == sorted(field.name for field in dataclasses.fields(STAGES[stage]))
    assert shown[:3] == ["parent", "output_dir", "datasets"]


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
        ("datasets: [a\n", 6, "not valid YAML"),
        ("run_name: !!python/object/apply:os.system [ls]\n", 5, "expected text, got a list or mapping"),
        ("run_name: !secret x\n", 5, "the tag '!secret' is not read"),
        ("trainer_options: !!set {a}\n", 5, "trainer_options: expected `key: value` lines"),
        ("trainer_options: {a: !!binary aGk=}\n", 5, "trainer_options.a: the tag 'binary' is not read"),
        ("? [a, b]\n: 1\n", 5, "a list or mapping stands where a key must"),
        ("trainer_options: {[a]: 1}\n", 5, "a list or mapping stands where a key must"),
        ("<<: {epochs: 1}\n", 5, "merge keys (<<) are not read"),
        (f"seed: {'9' * 5000}\n", 5, "cannot be read as a whole number"),
        (f"epochs: {'9' * 5000}\n", 5, "cannot be read as a whole number"),
        (f"epochs: {'9' * 400}\n", 5, "epochs: expected a number, got 999"),
        ("seed: 1:30\n", 5, "seed: YAML reads 1:30 as 90 (base 60); write the number out"),
        ("seed: 010\n", 5, "seed: YAML reads 010 as 8 (octal); write the number out"),
        ("epochs: 1:30.5\n", 5, "epochs: YAML reads 1:30.5 as 90.5 (base 60)"),
        ("trainer_options: {logging_steps: 010}\n", 5, "trainer_options.logging_steps: YAML reads 010 as 8 (octal)"),
        ("seed: 2026-11-25\n", 5, "seed: expected a whole number"),
        ("run_name: off\n", 5, "run_name: expected text, but YAML reads off as true or false; write 'off'"),
        ("best_metric: no\n", 5, "best_metric: expected text, but YAML reads no as true or false"),
        ("epochs: .inf\n", 5, "epochs: inf is out of range"),
        ("trainer_options: {label_smoothing_factor: .nan}\n", 5, "NaN"),
        ("run_name: &a [*a]\n", 5, "expected text"),
        ("trainer_options: &a {a: *a}\n", 5, "an alias refers to what it stands in"),
        ('run_name: "\\ud83d"\n', 5, "holds a character that no file can hold"),
        ('run_name: "a\\0"\n', 5, "holds a character that no file can hold"),
        ("run_name: a\x07b\n", 5, "not valid YAML: character #x0007"),
        ("run_name: hf_" + "a" * 34 + "\n", 5, "holds an access token"),
        ("output_dir2: ~\n", 5, "unknown key 'output_dir2'; did you mean 'output_dir'?"),
        ("trainer_options: " + "[" * 5000 + "\n", None, "nested too deeply"),
        ("trainer_options: {a: " + "[" * 60 + "]" * 60 + "}\n", 5, "nested too deeply"),
    ],
)
def test_a_wrong_recipe_is_named_by_its_line(tmp_path: Path, text: str, line: int | None, words: str) -> None:
    with pytest.raises(UserError) as caught:
        load(STAGES["sft"], write(tmp_path, SFT + text))
    where = f"{tmp_path / 'recipe.yaml'}:" + (f"{line}: " if line else " ")
    assert str(caught.value).startswith(where), caught.value
    assert len(str(caught.value)) < 400
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
    again = load(STAGES["sft"], write(tmp_path, yaml.safe_dump(dataclasses.asdict(args))))
    assert again == args


def test_aliases_that_explode(tmp_path: Path) -> None:
    """Nine levels of nine aliases each would be four hundred million values."""
    lines = ["a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]" for old, new in zip("abcdefgh", "bcdefghi", strict=True)]
    text = SFT + "trainer_options:\n" + "".join(f"  {line}\n" for line in lines)
    with pytest.raises(UserError, match=r"recipe\.yaml:\d+: trainer_options.*more than 10,000 values"):
        load(STAGES["sft"], write(tmp_path, text))


def test_a_harmless_alias_is_read(tmp_path: Path) -> None:
    args: Any = load(
        STAGES["ppo"], write(tmp_path, SFT.replace("datasets:", "datasets: &d") + "reward: r\neval_datasets: *d\n")
    )
    assert args.eval_datasets == args.datasets == [DatasetEntry(path="d.jsonl")]


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "large.yaml").write_bytes(b"#" * 2_000_000)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "utf16.yaml").write_bytes(SFT.encode("utf-16"))
    (tmp_path / "latin1.yaml").write_bytes(b"run_name: caf\xe9\n")
    for name, words in (
        (".", "is a folder; name a recipe's file in it"),
        ("pipe.yaml", "is no regular file"),
        ("large.yaml", "it is no recipe"),
        ("binary.yaml", "cannot be read"),
        ("utf16.yaml", "it is UTF-16 or holds NUL bytes; save the recipe as UTF-8"),
        ("latin1.yaml", r"not UTF-8 \(byte 14\); save the recipe as UTF-8"),
        ("none.yaml", "no such recipe"),
    ):
        for form in (["--config", str(tmp_path / name)], [f"--config={tmp_path / name}"]):
            with pytest.raises(UserError, match=words) as caught:
                load(STAGES["sft"], form)
            assert str(caught.value).startswith(f"{tmp_path / name}: ")
    for form in (["--config"], ["--config="]):
        with pytest.raises(UserError, match="--config needs a file"):
            load(STAGES["sft"], form)


def test_a_date_among_a_librarys_options_stays_text(tmp_path: Path) -> None:
    options = load(STAGES["sft"], write(tmp_path, SFT + "trainer_options: {run_name: 2026-11-25}\n")).trainer_options
    assert options == {"run_name": "2026-11-25"}


def test_flags_of_every_form(tmp_path: Path) -> None:
    (_, path) = write(tmp_path, SFT + "reward: r\n")
    args: Any = load(STAGES["ppo"], [
        f"--config={path}", "--missing_eos_score", "-1.5", "--kl_coef=1e-3", "--quiet", "--whiten_advantages", "false",
        "--judges", "a:f", "b:f", "--roles=adapters", "--lora", "{r: 8, target_modules: [q_proj]}", "--run-name", "yes", "--score_clip", "null",
        "--datasets", "{path: a.jsonl}", "{path: b.jsonl, weight: 2}", "--seed", "1", "--seed", "2", "--data_root", "2026",
    ])  # fmt: skip
    assert (args.missing_eos_score, args.kl_coef, args.quiet, args.whiten_advantages) == (-1.5, 1e-3, True, False)
    assert (args.judges, args.run_name, args.score_clip, args.seed) == (["a:f", "b:f"], "yes", None, 2)
    assert args.lora == LoraOptions(r=8, target_modules=["q_proj"])
    assert args.datasets == [DatasetEntry(path="a.jsonl"), DatasetEntry(path="b.jsonl", weight=2.0)]
    assert args.data_root == "2026"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--learning_rate", "fast"], "command line: learning_rate: expected a number, got 'fast'"),
        (["--seed"], "command line: --seed needs a value"),
        (["--seed", "1", "2"], "command line: unknown flag '2'"),
        (["stray"], "command line: unknown flag 'stray'"),
        (["--lora", "{r: 0}"], "command line: r: 0 is out of range"),
        (["--lora", "{r: ["], "command line: lora: not valid YAML"),
        (["--lora", "8"], "command line: expected `key: value` lines for LoraOptions"),
        (["--seed", "9" * 5000], "command line: seed: '999"),
        (["--run_name", "caf\udce9"], "command line: run_name: holds a character that no file can hold"),
        (["--kl_estimator", "k3"], "command line: kl_estimator: 'k3' is not known; one of: k1, k2"),
    ],
)
def test_a_wrong_flag_is_named(tmp_path: Path, flags: list[str], words: str) -> None:
    with pytest.raises(UserError) as caught:
        load(STAGES["ppo"], [*write(tmp_path, SFT + "reward: r\n"), *flags])
    assert str(caught.value).startswith(words), caught.value
    assert "\n" not in str(caught.value)


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell leaves the one in `--output_dir=~/x` and in a recipe as it is."""
    monkeypatch.setenv("HOME", "/home/somebody")
    config = write(
        tmp_path, "parent: ~/models/base\noutput_dir: o\nreward: ~/reward*0.5\ndatasets:\n  - path: ~/d.jsonl\n"
    )
    args: Any = load(STAGES["ppo"], [*config, "--output_dir=~/runs/x"])
    assert (args.parent, args.output_dir) == ("/home/somebody/models/base", "/home/somebody/runs/x")
    assert args.reward == [RewardSource(model="/home/somebody/reward", weight=0.5)]
    assert args.datasets[0].path == "/home/somebody/d.jsonl"
    with pytest.raises(UserError, match="no home folder is known"):
        load(STAGES["ppo"], [*config, "--output_dir=~nobody-of-that-name/x"])


@pytest.mark.parametrize(
    "options",
    ["{hub_token: hf_x}", "{push_to_hub_token: x}", "{accelerator_config: {api_key: x}}", "{a: [{password: x}]}"],
)
def test_secrets_do_not_belong_into_a_recipe(tmp_path: Path, options: str) -> None:
    with pytest.raises(UserError, match=r"trainer_options: '\w+' would be written to lineage\.json; .*HF_TOKEN"):
        load(STAGES["sft"], write(tmp_path, SFT + f"trainer_options: {options}\n"))
    load(STAGES["sft"], write(tmp_path, SFT + "trainer_options: {include_num_input_tokens_seen: 'all'}\n"))

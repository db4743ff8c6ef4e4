"""Bad input of every kind: exit code 2, one line on stderr that says where and what to do, nothing overwritten."""

from __future__ import annotations

import copy
import fcntl
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from helpers.launches import CARDS, ROOT, environment, launch_command, lineage, tiny_flags
from pipeline import ppo, pretrain, reward, sft
from pipeline.config.stages import STAGES
from pipeline.models.tokenizers import load_tokenizer
from pipeline.training.stage import launch

import pytest

MAINS: dict[str, Any] = {"pretrain": pretrain.main, "sft": sft.main, "reward": reward.main, "ppo": ppo.main}
GOOD = {
    "pretrain": {"text": "A letter from Lucy."},
    "sft": {"prompt": "Hi", "response": "Hello."},
    "reward": {"prompt": "Hi", "chosen": "Hello.", "rejected": "No."},
    "ppo": {"prompt": "Hi"},
}
SECTION = {"pretrain": "path: data_cards/demo_corpus\n    max_rows: 300", "sft": "path: data_cards/demo_demonstrations\n    max_rows: 500",
           "reward": "path: data_cards/demo_comparisons\n    max_rows: 400", "ppo": "path: data_cards/demo_prompts\n"}  # fmt: skip


def refused(capsys: pytest.CaptureFixture[str], stage: str, flags: list[str]) -> str:
    """The one line of a run that is refused."""
    with pytest.raises(SystemExit) as caught:
        launch(stage, STAGES[stage], MAINS[stage], flags)
    assert caught.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def flags(stage: str, chain: Path, recipes: Path, tmp_path: Path, **changes: Any) -> list[str]:
    values: dict[str, Any] = {"config": recipes / f"{stage}.yaml", "report_to": None, "output_dir": tmp_path / "out"}
    if stage != "pretrain":
        values["parent"] = chain / ("pretrain" if stage == "sft" else "sft")
    if stage == "ppo":
        values["reward"] = chain / "reward"
    return tiny_flags(stage, tmp_path, **{**values, **changes})


def with_data(stage: str, recipes: Path, tmp_path: Path, lines: list[str]) -> Path:
    data, recipe = tmp_path / "data.jsonl", tmp_path / f"{stage}.yaml"
    data.write_text("\n".join(lines) + "\n")
    text = (recipes / f"{stage}.yaml").read_text()
    assert SECTION[stage] in text
    recipe.write_text(text.replace(SECTION[stage], f"path: {data}\n", 1))
    return recipe


@pytest.mark.parametrize("stage", MAINS)
@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("{broken", "not valid JSON"),
        ('{"nothing": 1}', "columns are: nothing"),
        ("wrong type", "must be text"),
        ("empty", "is empty"),
    ],
)
def test_bad_rows(
    stage: str, bad: str, words: str, chain: Path, recipes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = list(GOOD[stage])[-1]
    if bad in ("wrong type", "empty"):
        # An empty response of a comparison is a defect of the data, for `problems:` to decide.
        name = "prompt" if stage == "reward" and bad == "empty" else last
        bad = json.dumps({**GOOD[stage], name: 3.5 if bad == "wrong type" else " "})
    recipe = with_data(stage, recipes, tmp_path, [json.dumps(GOOD[stage]), bad])
    line = refused(capsys, stage, flags(stage, chain, recipes, tmp_path, config=recipe))
    assert f"{tmp_path / 'data.jsonl'}:2: " in line
    assert words in line
    assert not (tmp_path / "out" / "lineage.json").exists()


def test_unknown_key(chain: Path, recipes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "ppo.yaml"
    recipe.write_text((recipes / "ppo.yaml").read_text() + "kl_coeff: 0.1\n")
    line = refused(capsys, "ppo", flags("ppo", chain, recipes, tmp_path, config=recipe))
    number = len(recipe.read_text().splitlines())
    assert line == f"error: {recipe}:{number}: unknown key 'kl_coeff'; did you mean 'kl_coef'?"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_missing_parent(
    stage: str, chain: Path, recipes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, stage, flags(stage, chain, recipes, tmp_path, parent=tmp_path / "none"))
    assert "does not exist; run the stage that writes it first" in line


@pytest.mark.parametrize(
    ("stage", "key", "wrong"), [("ppo", "parent", "pretrain"), ("ppo", "reward", "sft"), ("sft", "parent", "reward")]
)
def test_parent_of_the_wrong_stage(
    stage: str, key: str, wrong: str, chain: Path, recipes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, stage, flags(stage, chain, recipes, tmp_path, **{key: chain / wrong}))
    assert f"comes from stage {wrong!r}, expected" in line


def test_an_unfinished_parent(chain: Path, recipes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(chain / "sft", tmp_path / "sft")
    (tmp_path / "sft" / "checkpoint-10").mkdir()
    line = refused(capsys, "ppo", flags("ppo", chain, recipes, tmp_path, parent=tmp_path / "sft"))
    assert "that stage did not finish; run it again, it will resume" in line


def external(source: Path, target: Path, tokenizer: Any) -> Path:
    """A copy of a stage's model as if it came from elsewhere, with another tokenizer."""
    shutil.copytree(source, target)
    (target / "lineage.json").unlink()
    tokenizer.save_pretrained(target)
    return target


def test_a_reward_model_with_another_tokenizer(
    chain: Path, recipes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a reward it scores text; as the value network's start it is refused, if that is asked for."""
    other = copy.deepcopy(load_tokenizer(str(chain / "reward")))
    other.add_tokens(["zzz"])
    folder = external(chain / "reward", tmp_path / "reward", other)
    asked = flags("ppo", chain, recipes, tmp_path, reward=folder, value_init="reward")
    line = refused(capsys, "ppo", asked)
    assert "value_init: reward needs the policy's tokenizer" in line
    assert "say `value_init: policy`" in line


def test_pad_equal_to_eos_past_the_first_stage(
    chain: Path, recipes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = copy.deepcopy(load_tokenizer(str(chain / "sft")))
    same.pad_token = same.eos_token
    folder = external(chain / "sft", tmp_path / "sft", same)
    line = refused(capsys, "ppo", flags("ppo", chain, recipes, tmp_path, parent=folder))
    assert "no pad token apart from EOS; run SFT (or reward) from it" in line


def test_a_prompt_longer_than_allowed_and_than_the_context(
    chain: Path, recipes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.dumps({"prompt": "Hi"}), json.dumps({"prompt": "a very long story " * 40})]
    recipe = with_data("ppo", recipes, tmp_path, rows)
    line = refused(capsys, "ppo", flags("ppo", chain, recipes, tmp_path, config=recipe))
    assert f"{tmp_path / 'data.jsonl'}:2: prompt of " in line
    assert "exceeds max_prompt_tokens (64)" in line
    line = refused(capsys, "ppo", flags("ppo", chain, recipes, tmp_path, max_prompt_tokens=250))
    assert "exceed the model's context of 256" in line
    line = refused(capsys, "sft", flags("sft", chain, recipes, tmp_path, max_tokens=300))
    assert "max_tokens: 300 tokens exceed the model's context of 256" in line


@pytest.mark.parametrize("stage", MAINS)
def test_another_recipes_folder_is_not_overwritten(
    stage: str, chain: Path, recipes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = lineage(chain / stage), (chain / stage / "model.safetensors").stat().st_mtime_ns
    line = refused(capsys, stage, flags(stage, chain, recipes, tmp_path, output_dir=chain / stage, seed=99))
    assert "holds a finished run with other seed; nothing was overwritten" in line
    assert (lineage(chain / stage), (chain / stage / "model.safetensors").stat().st_mtime_ns) == before


def test_a_folder_of_something_else(
    chain: Path, recipes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    line = refused(capsys, "sft", flags("sft", chain, recipes, tmp_path))
    assert "holds files that no stage of ours wrote; name a new or empty folder" in line
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]
    own = refused(capsys, "sft", flags("sft", chain, recipes, tmp_path, output_dir=chain / "pretrain"))
    assert "is the parent too; it would be overwritten" in own


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_parent_whose_template_changed(
    stage: str, chain: Path, recipes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parent = tmp_path / "parent"
    shutil.copytree(chain / ("pretrain" if stage == "sft" else "sft"), parent)
    template = parent / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    line = refused(capsys, stage, flags(stage, chain, recipes, tmp_path, parent=parent))
    assert "its chat template changed after the stage finished" in line


def test_sharded_backends(
    chain: Path, recipes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert "asks for FSDP1; say `fsdp_version: 2`" in refused(
        capsys, "reward", flags("reward", chain, recipes, tmp_path)
    )
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert "does not run under DeepSpeed" in refused(capsys, "reward", flags("reward", chain, recipes, tmp_path))


def test_a_folder_in_use(chain: Path, recipes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / ".lock").open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        line = refused(capsys, "sft", flags("sft", chain, recipes, tmp_path))
    assert "is in use by another run; wait for it, or end it" in line


def test_too_little_data(chain: Path, recipes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = with_data("reward", recipes, tmp_path, [json.dumps(GOOD["reward"])])
    recipe.write_text(recipe.read_text().replace("held_out_labelers: [erik]\n", ""))
    line = refused(capsys, "reward", flags("reward", chain, recipes, tmp_path, config=recipe))
    assert "rankings to train on and" in line
    labelers = refused(capsys, "reward", flags("reward", chain, recipes, tmp_path, held_out_labelers="nobody"))
    assert "no ranking by 'nobody'; labelers: ana, ben, chloe, dev, erik" in labelers


def test_reward_functions_that_misbehave(
    chain: Path, recipes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad_rewards.py").write_text(
        "def short(prompts, responses, rows):\n    return [1.0]\n"
        "def nan(prompts, responses, rows):\n    return [float('nan')] * len(responses)\n"
        "def text(prompts, responses, rows):\n    return ['1'] * len(responses)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, words in (
        ("short", "returned 1 scores for 8 responses"),
        ("nan", "scores must be finite"),
        ("text", "a number is needed"),
        ("none", "has no function 'none'"),
    ):
        changed = flags(
            "ppo",
            chain,
            recipes,
            tmp_path,
            reward=f"bad_rewards:{name}",
            value_init="policy",
            output_dir=tmp_path / name,
        )
        assert words in refused(capsys, "ppo", changed)
    assert "cannot be imported" in refused(
        capsys, "ppo", flags("ppo", chain, recipes, tmp_path, reward="no_such:f", value_init="policy")
    )


def test_the_true_exit_code_and_no_traceback(tmp_path: Path) -> None:
    """As users see it: `python pipeline/sft.py` exits 2, `rlhf run` too, with one line."""
    command = [
        sys.executable,
        "pipeline/sft.py",
        "--config",
        "recipes/demo/sft.yaml",
        "--output_dir",
        str(tmp_path),
        "--parent",
        "runs/none/pretrain",
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert (
        done.stderr.splitlines()[-1]
        == "error: parent 'runs/none/pretrain' does not exist; run the stage that writes it first, or correct `parent:`"
    )
    recipe = tmp_path / "recipe"
    recipe.mkdir()
    (recipe / "sft.yaml").write_text(
        f"parent: {tmp_path}/none\noutput_dir: {tmp_path}/out\ndatasets:\n  - path: {CARDS}/demo_demonstrations\n"
    )
    run = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", "run", str(recipe)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 2
    assert "Traceback" not in run.stderr
    assert f"error: sft: parent '{tmp_path}/none' does not exist" in run.stderr


def test_an_error_of_one_process_alone_is_told_once(chain: Path, recipes: Path, tmp_path: Path) -> None:
    """A reward that fails on the second process's rows: all end, one line says why, the exit code is the stage's own."""
    recipe = tmp_path / "ppo.yaml"
    recipe.write_text((recipes / "ppo.yaml").read_text())
    (tmp_path / "second_rank.py").write_text(
        "import os\n\n\ndef score(prompts, responses, rows):\n"
        "    return [float('nan') if os.environ['RANK'] == '1' else 1.0] * len(responses)\n"
    )
    changed = flags("ppo", chain, recipes, tmp_path, config=recipe, reward="second_rank:score", eval_rollouts=None)
    command = launch_command("ppo", changed, 2)
    command[command.index("accelerate.commands.launch")] = "pipeline.training.launcher"
    done = subprocess.run(
        command,
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "scores must be finite" in line
    assert "Traceback" not in done.stderr


def test_another_reward_is_another_run(
    chain: Path, recipes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A function's source belongs to what a run is: the finished folder is not taken for the changed reward's."""
    module = tmp_path / "changing.py"
    module.write_text("def score(prompts, responses, rows):\n    return [1.0] * len(responses)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    changed = flags("ppo", chain, recipes, tmp_path, reward="changing:score", total_rollouts=1, eval_rollouts=None)
    launch("ppo", STAGES["ppo"], ppo.main, changed)
    launch("ppo", STAGES["ppo"], ppo.main, changed)
    assert "already complete" in capsys.readouterr().out
    module.write_text("def score(prompts, responses, rows):\n    return [2.0] * len(responses)\n")
    assert "holds a finished run with other reward changing:score" in refused(capsys, "ppo", changed)


def test_a_module_that_breaks_is_named(
    chain: Path, recipes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_module.py").write_text("def score(:\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    line = refused(capsys, "ppo", flags("ppo", chain, recipes, tmp_path, reward="broken_module:score"))
    assert "module 'broken_module' fails when it is imported: SyntaxError" in line


def test_half_a_surrogate_is_named(tmp_path: Path) -> None:
    from pipeline.data.records import PARSERS, read_records
    from pipeline.errors import UserError

    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "good \\ud83d\\ude00"}\n{"text": "bad \\ud83d"}\n')
    with pytest.raises(UserError, match=r"data\.jsonl:2: holds half of a surrogate pair"):
        read_records(path, PARSERS["document"])


def test_weights_that_are_no_safetensors(
    chain: Path, recipes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    external = tmp_path / "external"
    shutil.copytree(chain / "pretrain", external, ignore=shutil.ignore_patterns("lineage.json"))
    (external / "model.safetensors").write_bytes(b"not weights")
    line = refused(capsys, "sft", flags("sft", chain, recipes, tmp_path, parent=external))
    assert "no model can be loaded from" in line


def test_parents_that_are_no_model_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Hub ids without a slash, addresses, adapters: the line names the remedy."""
    adapter = tmp_path / "mine"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    own = tmp_path / "sft" / "adapter"
    own.mkdir(parents=True)
    (own / "adapter_config.json").write_text("{")
    (tmp_path / "sft" / "config.json").write_text("{}")
    for parent, words in (
        ("gpt2", "is no local folder and cannot be had from the Hub"),
        ("owner/name", "cannot be had from the Hub"),
        ("https://huggingface.co/owner/name", "is an address; name the Hub id alone, 'owner/name'"),
        (adapter, "is an adapter of 'owner/base', no whole model; merge it first"),
        (own, f"is an adapter; its merged model is '{tmp_path}/sft', name that"),
    ):
        line = refused(capsys, "sft", tiny_flags("sft", tmp_path / "run", parent=parent))
        assert line.startswith(f"error: parent '{parent}' ")
        assert words in line

"""`rlhf check RECIPE` judges by the stage's own code: what the stage refuses before training, check refuses with the same line."""

# ruff: noqa: ARG005 - every fault takes recipe and tokenizer

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers.launches import rlhf_here
from helpers.tiny_models import make_lm
from pipeline import ppo, pretrain, sft
from pipeline.config.stages import STAGES
from pipeline.training.stage import launch

import pytest
import yaml

MAINS: dict[str, Any] = {"pretrain": pretrain.main, "sft": sft.main, "ppo": ppo.main}


@pytest.fixture
def recipe(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """SFT and PPO from an external model with a template, and a reward function beside them."""
    folder = tmp_path / "recipe"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    base = tmp_path / "base"
    make_lm("llama", tokenizer).save_pretrained(base)
    tokenizer.save_pretrained(base)
    rows = [{"prompt": f"Hello number {n}", "response": f"Hi {n}."} for n in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"text": f"A letter, number {n}."}) + "\n" for n in range(60))
    )
    (folder / "by_length.py").write_text(
        "def score(prompts, responses, rows):\n    return [1.0 * len(r) for r in responses]\n"
    )
    shared = {"precision": "fp32", "held_out_fraction": 0.2, "threads": 1, "quiet": True}
    data = {"datasets": [{"path": str(tmp_path / "rows.jsonl")}], "parent": str(base)}
    short = {"max_steps": 1, "save_steps": 10, "examples_per_step": 2, "examples_per_device": 2, "max_tokens": 64}
    recipes: dict[str, dict[str, Any]] = {
        "sft": {**shared, **data, **short},
        "ppo": {
            **shared, **data, "reward": "by_length:score", "max_prompt_tokens": 32, "max_response_tokens": 4,
            "total_rollouts": 1, "prompts_per_rollout": 4, "minibatches": 1, "ppo_epochs": 1,
        },
    }  # fmt: skip
    for stage, values in recipes.items():
        change(folder, stage, **values, output_dir=str(tmp_path / "run" / stage))
    return folder


def change(recipe: Path, stage: str, **values: Any) -> None:
    path = recipe / f"{stage}.yaml"
    before = yaml.safe_load(path.read_text()) if path.exists() else {}
    path.write_text(yaml.safe_dump({**before, **values}))


def save_tokenizer(recipe: Path, tokenizer: Any, **changes: Any) -> None:
    """The base's tokenizer with other special tokens or another template."""
    other = copy.deepcopy(tokenizer)
    for name, value in changes.items():
        setattr(other, name, value)
    other.save_pretrained(recipe.parent / "base")
    if changes.get("chat_template", "") is None:
        (recipe.parent / "base" / "chat_template.jinja").unlink(missing_ok=True)


def lines_of(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith("error: ")]


Fault = Callable[[Path, Any], None]
FAULTS: dict[str, tuple[str, Fault]] = {
    "pad is EOS": ("ppo", lambda r, t: save_tokenizer(r, t, pad_token=t.eos_token)),
    "no template": ("ppo", lambda r, t: save_tokenizer(r, t, chat_template=None)),
    "no held-out prompt": ("ppo", lambda r, t: change(r, "ppo", held_out_fraction=0)),
    "a judge that is missing": ("ppo", lambda r, t: change(r, "ppo", judges=["nowhere:score"])),
    "a metric that no evaluation measures": ("ppo", lambda r, t: change(r, "ppo", best_metric="rubric", eval_rollouts=1)),
    "a reward function that is missing": ("ppo", lambda r, t: change(r, "ppo", reward="by_length:other")),
    "a reward model that is a language model": ("ppo", lambda r, t: change(r, "ppo", reward=str(r.parent / "none"))),
    "a context that is too short": ("sft", lambda r, t: change(r, "sft", max_tokens=4096)),
    "no held-out demonstration": ("sft", lambda r, t: change(r, "sft", held_out_fraction=0)),
    "an unknown option": ("sft", lambda r, t: change(r, "sft", trainer_options={"no_such": 1})),
    "a share that does not fit": ("sft", lambda r, t: change(r, "sft", examples_per_step=3)),
    "a tracker that is missing": ("sft", lambda r, t: change(r, "sft", report_to=["trackio"])),
    "a parent that is missing": ("sft", lambda r, t: change(r, "sft", parent="no-such-model")),
    "files of something else": ("sft", lambda r, t: ((r.parent / "run" / "sft").mkdir(parents=True), (r.parent / "run" / "sft" / "x").touch())),  # type: ignore[func-returns-value]
    "broken rows": ("sft", lambda r, t: (r.parent / "rows.jsonl").write_text('{"prompt": "a", "response": 3}\n')),  # type: ignore[func-returns-value, return-value]
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_check_refuses_what_the_stage_refuses_in_its_words(
    name: str, recipe: Path, tokenizer: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    stage, fault = FAULTS[name]
    fault(recipe, tokenizer)
    file = recipe / f"{stage}.yaml"
    _, err = rlhf_here("check", file, code=2)
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        launch(stage, STAGES[stage], MAINS[stage], ["--config", str(file)])
    assert ended.value.code == 2
    assert lines_of(err) == lines_of(capfd.readouterr().err)


def test_check_accepts_what_the_stages_accept_and_writes_nothing(recipe: Path, tmp_path: Path) -> None:
    out, _ = rlhf_here("check", recipe)
    assert "fine" in out
    assert not (tmp_path / "run").exists()


def test_a_parent_that_the_recipe_has_yet_to_write(recipe: Path, tmp_path: Path) -> None:
    """PPO starts from what SFT will leave: a small model with the tokenizer that SFT assigns stands in."""
    change(recipe, "ppo", parent=str(tmp_path / "run" / "sft"))
    out, _ = rlhf_here("check", recipe)
    assert "ppo" in out
    change(recipe, "ppo", judges=["nowhere:score"])
    _, err = rlhf_here("check", recipe, code=2)
    assert "module 'nowhere' cannot be imported" in err


def test_a_folder_of_another_run(recipe: Path, tmp_path: Path) -> None:
    launch("sft", STAGES["sft"], sft.main, ["--config", str(recipe / "sft.yaml")])
    out, _ = rlhf_here("check", recipe / "sft.yaml")
    assert f"sft: already complete in {tmp_path / 'run' / 'sft'} for the same inputs" in out
    _, err = rlhf_here("check", recipe / "sft.yaml", "--parent", tmp_path / "run" / "sft", code=2)
    assert "is the parent too; it would be overwritten" in err
    change(recipe, "sft", seed=7)
    _, err = rlhf_here("check", recipe / "sft.yaml", code=2)
    assert "holds a finished run with other seed; nothing was overwritten" in err
    assert (tmp_path / "run" / "sft" / "lineage.json").is_file()


def test_a_fault_of_many_rows_is_told_once(recipe: Path, tmp_path: Path) -> None:
    """Sixty rows with the same fault: one line says so, with the first of them."""
    (tmp_path / "rows.jsonl").write_text('{"question": "a", "answer": "b"}\n' * 60)
    _, err = rlhf_here("check", recipe / "sft.yaml", code=2)
    assert err.count("needs `prompt` and `response`") == 1
    assert f"{tmp_path / 'rows.jsonl'}:1: " in err
    assert "(also lines 2, 3, 4, 5" in err
    assert "… and 40 more in" in err

"""`rlhf check --dry-run`: every recipe that ships, and faults that would break a run hours later."""

# ruff: noqa: ARG005 - every fault takes recipe and folder

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers.launches import ROOT, environment
from helpers.tiny_models import make_lm
from pipeline.commands.dry_run import dry_run
from pipeline.errors import UserError
from pipeline.models.shrink import narrow

import pytest
import yaml
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3Config

RECIPES = sorted(  # demo-rounds begins from folders that `make demo` writes
    path
    for path in (ROOT / "recipes").iterdir()
    if any(path.glob("*.yaml")) and path.name not in ("accelerate", "demo-rounds")
)


def check(recipe: object, *more: object, code: int = 0) -> str:
    command = [sys.executable, "-m", "pipeline.cli", "check", str(recipe), "--dry-run", *map(str, more)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == code, f"{done.stdout}\n{done.stderr}"
    return done.stdout if code == 0 else done.stderr


@pytest.mark.parametrize(
    "recipe", [pytest.param(r, id=r.name, marks=[pytest.mark.full] if r.name != "demo" else []) for r in RECIPES]
)
def test_every_recipe_passes(recipe: Path) -> None:
    said = check(recipe)
    assert "dry run passed" in said
    for stage in [path.stem for path in recipe.glob("*.yaml")]:
        assert f"{stage}: one step, saved and read again" in said
    if recipe.name == "real-small":
        assert "does not exist: its rows were not read, those of data_cards/" in " ".join(said.split())


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(
            hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, vocab_size=500
        ),
        GPT2Config(n_embd=12288, n_layer=96, n_head=96, vocab_size=500),
        Qwen3Config(
            hidden_size=2048,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            vocab_size=500,
        ),
    ],
    ids=["llama", "gpt2", "qwen3"],
)
def test_a_shrunk_model_is_one_of_its_class(config: Any) -> None:
    model = AutoModelForCausalLM.from_config(narrow(config))
    assert model.config.model_type == config.model_type
    assert model.num_parameters() < 500_000
    assert model.config.vocab_size == 500


@pytest.fixture
def recipe(tmp_path: Path, tokenizer: Any) -> Path:
    """SFT and PPO of an external model with a chat template, on data of the user's own."""
    from pipeline.data.encoding import ROLE_TEMPLATE

    folder = tmp_path / "recipe"
    folder.mkdir()
    base = tmp_path / "base"
    make_lm("llama", tokenizer).save_pretrained(base)
    tokenizer.chat_template = tokenizer.chat_template or ROLE_TEMPLATE
    tokenizer.save_pretrained(base)
    rows = [{"prompt": f"Hello number {n}", "response": f"Hi {n}."} for n in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "fine.py").write_text(
        "def score(prompts, responses, rows):\n    return [float(len(r)) for r in responses]\n"
    )
    data = [{"path": str(tmp_path / "rows.jsonl")}]
    stages = {
        "sft": {"parent": str(base), "output_dir": str(tmp_path / "run/sft"), "datasets": data, "max_tokens": 64},
        "ppo": {
            "parent": str(tmp_path / "run/sft"),
            "output_dir": str(tmp_path / "run/ppo"),
            "datasets": data,
            "reward": [{"function": "fine:score"}],
            "max_prompt_tokens": 64,
        },
    }
    for name, values in stages.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    return folder


def change(recipe: Path, stage: str, **values: Any) -> None:
    path = recipe / f"{stage}.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **values}))


def template(base: Path, text: str) -> None:
    for file in ("chat_template.jinja",):
        (base / file).write_text(text)


def pad_is_eos(base: Path) -> None:
    path = base / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "pad_token": config["eos_token"]}))


FAULTS: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "wrong column": (lambda r, t: (t / "rows.jsonl").write_text('{"question": "a", "response": "b"}\n'), "rows.jsonl:1: needs `prompt` and `response`"),
    "column map": (lambda r, t: change(r, "sft", datasets=[{"path": str(t / "rows.jsonl"), "columns": {"prompt": "question"}}]), "no column `question`"),
    "template drops messages": (lambda r, t: template(t / "base", "{{ messages[0]['content'] }}"), "chat template of .* (drops|writes|refuses)"),
    "another tokenizer": (lambda r, t: shutil.rmtree(t / "base") or (t / "base").mkdir(), "parent .*base"),
    "pad is EOS": (lambda r, t: (pad_is_eos(t / "base"), (r / "sft.yaml").unlink(), change(r, "ppo", parent=str(t / "base"))), "no pad token apart from EOS"),
    "context": (lambda r, t: change(r, "sft", max_tokens=4096), "max_tokens: 4096 tokens exceed the model's context of 128"),
    "package": (lambda r, t: change(r, "sft", report_to=["trackio"]), "trackio is not installed; pip install trackio"),
    "unknown key": (lambda r, t: change(r, "ppo", kl_coeff=0.1), r"ppo\.yaml:\d+: .*kl_coeff.*kl_coef"),
    "failing reward": (lambda r, t: (r / "fine.py").write_text("def score(prompts, responses, rows):\n    return [1.0]\n"), "returned 1 scores for"),
    "non-finite reward": (lambda r, t: (r / "fine.py").write_text("def score(prompts, responses, rows):\n    return [float('nan') for _ in responses]\n"), "scores must be finite"),
    "missing module": (lambda r, t: change(r, "ppo", reward=[{"function": "elsewhere:score"}]), "module 'elsewhere' cannot be imported"),
    "no such metric": (lambda r, t: change(r, "ppo", best_metric="rubric", eval_rollouts=1), "best_metric: no evaluation measures 'rubric'"),
    "parent that no stage writes": (lambda r, t: change(r, "ppo", parent="runs/none/sft"), "'runs/none/sft' does not exist; run the stage that writes it first"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_before_it_costs_anything(
    name: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fault, message = FAULTS[name]
    fault(recipe, tmp_path)
    with pytest.raises(UserError, match=message):
        dry_run(str(recipe))
    assert not (tmp_path / "run").exists(), "a dry run writes nothing where the run will"


def test_what_surrounds_the_step(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk and a missing log-in are warnings with remedies; FSDP1 is refused."""
    change(recipe, "sft", report_to=["wandb"])
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(
        "pipeline.commands.surroundings.shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 1000)
    )
    assert dry_run(str(recipe)) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "free some, or point output_dir elsewhere" in said
    assert "run `wandb login` or set WANDB_API_KEY" in said
    (tmp_path / "fsdp1.yaml").write_text("distributed_type: FSDP\nnum_processes: 2\nfsdp_config: {}\n")
    with pytest.raises(UserError, match="asks for FSDP1; say `fsdp_version: 2`"):
        dry_run(str(recipe), accelerate=str(tmp_path / "fsdp1.yaml"))

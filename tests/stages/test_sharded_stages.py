"""The Trainer stages on two processes that each hold half of everything (FSDP2): the same training as in one process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from helpers.launches import FSDP2, ROOT, environment, kill_when, launch, lineage, parents, tiny_flags
from pipeline.training import history

import pytest
import torch
from safetensors.torch import load_file

CONFIG = ROOT / "recipes" / "accelerate" / "cpu-fsdp2.yaml"
RECORD = str(ROOT / "tests" / "helpers" / "record_gradients.py")
FIRST_IS_BEST = {"trainer_options": "{greater_is_better: true}"}  # so that the best loss is not the last
LORA = {"lora": "{r: 4, dropout: 0.0}"}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "pretrain": ("pretrain", {}),
    "sft": ("sft", FIRST_IS_BEST),
    "sft with lora": ("sft", {**FIRST_IS_BEST, **LORA}),
    "reward": ("reward", {"unit_variance_samples": 16}),
    "reward with lora": ("reward", LORA),
}
QUICK = ("pretrain", "sft with lora", "reward")  # they share their code with the others
SHORT = {
    "max_steps": 5,
    "save_steps": 2,
    "eval_steps": 2,
    "logging_steps": 1,
    "warmup_steps": 2,
    "examples_per_device": 2,
}


def stage_flags(kind: str, folder: Path, chain: Path, recipes: Path, **changes: Any) -> tuple[str, list[str]]:
    stage, options = KINDS[kind]
    values = {**SHORT, **options, **parents(stage, chain), "report_to": None, **changes}
    return stage, tiny_flags(stage, folder, config=recipes / f"{stage}.yaml", **values)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = [folder / "model.safetensors", *folder.glob("adapter/*.safetensors")]
    return {f"{file.parent.name}/{name}": t for file in files for name, t in load_file(file).items()}


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / one.norm().clamp(min=1e-6))


def assert_equal_runs(one: Path, other: Path, tolerance: float = 1e-5) -> None:
    """Weights, every logged row and the counts of the same run, up to fp32 rounding."""
    a, b = weights(one), weights(other)
    assert list(a) == list(b)
    assert max(relative(a[name], b[name]) for name in a) < tolerance
    rows = [history.read(folder) for folder in (one, other)]
    assert len(rows[0]) == len(rows[1])
    for row, same in zip(*rows, strict=True):
        for key in ("step", "loss", "grad_norm", "eval_loss", "eval_accuracy", "eval_token_accuracy"):
            assert (key in row) == (key in same)
            assert row.get(key, 0.0) == pytest.approx(same.get(key, 0.0), rel=tolerance), (key, row["step"])
    assert lineage(other)["flops"] == pytest.approx(lineage(one)["flops"], rel=1e-6)  # processes add theirs in fp32
    configs = [json.loads((folder / "config.json").read_text()) for folder in (one, other)]
    offsets = [config.pop("score_offset", 0.0) for config in configs]
    temperatures = [config.pop("score_temperature", 1.0) for config in configs]
    assert offsets[1] == pytest.approx(offsets[0], rel=1e-4, abs=1e-5)
    assert temperatures[1] == pytest.approx(temperatures[0], rel=1e-3)
    assert configs[0] == configs[1]
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in other.iterdir())


@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k in QUICK else pytest.mark.full) for k in KINDS])
def test_five_sharded_steps_are_those_of_one_process(kind: str, chain: Path, recipes: Path, tmp_path: Path) -> None:
    """Loss and gradient norm of each step, evaluations, final weights and configuration; the parts are read back once."""
    stage, flags = stage_flags(kind, tmp_path / "one", chain, recipes)
    launch(stage, flags)
    _, flags = stage_flags(kind, tmp_path / "two", chain, recipes)
    launch(stage, flags, processes=2, more=FSDP2)
    assert_equal_runs(tmp_path / "one" / stage, tmp_path / "two" / stage)
    written = lineage(tmp_path / "two" / stage)
    assert (written["processes"], written["sharding"]) == (2, "fsdp2")


@pytest.mark.full
@pytest.mark.parametrize("kind", list(KINDS))
def test_ddp_and_fsdp2_train_alike(kind: str, chain: Path, recipes: Path, tmp_path: Path) -> None:
    for name, more in (("ddp", {}), ("fsdp2", FSDP2)):
        stage, flags = stage_flags(kind, tmp_path / name, chain, recipes)
        launch(stage, flags, processes=2, more=more)
    assert_equal_runs(tmp_path / "ddp" / stage, tmp_path / "fsdp2" / stage)


@pytest.mark.full
@pytest.mark.parametrize("kind", list(KINDS))
def test_first_gradients_are_those_of_one_process(kind: str, chain: Path, recipes: Path, tmp_path: Path) -> None:
    for processes, more in ((1, {}), (2, FSDP2)):
        stage, flags = stage_flags(kind, tmp_path / str(processes), chain, recipes)
        target = [stage, str(tmp_path / f"p{processes}"), str(tmp_path / "unused"), "--", *flags]
        launch(RECORD, target, processes=processes, more=more)
    one, two = (torch.load(tmp_path / f"p{processes}-model.pt") for processes in (1, 2))
    assert len(one) == len(two) > 10
    assert relative(torch.cat([g.flatten() for g in one]), torch.cat([g.flatten() for g in two])) < 1e-5


def step_saved(folder: Path) -> Any:
    return lambda: any(folder.glob("checkpoint-*[0-9]/manifest.json"))


@pytest.mark.full
@pytest.mark.parametrize("kind", ["pretrain", "sft with lora", "reward"])
def test_killed_and_resumed_on_two_processes_and_on_one(kind: str, chain: Path, recipes: Path, tmp_path: Path) -> None:
    """On as many processes to the bit; on one process, which holds the model whole, up to rounding. The best is an early one."""
    longer = {"max_steps": 16, "save_steps": 4, "eval_steps": 4}
    stage, flags = stage_flags(kind, tmp_path / "whole", chain, recipes, **longer)
    launch(stage, flags, processes=2, more=FSDP2)
    whole = tmp_path / "whole" / stage
    for name, processes, more in (("two", 2, FSDP2), ("one", 1, {})):
        _, flags = stage_flags(kind, tmp_path / name, chain, recipes, **longer)
        folder = tmp_path / name / stage
        kill_when(stage, flags, step_saved(folder), processes=2, more=FSDP2)
        assert list(folder.glob("checkpoint-*/tensors/*.safetensors"))
        launch(stage, flags, processes=processes, more=more)
        assert lineage(folder)["resumed_from"]
        assert_equal_runs(whole, folder)
        if processes == 2:
            assert lineage(folder)["weights_sha256"] == lineage(whole)["weights_sha256"]
            losses = [[row.get("loss") for row in history.read(run)] for run in (whole, folder)]
            assert losses[0] == losses[1]


@pytest.mark.full
def test_a_fault_in_one_process_is_one_line(chain: Path, recipes: Path, tmp_path: Path) -> None:
    """The user's function raises in the first process while the other waits for it."""
    (tmp_path / "faulty.py").write_text("def truth(prompts, responses, rows):\n    raise ValueError('no')\n")
    recipe = (recipes / "reward.yaml").read_text(encoding="utf-8").replace("labelers:truth", "faulty:truth")
    (tmp_path / "reward.yaml").write_text(recipe, encoding="utf-8")
    _, flags = stage_flags("reward", tmp_path / "run", chain, tmp_path)
    launcher = ["-m", "pipeline.training.launcher", "--config_file", str(CONFIG), "--main_process_port", "0"]
    done = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "pipeline" / "reward.py"), *flags],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, done.stderr
    assert "reward function 'faulty:truth' raised ValueError: no" in errors[0]


@pytest.mark.full
def test_a_run_that_began_whole_goes_on_sharded(chain: Path, recipes: Path, tmp_path: Path) -> None:
    changes = {"max_steps": 16, "save_steps": 4, "eval_steps": 4}
    stage, flags = stage_flags("reward", tmp_path / "whole", chain, recipes, **changes)
    launch(stage, flags)
    _, flags = stage_flags("reward", tmp_path / "cut", chain, recipes, **changes)
    kill_when(stage, flags, step_saved(tmp_path / "cut" / stage))
    launch(stage, flags, processes=2, more=FSDP2)
    assert_equal_runs(tmp_path / "whole" / stage, tmp_path / "cut" / stage)

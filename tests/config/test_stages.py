"""The table of what a stage supports is the only one."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from pipeline.config.stages import REWARD_PARENTS, STAGES, SUPPORT, check_sharding
from pipeline.errors import UserError

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_every_stage_has_its_line_in_the_table() -> None:
    assert list(SUPPORT) == list(STAGES)
    assert all(set(support.parents) <= set(STAGES) for support in SUPPORT.values())
    assert set(REWARD_PARENTS) <= set(STAGES)


def test_parents_are_listed_nowhere_else() -> None:
    """Whoever verifies a parent takes the stages that it may come from out of the table."""
    calls = 0
    for path in (ROOT / "pipeline").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "verify_parent":
                calls += 1
                assert not isinstance(node.args[1], ast.Tuple | ast.List), f"{path}:{node.lineno}"
    assert calls >= len(STAGES)


class Arguments:
    def __init__(self, lora: Any = None, quantization: str | None = None, optimizer: str = "adamw"):
        self.lora, self.quantization, self.optimizer = lora, quantization, optimizer


def test_sharding_by_stage() -> None:
    for stage in STAGES:
        check_sharding(stage, Arguments(), None)
        check_sharding(stage, Arguments(lora=1), "FSDP")
    check_sharding("sft", Arguments(), "DEEPSPEED")
    for stage, lora, what in (("sft", 1, "sft with lora"), ("reward", None, "reward"), ("ppo", 1, "ppo")):
        with pytest.raises(UserError, match=f"^{what} does not run under DeepSpeed; use FSDP2"):
            check_sharding(stage, Arguments(lora), "DEEPSPEED")


def test_keys_that_do_not_work_sharded() -> None:
    with pytest.raises(UserError, match=r"^quantization does not work under FSDP2; drop it"):
        check_sharding("sft", Arguments(1, quantization="4bit"), "FSDP")
    with pytest.raises(UserError, match=r"^optimizer: adamw_8bit does not work under FSDP2"):
        check_sharding("pretrain", Arguments(optimizer="adamw_8bit"), "FSDP")

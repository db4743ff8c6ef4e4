"""The stages of a recipe, and what each of them supports: the one table that check, plan, dry run and stages read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.ppo import PPOArguments
from pipeline.config.pretrain import PretrainArguments
from pipeline.config.reward import RewardArguments
from pipeline.config.sft import SFTArguments
from pipeline.config.stage import StageArguments
from pipeline.errors import UserError

STAGES: dict[str, type[StageArguments]] = {
    "pretrain": PretrainArguments,
    "sft": SFTArguments,
    "reward": RewardArguments,
    "ppo": PPOArguments,
}
SHARDED = {"FSDP": "ACCELERATE_USE_FSDP", "DEEPSPEED": "ACCELERATE_USE_DEEPSPEED"}  # and accelerate's variable for each


@dataclass(frozen=True, kw_only=True)
class Support:
    """The rows, parents and sharding that a stage supports."""

    rows: str  # kind of its records, a key of `data.records.PARSERS`
    parents: tuple[str, ...]  # stages whose output it starts from
    sharding: tuple[str, ...] = ()  # of SHARDED
    sharding_with_lora: tuple[str, ...] = ()


SUPPORT = {
    "pretrain": Support(rows="document", parents=("pretrain", "sft", "ppo"), sharding=("FSDP", "DEEPSPEED")),
    "sft": Support(rows="demonstration", parents=("pretrain", "sft", "ppo"), sharding=("FSDP", "DEEPSPEED")),
    "reward": Support(rows="ranking", parents=("pretrain", "sft", "reward", "ppo")),
    "ppo": Support(rows="prompt", parents=("sft", "ppo")),
}
# Further datasets that a stage may name, and the kind of their rows.
FURTHER_ROWS = {"center_on": "demonstration", "eval_datasets": "prompt", "ptx_datasets": "document"}
REWARD_PARENTS = ("reward",)  # stages whose output scores responses


def check_sharding(stage: str, arguments: Any, sharding: str | None) -> None:
    """Refuse a stage that does not run under FSDP or DeepSpeed.

    Args:
        sharding: a name in SHARDED, or None where whole models fit into every process.

    Raises:
        UserError: the stage, or the stage with `lora:`, needs whole models.
    """
    with_lora = getattr(arguments, "lora", None) is not None
    support = SUPPORT[stage]
    if sharding is None or sharding in (support.sharding_with_lora if with_lora else support.sharding):
        return
    what = f"{stage} with lora" if with_lora and sharding in support.sharding else stage
    raise UserError(f"{what} does not work under {sharding} yet; use one process or DDP (recipes/accelerate/ddp.yaml)")


def recipe_stages(folder: Path) -> list[str]:
    """The stages that a recipe folder has, in order."""
    if not folder.is_dir():
        raise UserError(f"no recipe folder {str(folder)!r}; see recipes/ for examples")
    stages = [name for name in STAGES if (folder / f"{name}.yaml").is_file()]
    if not stages:
        raise UserError(f"{str(folder)!r} holds none of {', '.join(f'{name}.yaml' for name in STAGES)}")
    return stages

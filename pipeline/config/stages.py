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


@dataclass(frozen=True, kw_only=True)
class Support:
    """The rows and parents that a stage supports, and whether it runs under DeepSpeed. Under FSDP2 every stage does."""

    rows: str  # kind of its records, a key of `data.records.PARSERS`
    parents: tuple[str, ...]  # stages whose output it starts from
    deepspeed: bool = False  # without `lora:`


SUPPORT = {
    "pretrain": Support(rows="document", parents=("pretrain", "sft", "ppo"), deepspeed=True),
    "sft": Support(rows="demonstration", parents=("pretrain", "sft", "ppo"), deepspeed=True),
    "reward": Support(rows="ranking", parents=("pretrain", "sft", "reward", "ppo")),
    "ppo": Support(rows="prompt", parents=("sft", "ppo")),
}
# Further datasets that a stage may name, and the kind of their rows.
FURTHER_ROWS = {"center_on": "demonstration", "eval_datasets": "prompt", "ptx_datasets": "document"}
REWARD_PARENTS = ("reward",)  # stages whose output scores responses
ANSWERING = ("pretrain", "sft", "ppo")  # stages whose output answers prompts


def check_sharding(stage: str, arguments: Any, sharding: str | None) -> None:
    """Refuse a stage, or a key of it, that does not run sharded.

    Args:
        sharding: "FSDP", "DEEPSPEED", or None where whole models fit into every process.

    Raises:
        UserError: the stage, the stage with `lora:`, or one of its keys does not run under it.
    """
    if sharding == "FSDP":
        _check_keys_under_fsdp2(arguments)
    if sharding != "DEEPSPEED":
        return
    with_lora = getattr(arguments, "lora", None) is not None
    if SUPPORT[stage].deepspeed and not with_lora:
        return
    what = f"{stage} with lora" if SUPPORT[stage].deepspeed else stage
    raise UserError(f"{what} does not run under DeepSpeed; use FSDP2 (recipes/accelerate/fsdp2.yaml)")


def _check_keys_under_fsdp2(arguments: Any) -> None:
    if getattr(arguments, "quantization", None):
        raise UserError("quantization does not work under FSDP2; drop it, or use recipes/accelerate/ddp.yaml")
    if getattr(arguments, "optimizer", None) == "adamw_8bit":
        raise UserError(
            "optimizer: adamw_8bit does not work under FSDP2, which shares AdamW's states over the processes; drop it, "
            "or use recipes/accelerate/ddp.yaml"
        )


def recipe_stages(folder: Path) -> list[str]:
    """The stages that a recipe folder has, in order."""
    if not folder.is_dir():
        raise UserError(f"no recipe folder {str(folder)!r}; see recipes/ for examples")
    stages = [name for name in STAGES if (folder / f"{name}.yaml").is_file()]
    if not stages:
        raise UserError(f"{str(folder)!r} holds none of {', '.join(f'{name}.yaml' for name in STAGES)}")
    return stages

"""Checks outside the stage itself: packages, trackers, sharding, room on the disk."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from pipeline.commands.stand_ins import own_config
from pipeline.config.stages import check_sharding
from pipeline.errors import UserError
from pipeline.models.loading import CONFIG_ERRORS
from pipeline.models.sharding import check_fsdp_version
from pipeline.planning.parameters import parameters
from pipeline.training.launcher import accelerate_config
from pipeline.training.trackers import installed, wandb_login

ADAM_BYTES = 12  # of each parameter in a checkpoint: fp32 weight and both moments


def sharding_of(accelerate: str | None) -> str | None:
    """FSDP or DEEPSPEED where an accelerate config file says so.

    Raises:
        UserError: it asks for FSDP1.
    """
    config = accelerate_config(accelerate) if accelerate else {}
    kind = config.get("distributed_type")
    if kind == "FSDP":
        check_fsdp_version((config.get("fsdp_config") or {}).get("fsdp_version", 1))
    return kind if kind in ("FSDP", "DEEPSPEED") else None


def check_surroundings(name: str, args: Any, sharding: str | None) -> list[str]:
    """Refuse what would keep the stage from starting; returns warnings.

    Raises:
        UserError: a package is not installed, or the stage does not run sharded.
    """
    check_sharding(name, args, sharding)
    needed = {"deepspeed": sharding == "DEEPSPEED"}
    needed["bitsandbytes"] = bool(getattr(args, "quantization", None)) or getattr(args, "optimizer", "") == "adamw_8bit"
    for tracker in args.trackers:
        needed[tracker] = True
    for package, wanted in needed.items():
        if wanted and not installed(package):
            raise UserError(f"{name}: {package} is not installed; pip install {package}, or drop what asks for it")
    warnings = _disk(name, args)
    if getattr(args, "engine", "local") == "vllm":
        warnings.append(
            f"engine: vllm: the server at {args.engine_url} is not asked here; the stage asks it at its start"
        )
    if "wandb" in args.trackers and not wandb_login():
        warnings.append("wandb has no log-in here and will write offline; run `wandb login` or set WANDB_API_KEY")
    return warnings


def _disk(name: str, args: Any) -> list[str]:
    """A warning where the stage's weights and checkpoints would not fit on the disk that it writes to."""
    try:
        config = own_config(args)
        size = parameters(config).total if config is not None else 0
    except (UserError, RuntimeError, *CONFIG_ERRORS):  # the stage itself reports it
        return []
    if config is None:
        return []
    networks = 2 if name == "ppo" else 1  # policy and value
    needed = ADAM_BYTES * size * networks * (args.keep_checkpoints + 1)  # one more is being written
    needed += 4 * size * networks
    place = Path(args.output_dir).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free >= needed:
        return []
    return [
        f"the disk of {args.output_dir} has {free / 2**30:,.1f} GiB free; weights and {args.keep_checkpoints + 1} checkpoints need "
        f"{needed / 2**30:,.1f} GiB; free some, or point output_dir elsewhere"
    ]

"""`rlhf plan`: what each stage of a recipe will need and cost, before anything is launched and without loading weights.

`workload` says what is computed, `memory` what a device holds. Hours follow from the device's peak and the shares of it that
are reached; petaflop/s-days leave attention out, as the papers' numbers do.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.reader import load
from pipeline.config.stages import STAGES, SUPPORT, recipe_stages
from pipeline.config.trainer import LoraOptions
from pipeline.errors import UserError
from pipeline.models.loading import CONFIG_ERRORS, new_config, one_line, refusing_sizes
from pipeline.models.tokenizers import load_tokenizer
from pipeline.planning.advice import Attempt, advice, attempts, refused_number
from pipeline.planning.communication import Exchange, ppo_exchange, trainer_exchange
from pipeline.planning.devices import devices
from pipeline.planning.memory import GIB, Memory, Setting, ppo_memory, server_memory, trainer_memory
from pipeline.planning.parameters import parameters
from pipeline.planning.workload import Data, Model, PPOModels, Work, count_data, ppo_work, trainer_work
from pipeline.training.launcher import accelerate_config

import transformers

PETAFLOP_S_DAY = 1e15 * 86400
TOTALS = ("flops", "petaflop_s_days", "hours", "gpu_hours", "energy_kwh", "cost_usd")


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """The flags of `rlhf plan`."""

    recipe: str
    gpu: str
    gpus: int = 1
    devices: str | None = None
    accelerate: str | None = None
    mfu: float = 0.4
    generation_mfu: float = 0.05
    prompt_tokens: float | None = None
    response_tokens: float | None = None
    data_root: str | None = None
    parent: str | None = None

    def __post_init__(self) -> None:
        """Raises UserError where a number is out of range."""
        for name, most in (
            ("gpus", 2**20),
            ("mfu", 1),
            ("generation_mfu", 1),
            ("prompt_tokens", 1e9),
            ("response_tokens", 1e9),
        ):
            value = getattr(self, name)
            if value is not None and not 0 < value <= most:
                raise UserError(f"--{name.replace('_', '-')} {value} is out of range")


def plan(options: PlanOptions) -> dict[str, Any]:
    """The plan of a recipe, as plain data: settings, `stages` by name, and `total`.

    Raises:
        UserError: the recipe, the device or a number is wrong, or a parent's config cannot be had.
    """
    folder = Path(options.recipe)
    setting = _setting(options)
    made: dict[str, Model] = {}  # the models that earlier stages of the recipe leave, by folder
    stages: dict[str, Any] = {}
    for position, name in enumerate(recipe_stages(folder)):
        flags = ["--config", str(folder / f"{name}.yaml")]
        flags += ["--data_root", options.data_root] if options.data_root else []
        flags += ["--parent", options.parent] if options.parent and position == 0 else []
        recipe: Any = load(STAGES[name], flags)
        model = _model(name, recipe, made)
        made[os.path.normpath(recipe.output_dir)] = model
        stages[name] = _plan_stage(StagePlan(name, recipe, model, made, options), setting)
    return {
        "recipe": str(folder),
        "gpus": setting.gpus,
        "device": dataclasses.asdict(setting.device),
        "sharding": setting.sharding,
        "mfu": setting.mfu,
        "generation_mfu": setting.generation_mfu,
        "stages": stages,
        "total": {key: sum(stage[key] for stage in stages.values()) for key in TOTALS},
    }


def _setting(options: PlanOptions) -> Setting:
    known = devices(options.devices)
    if options.gpu.lower() not in known:
        raise UserError(
            f"--gpu {options.gpu!r} is not in the table; known: {', '.join(known)}; add it with --devices FILE"
        )
    sharding, replicas = ("ddp" if options.gpus > 1 else "none"), 1
    if options.accelerate:
        config = accelerate_config(options.accelerate)
        kind = config.get("distributed_type")
        if kind == "FSDP":
            sharding = "fsdp2"
            replicas = int((config.get("parallelism_config") or {}).get("parallelism_config_dp_replicate_size", 1))
            if options.gpus % max(replicas, 1):
                raise UserError(
                    f"dp_replicate_size ({replicas}) does not divide --gpus {options.gpus}; change one of them"
                )
        elif kind == "DEEPSPEED":
            sharding = f"zero{config['deepspeed_config']['zero_stage']}"
    device = known[options.gpu.lower()]
    return Setting(device, options.gpus, sharding, options.mfu, options.generation_mfu, replicas)


# ------------------------------------------------------------------------------------------------ models


def _model(name: str, recipe: Any, made: Mapping[str, Model]) -> Model:
    """The stage's model from what the recipe says: new, an earlier stage's, or a checkpoint's config."""
    if recipe.parent and os.path.normpath(recipe.parent) in made:
        parent = made[os.path.normpath(recipe.parent)]
        return Model(parent.config, parameters(parent.config, name == "reward"), parent.tokenizer)
    if recipe.parent:
        config = _config(recipe.parent, f"{name}: no config can be had from", "; name a local folder with --parent")
        return Model(config, parameters(config, name == "reward"), _tokenizer(recipe.parent))
    tokenizer = load_tokenizer(recipe.tokenizer) if recipe.tokenizer else None
    vocabulary = len(tokenizer) if tokenizer else recipe.train_tokenizer.vocab_size
    config = new_config(recipe.config_class, recipe.model_config, vocab_size=vocabulary)
    with refusing_sizes(recipe.config_class):
        return Model(config, parameters(config), tokenizer)


def _config(path: str, complaint: str, remedy: str = "") -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(path)
    except CONFIG_ERRORS as error:
        raise UserError(f"{complaint} {path!r} ({one_line(error)}){remedy}") from error


def _tokenizer(parent: str) -> Any:
    """The parent's tokenizer, or None where a folder is a config alone."""
    folder = Path(parent)
    if folder.is_dir() and not any(folder.glob("*token*")):
        return None
    return load_tokenizer(parent)


# ------------------------------------------------------------------------------------------------ a stage


@dataclass(frozen=True)
class StagePlan:
    """A stage that is planned, and the models that earlier stages of the recipe leave."""

    name: str
    recipe: Any
    model: Model
    made: Mapping[str, Model]
    options: PlanOptions

    def memory(self, recipe: Any, data: Data, setting: Setting) -> Memory:
        """With a changed recipe, too."""
        if self.name == "ppo":
            return ppo_memory(recipe, self.networks(recipe), data, setting)
        return trainer_memory(self.name, recipe, self.model, data, setting)

    def exchange(self, data: Data, setting: Setting) -> Exchange:
        if self.name == "ppo":
            return ppo_exchange(self.recipe, self.networks(self.recipe), data, setting)
        return trainer_exchange(self.name, self.recipe, self.model, setting)

    def work(self, data: Data) -> Work:
        if self.name == "ppo":
            tokens = self.options.prompt_tokens, self.options.response_tokens
            return ppo_work(self.recipe, self.networks(self.recipe), data, *tokens)
        return trainer_work(self.name, self.recipe, self.model, data)

    def networks(self, recipe: Any) -> PPOModels:
        """PPO's networks: the value network is a copy of the reward model's where the recipe starts it from there."""
        reward = self._largest_reward(recipe)
        from_reward = recipe.value_init == "reward" or (recipe.value_init is None and recipe.roles == "separate")
        own = Model(self.model.config, parameters(self.model.config, scalar=True))
        return PPOModels(self.model, reward if reward and from_reward else own, reward)

    def _largest_reward(self, recipe: Any) -> Model | None:
        """The largest reward model of the recipe; functions take nothing."""
        models = []
        for source in recipe.reward:
            if source.model is None:
                continue
            if os.path.normpath(source.model) in self.made:
                models.append(self.made[os.path.normpath(source.model)])
            else:
                config = _config(source.model, "ppo: no config can be had of the reward model")
                models.append(Model(config, parameters(config, scalar=True)))
        return max(models, key=lambda model: model.size.total, default=None)


def _plan_stage(stage: StagePlan, setting: Setting) -> dict[str, Any]:
    """Memory, compute and time of one stage, as plain data."""
    here, refused = _sharded_as_supported(stage, setting)
    data = count_data(stage.name, stage.recipe, stage.model)
    work, memory = stage.work(data), stage.memory(stage.recipe, data, here)
    exchange = stage.exchange(data, here)
    notes, fits = list(work.notes), memory.total <= here.room
    if getattr(stage.recipe, "engine", "local") == "vllm":
        notes.append(_server_note(server_memory(stage.recipe, stage.networks(stage.recipe), data, here), here))
    if refusal := refused_number(stage.name, stage.recipe, here.gpus):
        notes.append(refusal)
    if refused:
        notes.append(f"{stage.name} refuses {refused}; planned data-parallel, every device with a whole copy")
    measure = functools.partial(_memory_with, stage, data)
    tried = [] if fits else list(attempts(stage.name, stage.recipe, here, measure))
    return {
        "parameters": stage.model.size.total,
        "active_parameters": stage.model.size.active,
        "rows": data.rows,
        "tokens": work.tokens,
        "steps": work.steps,
        **_cost(work, setting),
        "exchange": {part: round(size) for part, size in exchange.parts.items()},
        "exchange_per_step": round(exchange.total),
        "memory": {part: round(size) for part, size in memory.parts.items()},
        "memory_total": round(memory.total),
        "fits": fits,
        "largest_batch": {"micro_batch_tokens" if stage.name == "ppo" else "examples_per_device": memory.largest_batch},
        "notes": notes,
        "advice": [] if fits else advice(stage.name, stage.recipe, here, tried, measure),
        "changes": _changes(tried, here),
    }


def _server_note(parts: Mapping[str, float], setting: Setting) -> str:
    total = sum(parts.values())
    listed = " and ".join(f"{size / GIB:,.1f} GiB of {part}" for part, size in parts.items())
    return (
        f"the vLLM server holds {listed}: at least {math.ceil(total / setting.room):,} × {setting.device.name} of its own, "
        "which are not counted here"
    )


def _memory_with(stage: StagePlan, data: Data, recipe: Any, setting: Setting) -> Memory:
    return stage.memory(recipe, data, setting)


def _changes(tried: Sequence[Attempt], here: Setting) -> dict[str, Any]:
    """The keys of the recipe, as YAML could say them, by which it fits without another kind of sharding."""
    if not tried or not tried[-1].fits or tried[-1].setting.weight_shards != here.weight_shards:
        return {}
    return {
        key: {"r": value.r, "alpha": value.alpha} if isinstance(value, LoraOptions) else value
        for key, value in tried[-1].changes.items()
    }


def _sharded_as_supported(stage: StagePlan, setting: Setting) -> tuple[Setting, str | None]:
    """The setting that the stage runs in, and the sharding that it refuses, if so."""
    lora = getattr(stage.recipe, "lora", None) is not None
    if setting.sharding not in ("zero2", "zero3") or (SUPPORT[stage.name].deepspeed and not lora):
        return setting, None
    return dataclasses.replace(setting, sharding="ddp" if setting.gpus > 1 else "none"), setting.sharding


def _cost(work: Work, setting: Setting) -> dict[str, Any]:
    """Compute, hours, energy and money."""
    total, generating = sum(work.flops.values()), work.flops.get("generate", 0.0)
    rate = setting.gpus * setting.device.tflops * 1e12
    seconds = (total - generating + work.attention_flops + work.recomputed_flops) / (rate * setting.mfu)
    seconds += generating / (rate * setting.generation_mfu)
    hours = seconds / 3600
    return {
        "flops": total,
        "flops_by_phase": work.flops,
        "attention_flops": work.attention_flops,
        "recomputed_flops": work.recomputed_flops,
        "petaflop_s_days": total / PETAFLOP_S_DAY,
        "hours": hours,
        "gpu_hours": hours * setting.gpus,
        "energy_kwh": hours * setting.gpus * setting.device.watts / 1000,
        "cost_usd": hours * setting.gpus * setting.device.usd_per_hour,
    }

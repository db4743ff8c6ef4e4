"""`rlhf plan`: what each stage of a recipe will need and cost, before anything is launched and without loading weights.

Memory is that of our own stages: fp32 weights, gradients and AdamW states under bf16 autocast; activations come from a step on
fake tensors (`sizing`). Compute is 6 floating-point operations a parameter and trained token, 2 where nothing is trained
(Kaplan et al. 2020), attention counted apart; petaflop/s-days leave attention out, as the papers' figures do.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config.reader import load
from pipeline.config.rewards import RewardSource
from pipeline.config.stages import STAGES, SUPPORT, recipe_stages
from pipeline.config.trainer import LoraOptions
from pipeline.data.encoding import ChatEncoder, document_ids
from pipeline.data.sources import read_sources
from pipeline.data.splits import shuffle_by_hash
from pipeline.errors import UserError
from pipeline.models.sizes import LOGITS_BYTES
from pipeline.models.tokenizer_training import train_tokenizer
from pipeline.models.tokenizers import assign_template, load_tokenizer
from pipeline.planning.devices import Device, devices
from pipeline.planning.sizing import (
    Parameters,
    cache_bytes,
    layers_of,
    lora_parameters,
    parameters,
    step_memory,
)
from pipeline.training.launcher import accelerate_config

import transformers
from rich.console import Console
from rich.table import Table

PETAFLOP_S_DAY = 1e15 * 86400
GIB = 2**30
SAMPLE = 300  # rows of a source whose tokens are counted
WEIGHT_BYTES = {None: 4.0, "8bit": 1.0, "4bit": 0.5 + 0.127 / 8}  # NF4 with double quantisation (Dettmers et al. 2023)
ADAM_BYTES = {"adamw": 8.0, "adamw_8bit": 2.0}


@dataclass(frozen=True)
class Setting:
    """Where and how: the devices, how weights are spread over them, what they achieve."""

    device: Device
    gpus: int
    sharding: str  # none, ddp, zero2, zero3, fsdp2
    mfu: float
    generation_mfu: float

    @property
    def shards(self) -> dict[str, int]:
        """By how much each part is divided."""
        whole = self.gpus if self.sharding in ("zero3", "fsdp2") else 1
        return {"weights": whole, "states": self.gpus if self.sharding in ("zero2", "zero3", "fsdp2") else 1}


@dataclass
class Work:
    """What a stage computes: floating-point operations by phase, and tokens."""

    steps: int
    tokens: float
    flops: dict[str, float]
    attention_flops: float = 0.0
    recomputed_flops: float = 0.0
    notes: list[str] = field(default_factory=list)


@dataclass
class Model:
    """A stage's model, known by its config."""

    config: Any
    size: Parameters
    tokenizer: Any = None


def plan_recipe(args: argparse.Namespace) -> int:
    folder = Path(args.recipe)
    setting = _setting(args)
    made: dict[str, Model] = {}
    stages: dict[str, Any] = {}
    for position, name in enumerate(recipe_stages(folder)):
        flags = ["--config", str(folder / f"{name}.yaml")]
        if args.data_root:
            flags += ["--data_root", args.data_root]
        if args.parent and position == 0:
            flags += ["--parent", args.parent]
        recipe: Any = load(STAGES[name], flags)
        model = _model(name, recipe, made, args)
        made[os.path.normpath(recipe.output_dir)] = model
        stages[name] = _plan_stage(name, recipe, model, made, setting, args)
    report = {
        "recipe": str(folder),
        "gpus": setting.gpus,
        "device": dataclasses.asdict(setting.device),
        "sharding": setting.sharding,
        "mfu": setting.mfu,
        "generation_mfu": setting.generation_mfu,
        "stages": stages,
        "total": {
            key: sum(stage[key] for stage in stages.values())
            for key in ("flops", "petaflop_s_days", "hours", "gpu_hours", "energy_kwh", "cost_usd")
        },
    }
    if args.json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        _print(report)
    return 0


def _setting(args: argparse.Namespace) -> Setting:
    known = devices(args.devices)
    if args.gpu.lower() not in known:
        raise UserError(
            f"--gpu {args.gpu!r} is not in the table; known: {', '.join(known)}; add it with --devices FILE"
        )
    for name in ("gpus", "mfu", "generation_mfu"):
        if getattr(args, name) <= 0 or (name != "gpus" and getattr(args, name) > 1):
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)} is out of range")
    sharding = "ddp" if args.gpus > 1 else "none"
    if args.accelerate:
        config = accelerate_config(args.accelerate)
        kind = config.get("distributed_type")
        if kind == "FSDP":
            sharding = "fsdp2"
        elif kind == "DEEPSPEED":
            sharding = f"zero{config['deepspeed_config']['zero_stage']}"
    return Setting(known[args.gpu.lower()], args.gpus, sharding, args.mfu, args.generation_mfu)


# ------------------------------------------------------------------------------------------------ models and data


def _model(name: str, recipe: Any, made: dict[str, Model], args: argparse.Namespace) -> Model:
    """The stage's model from what the recipe says: new, an earlier stage's, or a checkpoint's config."""
    if recipe.parent and os.path.normpath(recipe.parent) in made:
        parent = made[os.path.normpath(recipe.parent)]
        scalar = name == "reward"
        return Model(parent.config, parameters(parent.config, scalar), parent.tokenizer)
    if recipe.parent:
        try:
            config = transformers.AutoConfig.from_pretrained(recipe.parent)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{name}: no config can be had from {recipe.parent!r} ({str(error).splitlines()[0]}); "
                "name a local folder with --parent"
            ) from error
        return Model(config, parameters(config, name == "reward"), _tokenizer(recipe.parent))
    tokenizer = load_tokenizer(recipe.tokenizer) if recipe.tokenizer else None
    vocabulary = len(tokenizer) if tokenizer else recipe.train_tokenizer.vocab_size
    cls = getattr(transformers, recipe.config_class)
    config = cls(**{"vocab_size": vocabulary, **recipe.model_config})
    return Model(config, parameters(config), tokenizer)


def _tokenizer(parent: str) -> Any:
    """The parent's tokenizer, or None where a folder is a config alone."""
    folder = Path(parent)
    if folder.is_dir() and not any(folder.glob("*token*")):
        return None
    return load_tokenizer(parent)


@dataclass(frozen=True)
class Data:
    """Rows and their mean tokens, or what the recipe's limits allow where no data is there."""

    rows: int | None
    tokens: float
    responses: float = 1.0
    counted: bool = True


def _data(name: str, recipe: Any, model: Model) -> Data:
    """Rows of the datasets, and the mean tokens of a sample of them."""
    limit = {"pretrain": "block_tokens", "ppo": "max_prompt_tokens"}.get(name, "max_tokens")
    try:
        sources = read_sources(recipe.datasets, SUPPORT[name].rows, recipe.data_root)
    except UserError as error:
        if name != "ppo" and recipe.max_steps is None:
            raise UserError(f"{name}: {error}; or say `max_steps:` to plan without data") from error
        return Data(None, float(getattr(recipe, limit)), counted=False)
    records = [record for source in sources for record in source.records]
    rows = round(len(records) * (1 - recipe.held_out_fraction))
    if name == "pretrain":
        if model.tokenizer is None:
            model.tokenizer = train_tokenizer([r["text"] for r in records], recipe.train_tokenizer.vocab_size)
        sample = [r["text"][:20_000] for r in _some(records)]
        a_character = sum(map(len, document_ids(model.tokenizer, sample))) / max(sum(map(len, sample)), 1)
        tokens = a_character * sum(len(r["text"]) for r in records) * (1 - recipe.held_out_fraction)
        return Data(max(1, int(tokens // recipe.block_tokens)), float(recipe.block_tokens))
    if model.tokenizer is None:
        return Data(rows, float(getattr(recipe, limit)), counted=False)
    assign_template(model.tokenizer)
    encoder = ChatEncoder(model.tokenizer)
    sample = _some(records)
    longest = getattr(recipe, limit)
    if name == "sft":
        lengths = [len(encoder.dialogue(r["messages"])[0]) for r in sample]
        return Data(rows, _mean([n for n in lengths if n <= longest]))
    if name == "ppo":
        lengths = [len(encoder.prompt_ids(r["prompt"])) for r in sample]
        return Data(rows, _mean([n for n in lengths if n <= longest]))
    texts = [[len(encoder.response_ids(text)) for text in r["responses"]] for r in sample]
    prompts = [len(encoder.prompt_ids(r["prompt"])) for r in sample]
    kept = [(p, t) for p, t in zip(prompts, texts, strict=True) if p + max(t) <= longest]
    if not kept:
        raise UserError(f"reward: no row fits into max_tokens ({longest}); raise it")
    held = sum(r.get("labeler") in recipe.held_out_labelers for r in records) / len(records)
    a_ranking = _mean([sum(p + n for n in t) for p, t in kept])
    return Data(round(rows * (1 - held)), a_ranking, responses=_mean([len(t) for _, t in kept]))


def _some(records: list[Any]) -> list[Any]:
    """A sample that hashes choose."""
    return shuffle_by_hash(records[:: max(1, len(records) // (4 * SAMPLE))])[:SAMPLE]


def _mean(values: list[Any]) -> float:
    return sum(values) / max(len(values), 1)


# ------------------------------------------------------------------------------------------------ work


def _attention(config: Any, tokens: float, length: float, passes: float) -> float:
    """Operations of attention's two products with a causal mask: 2 · layers · width · length a token and pass."""
    text = config.get_text_config()
    return passes * 2.0 * layers_of(text) * text.hidden_size * length * tokens


def _trainer_work(name: str, recipe: Any, model: Model, data: Data) -> Work:
    lora = getattr(recipe, "lora", None) is not None
    a_row = data.tokens
    packed = name == "pretrain" or (name == "sft" and recipe.packing)
    if name == "sft" and packed and data.rows is not None:
        steps = math.ceil(data.rows * data.tokens / recipe.max_tokens * recipe.epochs / recipe.examples_per_step)
        a_row = float(recipe.max_tokens)
    elif data.rows is not None:
        steps = math.ceil(data.rows * recipe.epochs / recipe.examples_per_step)
    else:
        steps = 0
    steps = recipe.max_steps or steps
    tokens = steps * recipe.examples_per_step * a_row
    passes = 4 if lora else 6  # a frozen base needs no gradients of its weights
    flops = passes * model.size.total * tokens
    length = a_row / data.responses
    work = Work(steps, tokens, {"train": flops}, _attention(model.config, tokens, length, passes / 2))
    if recipe.gradient_checkpointing:
        work.recomputed_flops = 2.0 * model.size.total * tokens
    if not data.counted:
        work.notes.append("no data counted: every row is taken to be as long as the recipe allows")
    return work


def _ppo_work(
    recipe: Any, model: Model, value: Model, reward: Model | None, data: Data, args: argparse.Namespace
) -> Work:
    prompt = args.prompt_tokens or data.tokens
    response = args.response_tokens or float(recipe.max_response_tokens)
    episodes = recipe.total_rollouts * recipe.prompts_per_rollout
    tokens = episodes * (prompt + response)
    n = model.size.total
    v = 0 if recipe.roles == "shared_trunk" else value.size.total
    trained = 4 if recipe.roles == "adapters" else 6
    flops = {
        "generate": 2.0 * n * tokens,
        "score": 2.0 * (2 * n + v + (reward.size.total if reward else 0)) * tokens,
        "update": float(trained) * recipe.ppo_epochs * (n + v) * tokens,
    }
    work = Work(recipe.total_rollouts * recipe.ppo_epochs * recipe.minibatches, tokens, flops)
    if recipe.ptx_coef:
        blocks = episodes * recipe.ppo_epochs * recipe.ptx_ratio
        flops["ptx"] = 6.0 * n * blocks * recipe.ptx_block_tokens
        work.notes.append(f"ptx: {blocks:,.0f} blocks of {recipe.ptx_block_tokens} tokens")
    passes = 3 + recipe.ppo_epochs * trained / 2
    work.attention_flops = _attention(model.config, tokens, prompt + response, passes)
    counted = "measured" if data.counted and not args.prompt_tokens else "taken"
    work.notes.append(
        f"{episodes:,} episodes of {prompt:.0f} prompt tokens ({counted}) and {response:.0f} response tokens "
        f"({'given' if args.response_tokens else 'the most allowed'})"
    )
    return work


# ------------------------------------------------------------------------------------------------ memory


def _states(trained: float, frozen_bytes: float, recipe: Any, setting: Setting) -> dict[str, float]:
    """Bytes of weights, gradients and optimizer of one device."""
    shards = setting.shards
    adam = ADAM_BYTES[getattr(recipe, "optimizer", "adamw")]
    parts = {
        "weights": (4.0 * trained + frozen_bytes) / shards["weights"],
        "gradients": 4.0 * trained / shards["states"],
        "optimizer": adam * trained / shards["states"],
    }
    if setting.sharding == "ddp":
        parts["exchange buffers"] = 4.0 * trained
    return parts


def _trainer_memory(name: str, recipe: Any, model: Model, data: Data, setting: Setting) -> tuple[dict[str, float], int]:
    """(bytes by part, largest examples_per_device that fits)."""
    lora = getattr(recipe, "lora", None)
    quantization = getattr(recipe, "quantization", None)
    size = model.size.total
    if lora:
        trained = float(lora_parameters(model.config, lora.r, lora.target_modules, name == "reward"))
        linear = model.size.linear if quantization else 0
        frozen = WEIGHT_BYTES[quantization] * linear + 4.0 * (size - linear)
    else:
        trained, frozen = float(size), 0.0
    parts = _states(trained, frozen, recipe, setting)
    if setting.shards["weights"] > 1:
        parts["gathered layer"] = 2 * 4.0 * model.size.largest_layer
    length = recipe.block_tokens if name == "pretrain" else recipe.max_tokens

    examples = min(recipe.examples_per_device, max(1, recipe.examples_per_step // setting.gpus))
    here = step_memory(
        model.config,
        examples if name != "reward" else max(1, round(examples * data.responses)),
        length,
        head={"pretrain": "causal", "sft": "tiles", "reward": "score"}[name],
        precision=_precision(setting),
        checkpointing=recipe.gradient_checkpointing,
    )
    fixed = sum(parts.values())
    parts["activations"] = here
    return parts, int(max(0.0, setting.device.memory_gib * GIB * 0.95 - fixed) // (here / examples))


def _precision(setting: Setting) -> str:
    """How the step computes (see `sizing.step_memory`)."""
    return "fp32" if not setting.device.bf16 else "bf16" if setting.shards["weights"] > 1 else "autocast"


def _ppo_memory(
    recipe: Any, model: Model, value: Model, reward: Model | None, data: Data, setting: Setting
) -> tuple[dict[str, float], int]:
    """(bytes by part, largest micro_batch_tokens that fits)."""
    n, v = model.size.total, value.size.total

    def frozen(held: Model) -> float:  # `precision.cast_frozen_linears_to_bf16`
        return 4.0 * held.size.total - (2.0 * held.size.linear if setting.device.bf16 else 0.0)

    parts: dict[str, float] = {}
    if recipe.roles == "adapters":
        adapters = 2.0 * lora_parameters(model.config, recipe.lora.r, recipe.lora.target_modules)
        linear = model.size.linear
        base = (WEIGHT_BYTES[recipe.quantization] if recipe.quantization else 4.0) * linear + 4.0 * (n - linear)
        parts["base of policy, reference and value"] = base
        trained, parts["policy and value adapters"] = adapters, 4.0 * adapters
    elif recipe.roles == "shared_trunk":
        trained = float(n)
        parts |= {"policy and value": 4.0 * n, "reference": frozen(model)}
    else:
        trained = float(n + v)
        parts |= {"policy": 4.0 * n, "reference": frozen(model), "value": 4.0 * v}
    if reward:
        parts["reward model"] = frozen(reward)
    if recipe.ema_decay:
        parts["average of the policy"] = 4.0 * n
    parts |= {"gradients": 4.0 * trained, "optimizer": 8.0 * trained}
    precision = _precision(setting)
    prompt = min(data.tokens, recipe.max_prompt_tokens)
    length = max(2, int(prompt + recipe.max_response_tokens))

    def update() -> int:
        rows = max(1, recipe.micro_batch_tokens // length)
        policy = step_memory(
            model.config, rows, length, head="response", response=recipe.max_response_tokens, precision=precision, logits_bytes=LOGITS_BYTES
        )  # fmt: skip
        if recipe.roles == "shared_trunk":
            return policy
        scalar = step_memory(
            value.config, rows, length, head="value", response=recipe.max_response_tokens, precision=precision
        )
        return max(policy, scalar)  # one after the other

    rows = min(recipe.generation_rows, max(1, recipe.prompts_per_rollout // setting.gpus))
    cache = cache_bytes(model.config, rows, length, 2 if setting.device.bf16 else 4)
    here = update()
    fixed = sum(parts.values())
    parts["KV cache" if here < cache else "activations"] = max(here, cache)  # phases take turns: the larger counts
    room = setting.device.memory_gib * GIB * 0.95 - fixed
    a_row = here / max(1, recipe.micro_batch_tokens // length)
    return parts, 0 if room < max(a_row, cache) else length * int(room // a_row)


# ------------------------------------------------------------------------------------------------ a stage


def _plan_stage(
    name: str, recipe: Any, model: Model, made: dict[str, Model], setting: Setting, args: argparse.Namespace
) -> dict[str, Any]:
    data = _data(name, recipe, model)
    sharded = setting.sharding in ("zero2", "zero3", "fsdp2")
    refused = sharded and (name in ("reward", "ppo") or getattr(recipe, "lora", None) is not None)
    here = dataclasses.replace(setting, sharding="ddp" if setting.gpus > 1 else "none") if refused else setting
    if name == "ppo":
        reward = _reward_model(recipe, made)
        from_reward = recipe.value_init == "reward" or (recipe.value_init is None and recipe.roles == "separate")
        value = reward if reward and from_reward else Model(model.config, parameters(model.config, scalar=True))
        work = _ppo_work(recipe, model, value, reward, data, args)
        memory, fits = _ppo_memory(recipe, model, value, reward, data, here)
        batch_key = "micro_batch_tokens"
    else:
        work = _trainer_work(name, recipe, model, data)
        memory, fits = _trainer_memory(name, recipe, model, data, here)
        batch_key = "examples_per_device"
    generating = work.flops.get("generate", 0.0)
    total = sum(work.flops.values())
    rate = setting.gpus * setting.device.tflops * 1e12
    seconds = (total - generating + work.attention_flops + work.recomputed_flops) / (rate * setting.mfu)
    seconds += generating / (rate * setting.generation_mfu)
    hours = seconds / 3600
    needed = sum(memory.values())
    room = setting.device.memory_gib * GIB * 0.95
    result: dict[str, Any] = {
        "parameters": model.size.total,
        "rows": data.rows,
        "tokens": work.tokens,
        "steps": work.steps,
        "flops": total,
        "flops_by_phase": work.flops,
        "attention_flops": work.attention_flops,
        "recomputed_flops": work.recomputed_flops,
        "petaflop_s_days": total / PETAFLOP_S_DAY,
        "hours": hours,
        "gpu_hours": hours * setting.gpus,
        "energy_kwh": hours * setting.gpus * setting.device.watts / 1000,
        "cost_usd": hours * setting.gpus * setting.device.usd_per_hour,
        "memory": {part: round(size) for part, size in memory.items()},
        "memory_total": round(needed),
        "fits": needed <= room,
        "largest_batch": {batch_key: fits},
        "notes": list(work.notes),
        "advice": [],
    }
    if refused:
        result["notes"].append(
            f"{name} refuses {setting.sharding}; planned data-parallel, every device with a whole copy"
        )
    if not result["fits"]:
        result["advice"] = _advice(name, recipe, model, made, data, here, needed, room)
    return result


def _reward_model(recipe: Any, made: dict[str, Model]) -> Model | None:
    """The largest reward model of the recipe; functions take nothing."""
    found = []
    for source in recipe.reward:
        assert isinstance(source, RewardSource)
        if source.model is None:
            continue
        if os.path.normpath(source.model) in made:
            found.append(made[os.path.normpath(source.model)])
        else:
            try:
                config = transformers.AutoConfig.from_pretrained(source.model)
            except (OSError, ValueError) as error:
                raise UserError(f"ppo: no config of the reward model {source.model!r} can be had") from error
            found.append(Model(config, parameters(config, scalar=True)))
    return max(found, key=lambda model: model.size.total, default=None)


def _advice(
    name: str,
    recipe: Any,
    model: Model,
    made: dict[str, Model],
    data: Data,
    setting: Setting,
    needed: float,
    room: float,
) -> list[str]:
    """What the stage offers to need less, each with what it would then need; the switches of one stage add up."""
    found = [f"needs {needed / GIB:,.1f} GiB of {room / GIB:,.1f} GiB that {setting.device.name} leaves (95 %)"]
    lora = LoraOptions()
    tries: list[tuple[str, dict[str, Any], str | None]] = []
    if name == "ppo":
        tries.append(
            ("roles: adapters, lora: {r: 16}", {"roles": "adapters", "lora": lora, "value_init": "policy"}, None)
        )
        tries.append(("quantization: 4bit", {"quantization": "4bit"}, None))
        tries.append(("micro_batch_tokens: 1024", {"micro_batch_tokens": 1024}, None))
    else:
        tries.append(("gradient_checkpointing: true", {"gradient_checkpointing": True}, None))
        tries.append(("examples_per_device: 1", {"examples_per_device": 1}, None))
        if name in ("sft", "reward"):
            tries.append(("optimizer: adamw_8bit", {"optimizer": "adamw_8bit"}, None))
        if name in ("pretrain", "sft") and setting.gpus > 1 and setting.sharding not in ("zero3", "fsdp2"):
            tries.append((f"--accelerate recipes/accelerate/fsdp2.yaml over {setting.gpus} GPUs", {}, "fsdp2"))
        if name in ("sft", "reward"):
            tries.append(("lora: {r: 16}", {"lora": lora}, "none" if setting.gpus == 1 else "ddp"))
            tries.append(("quantization: 4bit", {"quantization": "4bit"}, None))
    changes: dict[str, Any] = {}
    for text, change, sharding in tries:
        if all(getattr(recipe, key) == value for key, value in change.items()) and sharding is None:
            continue
        changes |= change
        setting = dataclasses.replace(setting, sharding=sharding) if sharding else setting
        tried = dataclasses.replace(recipe, **changes)
        if name == "ppo":
            reward = _reward_model(tried, made)
            value = Model(model.config, parameters(model.config, scalar=True))
            memory, _ = _ppo_memory(tried, model, value, reward, data, setting)
        else:
            memory, _ = _trainer_memory(name, tried, model, data, setting)
        total = sum(memory.values())
        found.append(f"{text}: {total / GIB:,.1f} GiB" + (", fits" if total <= room else ""))
        if total <= room:
            return found
    found.append("nothing that this stage offers makes it fit; take a larger device or a smaller model")
    return found


# ------------------------------------------------------------------------------------------------ text


def _print(report: dict[str, Any]) -> None:
    console = Console(highlight=False)
    device = report["device"]
    console.print(
        f"[bold]{report['recipe']}[/] on {report['gpus']} × {device['name']} ({device['memory_gib']:g} GiB, {device['tflops']:g} TFLOP/s), "
        f"{report['sharding']}, at {report['mfu']:.0%} of the peak ({report['generation_mfu']:.0%} while generating)"
    )
    table = Table("", *report["stages"], "total")
    stages = list(report["stages"].values())

    def row(title: str, key: str, show: Any, total: bool = False) -> None:
        table.add_row(title, *(show(stage[key]) for stage in stages), show(report["total"][key]) if total else "")

    row("parameters", "parameters", _count)
    row("steps", "steps", lambda n: f"{n:,}")
    row("tokens", "tokens", _count)
    row("petaflop/s-days", "petaflop_s_days", _small, total=True)
    row("hours", "hours", _small, total=True)
    row("energy, kWh", "energy_kwh", _small, total=True)
    row("cost, USD", "cost_usd", _small, total=True)
    names = list(dict.fromkeys(part for stage in stages for part in stage["memory"]))
    for part in names:
        table.add_row(
            f"  {part}", *(_bytes(stage["memory"][part]) if part in stage["memory"] else "" for stage in stages), ""
        )
    row("memory of a device", "memory_total", _bytes)
    table.add_row("fits", *("yes" if stage["fits"] else "[red]no[/]" for stage in stages), "")
    largest = [next(iter(stage["largest_batch"].items())) for stage in stages]
    table.add_row("largest batch", *(f"{n:,} {key.replace('_', ' ')}" for key, n in largest), "")
    console.print(table)
    for name, stage in report["stages"].items():
        for note in [*stage["notes"], *stage["advice"]]:
            console.print(f"{name}: {note}", markup=False)


def _count(n: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n:.0f}"


def _bytes(n: float) -> str:
    for size, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB")):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n / 1024:.3g} KiB"


def _small(x: float) -> str:
    return f"{x:,.0f}" if x >= 1000 else f"{x:.3g}"

"""Memory of a device in each stage: fp32 weights, gradients and AdamW states under bf16 autocast, activations, caches."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from pipeline.models.sizes import LOGITS_BYTES
from pipeline.planning.activations import Step, step_memory
from pipeline.planning.attention import cache_bytes
from pipeline.planning.devices import Device
from pipeline.planning.parameters import lora_parameters
from pipeline.planning.workload import Data, Model, PPOModels

GIB = 2**30
USABLE = 0.95  # of a device's memory; the rest is the driver's, kernels' and fragmentation's
FP32 = 4.0
WEIGHT_BYTES = {None: FP32, "8bit": 1.0, "4bit": 0.5 + 0.127 / 8}  # NF4, double quantisation (Dettmers et al. 2023)
ADAM_BYTES = {"adamw": 8.0, "adamw_8bit": 2.0}
SHARDS_WEIGHTS, SHARDS_STATES = ("zero3", "fsdp2"), ("zero2", "zero3", "fsdp2")
HEADS = {"pretrain": "causal", "sft": "tiles", "reward": "score"}  # see `Step`


@dataclass(frozen=True)
class Setting:
    """The hardware: devices, sharding over them, and the share of their peak that they reach."""

    device: Device
    gpus: int
    sharding: str  # none, ddp, zero2, zero3, fsdp2
    mfu: float
    generation_mfu: float

    @property
    def weight_shards(self) -> int:
        """Devices that share the weights."""
        return self.gpus if self.sharding in SHARDS_WEIGHTS else 1

    @property
    def state_shards(self) -> int:
        """Devices that share gradients and optimizer states."""
        return self.gpus if self.sharding in SHARDS_STATES else 1

    @property
    def room(self) -> float:
        """Bytes of a device that a stage may fill."""
        return self.device.memory_gib * GIB * USABLE

    @property
    def precision(self) -> str:
        """How a step computes (see `activations.Step`)."""
        return "fp32" if not self.device.bf16 else "bf16" if self.weight_shards > 1 else "autocast"


@dataclass(frozen=True)
class Memory:
    """Bytes of one device by part, and the largest batch that fits: examples per device, or tokens per micro-batch."""

    parts: dict[str, float]
    largest_batch: int

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def trainer_memory(name: str, recipe: Any, model: Model, data: Data, setting: Setting) -> Memory:
    """Of pretrain, sft or reward."""
    parts = _trainer_states(name, recipe, model, setting)
    if setting.weight_shards > 1:
        parts["gathered layer"] = 2 * FP32 * model.size.largest_layer
    fixed = sum(parts.values())
    examples = min(recipe.examples_per_device, max(1, recipe.examples_per_step // setting.gpus))
    step = Step(
        rows=max(1, round(examples * data.responses)) if name == "reward" else examples,
        length=recipe.block_tokens if name == "pretrain" else recipe.max_tokens,
        head=HEADS[name],
        precision=setting.precision,
        checkpointing=recipe.gradient_checkpointing,
    )
    activations = step_memory(model.config, step)
    parts["activations"] = activations
    return Memory(parts, int(max(0.0, setting.room - fixed) // max(activations / examples, 1.0)))


def _trainer_states(name: str, recipe: Any, model: Model, setting: Setting) -> dict[str, float]:
    """Weights, gradients and optimizer of one device."""
    lora, quantization = getattr(recipe, "lora", None), getattr(recipe, "quantization", None)
    trained, frozen = float(model.size.total), 0.0
    if lora:
        trained = float(lora_parameters(model.config, lora.r, lora.target_modules, name == "reward"))
        frozen = _base_bytes(model, quantization)
    parts = {
        "weights": (FP32 * trained + frozen) / setting.weight_shards,
        "gradients": FP32 * trained / setting.state_shards,
        "optimizer": ADAM_BYTES[getattr(recipe, "optimizer", "adamw")] * trained / setting.state_shards,
    }
    if setting.sharding == "ddp":
        parts["exchange buffers"] = FP32 * trained
    return parts


def _base_bytes(model: Model, quantization: str | None) -> float:
    """A frozen base, its linear layers quantised or not."""
    linear = model.size.linear
    return WEIGHT_BYTES[quantization] * linear + FP32 * (model.size.total - linear)


def ppo_memory(recipe: Any, models: PPOModels, data: Data, setting: Setting) -> Memory:
    """Of PPO: its phases take turns, the largest counts."""
    parts = _ppo_states(recipe, models, setting)
    fixed = sum(parts.values())
    prompt = min(data.tokens, recipe.max_prompt_tokens)
    length = max(2, int(prompt + recipe.max_response_tokens))
    rows = max(1, recipe.micro_batch_tokens // length)
    generated = min(recipe.generation_rows, max(1, recipe.prompts_per_rollout // setting.gpus))
    cache = cache_bytes(models.policy.config, generated, length, 2 if setting.device.bf16 else 4)
    activations = _update_activations(recipe, models, setting, rows, length)
    parts["KV cache" if activations < cache else "activations"] = max(activations, cache)
    room, row = setting.room - fixed, activations / rows
    return Memory(parts, 0 if room < max(row, cache) else length * int(room // max(row, 1.0)))


def _ppo_states(recipe: Any, models: PPOModels, setting: Setting) -> dict[str, float]:
    """The networks, with gradients, optimizer and what processes exchange."""
    policy, value = models.policy.size.total, models.value.size.total

    def frozen(model: Model) -> float:  # `precision.cast_frozen_linears_to_bf16`
        return FP32 * model.size.total - (2.0 * model.size.linear if setting.device.bf16 else 0.0)

    if recipe.roles == "adapters":
        trained = 2.0 * lora_parameters(models.policy.config, recipe.lora.r, recipe.lora.target_modules)
        base = _base_bytes(models.policy, recipe.quantization)
        parts = {"base of policy, reference and value": base, "policy and value adapters": FP32 * trained}
    elif recipe.roles == "shared_trunk":
        trained = float(policy)
        parts = {"policy and value": FP32 * policy, "reference": frozen(models.policy)}
    else:
        trained = float(policy + value)
        parts = {"policy": FP32 * policy, "reference": frozen(models.policy), "value": FP32 * value}
    if models.reward:
        parts["reward model"] = frozen(models.reward)
    if recipe.ema_decay:
        parts["average of the policy"] = FP32 * (trained / 2 if recipe.roles == "adapters" else policy)
    parts |= {"gradients": FP32 * trained, "optimizer": ADAM_BYTES["adamw"] * trained}
    if setting.gpus > 1:  # flat copies of all gradients, exchanged in buckets (`Processes.sum_gradients`)
        parts["exchange buffers"] = FP32 * trained
    return parts


def _update_activations(recipe: Any, models: PPOModels, setting: Setting, rows: int, length: int) -> int:
    """The larger of a policy's and a value network's pass, which follow each other."""
    step = Step(rows, length, "response", recipe.max_response_tokens, setting.precision, logits_bytes=LOGITS_BYTES)
    policy = step_memory(models.policy.config, step)
    if recipe.roles == "shared_trunk":
        return policy
    return max(policy, step_memory(models.value.config, dataclasses.replace(step, head="value", logits_bytes=None)))

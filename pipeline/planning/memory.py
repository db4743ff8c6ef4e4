"""Memory of a device in each stage: fp32 weights, gradients and AdamW states under bf16 autocast, activations, caches."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
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
WHOLE = "whole"  # begins the names of parts that every device holds whole
HEADS = {"pretrain": "causal", "sft": "tiles", "reward": "score"}  # see `Step`


@dataclass(frozen=True)
class Setting:
    """The hardware: devices, sharding over them, and the share of their peak that they reach."""

    device: Device
    gpus: int
    sharding: str  # none, ddp, zero2, zero3, fsdp2
    mfu: float
    generation_mfu: float
    replicas: int = 1  # groups of devices that each hold the whole model between them

    @property
    def shards_weights(self) -> bool:
        """Whether a layer is gathered each time that it computes; so it is with one device too."""
        return self.sharding in SHARDS_WEIGHTS

    @property
    def weight_shards(self) -> int:
        """Devices that share the weights."""
        return self.gpus // self.replicas if self.shards_weights else 1

    @property
    def state_shards(self) -> int:
        """Devices that share gradients and optimizer states."""
        return self.gpus // self.replicas if self.sharding in SHARDS_STATES else 1

    @property
    def gathered_bytes(self) -> float:
        """Of a parameter that is gathered, in the dtype that it computes in."""
        return 2.0 if self.device.bf16 else FP32

    @property
    def room(self) -> float:
        """Bytes of a device that a stage may fill."""
        return self.device.memory_gib * GIB * USABLE

    @property
    def precision(self) -> str:
        """How a step computes (see `activations.Step`)."""
        return "fp32" if not self.device.bf16 else "bf16" if self.shards_weights else "autocast"


@dataclass(frozen=True)
class Memory:
    """Bytes of one device by part, and the largest batch that fits: examples per device, or tokens per micro-batch.

    whole: of them, what every device holds whole however many share the model. without_whole: bytes needed if none did.
    """

    parts: dict[str, float]
    largest_batch: int
    whole: dict[str, float] = field(default_factory=dict)
    without_whole: float = 0.0

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def trainer_memory(name: str, recipe: Any, model: Model, data: Data, setting: Setting) -> Memory:
    """Of pretrain, sft or reward."""
    parts = _trainer_states(name, recipe, model, setting)
    examples = min(recipe.examples_per_device, max(1, recipe.examples_per_step // setting.gpus))
    step = Step(
        rows=max(1, round(examples * data.responses)) if name == "reward" else examples,
        length=recipe.block_tokens if name == "pretrain" else recipe.max_tokens,
        head=HEADS[name],
        precision=setting.precision,
        checkpointing=recipe.gradient_checkpointing,
    )
    activations = step_memory(model.config, step)
    if setting.shards_weights:
        parts["gathered layers"] = gathered_layers(model, setting, activations)
    fixed = sum(parts.values())
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


def gathered_layers(model: Model, setting: Setting, activations: float) -> float:
    """What a pass of a sharded model holds beside its parts (`models.sharding`) and its activations.

    Forward: what is outside the layers, a layer, and the next one. Backward: also the gradient of a layer, as it was computed and
    in fp32 as it is added over processes. The same of what is outside the layers comes last, when nothing else is left: it counts
    as far as it is more than all that a pass held before.
    """
    layer, rest = model.size.largest_layer, model.size.outside_layers
    gradient_bytes = setting.gathered_bytes + FP32
    return max(
        setting.gathered_bytes * (rest + 2 * layer) + gradient_bytes * layer, gradient_bytes * rest - activations
    )


# Parts that the phases of a rollout need; in the others `offload:` keeps them in the CPU's memory.
OFFLOADED = {
    "none": {},
    "frozen": {"reference": "measuring", "reward model": "scoring"},
    "all": {"reference": "measuring", "reward model": "scoring", "optimizer": "update"},
}


def ppo_memory(recipe: Any, models: PPOModels, data: Data, setting: Setting) -> Memory:
    """Of PPO: its phases take turns, the largest counts."""
    parts = _ppo_states(recipe, models, setting)
    needed_in = {part: phase for part, phase in OFFLOADED[recipe.offload].items() if part in parts}
    fixed = sum(size for part, size in parts.items() if part not in needed_in)
    length = _longest_sequence(recipe, data)
    own = math.ceil(recipe.prompts_per_rollout / recipe.minibatches / setting.gpus)  # of a minibatch, this device's
    rows = min(max(1, recipe.micro_batch_tokens // length), own)
    activations = _update_activations(recipe, models, setting, rows, length)
    phases: dict[str, dict[str, float]] = {"update": {"activations": activations}}
    if setting.shards_weights:
        trained = (models.policy, models.value)
        phases["update"]["gathered layers"] = max(gathered_layers(model, setting, activations) for model in trained)
    phases |= _phases_without_gradients(recipe, models, setting, length)
    for part, phase in needed_in.items():  # a pass without gradients keeps no more than the update's
        phases[phase] = {"activations": activations, **phases.get(phase, {}), part: parts.pop(part)}
    sizes = {name: sum(phase.values()) for name, phase in phases.items()}
    largest = phases[max(sizes, key=sizes.__getitem__)]
    parts |= largest
    room, row = setting.room - fixed, activations / rows
    room_of_rows = room - (sizes.pop("update") - activations)
    fits = room_of_rows >= row and room >= max(sizes.values(), default=0.0)
    whole = {part: size for part, size in largest.items() if part.startswith(WHOLE)}
    shared = max(sum(size for part, size in phase.items() if not part.startswith(WHOLE)) for phase in phases.values())
    return Memory(parts, length * int(room_of_rows // max(row, 1.0)) if fits else 0, whole, fixed + shared)


def _phases_without_gradients(
    recipe: Any, models: PPOModels, setting: Setting, length: int
) -> dict[str, dict[str, float]]:
    """Sampling, and scoring where its network is gathered for it; what else they compute is less than an update's activations."""
    phases: dict[str, dict[str, float]] = {}
    if recipe.engine == "local":
        generated = min(recipe.generation_rows, max(1, recipe.prompts_per_rollout // setting.gpus))
        phases["sampling"] = {"KV cache": _cache(models, setting, generated, length)}
    if not setting.shards_weights:
        return phases
    if recipe.engine == "local":
        phases["sampling"][f"{WHOLE} policy, to sample"] = setting.gathered_bytes * models.policy.size.total
    scorer = models.reward.size.total if models.reward else 0
    phases["scoring"] = {f"{WHOLE} reward model, to score": setting.gathered_bytes * scorer}
    return phases


def _longest_sequence(recipe: Any, data: Data) -> int:
    """Tokens of a mean prompt and the longest response."""
    return max(2, int(min(data.tokens, recipe.max_prompt_tokens) + recipe.max_response_tokens))


def _cache(models: PPOModels, setting: Setting, rows: int, length: int) -> float:
    return float(cache_bytes(models.policy.config, rows, length, 2 if setting.device.bf16 else 4))


def server_memory(recipe: Any, models: PPOModels, data: Data, setting: Setting) -> dict[str, float]:
    """Bytes of the vLLM server that samples for all devices: the policy, and the responses that are sampled at once."""
    rows = min(recipe.generation_rows * setting.gpus, recipe.prompts_per_rollout)
    weights = setting.gathered_bytes * models.policy.size.total
    return {"weights": weights, "KV cache": _cache(models, setting, rows, _longest_sequence(recipe, data))}


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
    if setting.shards_weights:
        return {part: size / setting.weight_shards for part, size in parts.items()}
    if setting.gpus > 1:  # flat copies of all gradients, exchanged in buckets (`Processes.sum_gradients`)
        parts["exchange buffers"] = FP32 * trained
    return parts


def _update_activations(recipe: Any, models: PPOModels, setting: Setting, rows: int, length: int) -> int:
    """The larger of a policy's and a value network's pass, which follow each other."""
    step = Step(
        rows=rows,
        length=length,
        head="response",
        response=recipe.max_response_tokens,
        precision=setting.precision,
        checkpointing=recipe.gradient_checkpointing,
        logits_bytes=LOGITS_BYTES,
    )
    policy = step_memory(models.policy.config, step)
    if recipe.roles == "shared_trunk":
        return policy
    return max(policy, step_memory(models.value.config, dataclasses.replace(step, head="value", logits_bytes=None)))

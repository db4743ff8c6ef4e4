"""What devices exchange in one optimizer step, and where that takes longer than computing.

Bytes that one device sends, with rings (Thakur et al. 2005): of n bytes over N devices, an all-gather or a reduce-scatter sends
n · (N − 1) / N, an all-reduce twice that. Latency is left out, and so is the overlap of exchanging with computing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pipeline.planning.memory import FP32, Setting
from pipeline.planning.parameters import lora_parameters
from pipeline.planning.workload import Data, Model, PPOModels

NODE = 8  # devices that a node's fast links join
NODE_GB_S, NETWORK_GB_S = 450.0, 50.0  # of one H100: NVLink in one direction, one 400 Gb/s adapter


REPLICAS = "gradients over replicas"


@dataclass(frozen=True)
class Exchange:
    """Bytes that one device sends in one optimizer step, by what they are for.

    group: devices that share a model, or all where each holds a copy. devices: all.
    """

    parts: dict[str, float]
    group: int
    devices: int

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def seconds(self) -> float:
        """At the bandwidth of the slowest link that each exchange crosses; a group of one node's size is within a node."""
        over = self.parts.get(REPLICAS, 0.0)
        return (self.total - over) / _bytes_per_second(self.group) + over / _bytes_per_second(self.devices)


def _bytes_per_second(devices: int) -> float:
    return 1e9 * (NODE_GB_S if devices <= NODE else NETWORK_GB_S)


def all_gather(size: float, devices: int) -> float:
    """Bytes that one device sends so that all hold `size`; a reduce-scatter of `size` sends as many."""
    return size * (devices - 1) / devices


def all_reduce(size: float, devices: int) -> float:
    return 2 * all_gather(size, devices)


def trainer_exchange(name: str, recipe: Any, model: Model, setting: Setting) -> Exchange:
    """Of pretrain, sft or reward."""
    lora = getattr(recipe, "lora", None)
    trained = float(model.size.total)
    if lora:
        trained = float(lora_parameters(model.config, lora.r, lora.target_modules, name == "reward"))
    passes = max(1, recipe.examples_per_step // (recipe.examples_per_device * setting.gpus))
    return Exchange(_training(model.size.total, trained, passes, setting), _group(setting), setting.gpus)


def ppo_exchange(recipe: Any, models: PPOModels, data: Data, setting: Setting) -> Exchange:
    """Of PPO; what a rollout exchanges once is shared among its optimizer steps."""
    length = data.tokens + recipe.max_response_tokens
    tokens = recipe.prompts_per_rollout // recipe.minibatches * length / setting.gpus
    passes = max(1, math.ceil(tokens / recipe.micro_batch_tokens))
    policy, value = float(models.policy.size.total), float(models.value.size.total)
    networks = [(policy, policy)] if recipe.roles == "shared_trunk" else [(policy, policy), (value, value)]
    if recipe.roles == "adapters":
        adapter = float(lora_parameters(models.policy.config, recipe.lora.r, recipe.lora.target_modules))
        networks = [(policy, adapter)] * 2
    parts: dict[str, float] = {}
    for held, trained in networks:
        for part, size in _training(held, trained, passes, setting).items():
            parts[part] = parts.get(part, 0.0) + size
    if setting.weight_shards > 1:
        steps = recipe.ppo_epochs * recipe.minibatches
        measured = math.ceil(passes * recipe.minibatches / 4)  # `rollout.collect.MEASURED_TOKENS`
        scorer = models.reward.size.total if models.reward else 0
        once = policy + scorer + measured * (policy + sum(held for held, _ in networks))
        gathered = all_gather(setting.gathered_bytes * once, setting.weight_shards)
        parts["weights, to sample, score and measure"] = gathered / steps
    return Exchange(parts, _group(setting), setting.gpus)


def _group(setting: Setting) -> int:
    return setting.weight_shards if setting.weight_shards > 1 else setting.gpus


def _training(held: float, trained: float, passes: int, setting: Setting) -> dict[str, float]:
    """Forward and backward passes of one network of `held` parameters, of which `trained` get a gradient."""
    shards, copies = setting.weight_shards, setting.gpus // setting.weight_shards
    if shards == 1:
        return {"gradients": all_reduce(FP32 * trained, setting.gpus)}
    parts = {
        "weights, forward and backward": 2 * passes * all_gather(setting.gathered_bytes * held, shards),
        "gradients": passes * all_gather(FP32 * trained, shards),
    }
    if copies > 1:
        parts[REPLICAS] = passes * all_reduce(FP32 * trained / shards, copies)
    return parts

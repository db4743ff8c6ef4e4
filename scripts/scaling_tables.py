"""The tables of docs/scaling.md: a 7B chain on 1 to 1,024 H100, by the formulas of `rlhf plan`.

python scripts/scaling_tables.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipeline.config.ppo import PPOArguments
from pipeline.config.pretrain import PretrainArguments
from pipeline.config.rewards import RewardSource
from pipeline.data.entries import DatasetEntry
from pipeline.planning.communication import Exchange, ppo_exchange, trainer_exchange
from pipeline.planning.devices import devices
from pipeline.planning.memory import Setting
from pipeline.planning.parameters import parameters
from pipeline.planning.workload import Data, Model, PPOModels, Work, ppo_work, trainer_work

from transformers import LlamaConfig

CONFIG = LlamaConfig()  # 6.7B: 32 layers of 4,096
NUMBERS = (8, 64, 256, 1024)
PRETRAIN_TOKENS, PROMPT, RESPONSE, BATCH = 4096, 512, 512, 1024
REPLICATED = 8  # devices of one group, where there are several


def main() -> None:
    for title, table in tables().items():
        print(f"{title}\n\n{table}\n")


def tables() -> dict[str, str]:
    """Markdown tables by what they are of."""
    policy, value = Model(CONFIG, parameters(CONFIG)), Model(CONFIG, parameters(CONFIG, scalar=True))
    networks = PPOModels(policy, value, value)
    shared: dict[str, Any] = {"output_dir": "x", "datasets": [DatasetEntry(path="x")]}
    pretrain = PretrainArguments(
        **shared, tokenizer="x", model_config={"hidden_size": 4096}, examples_per_step=BATCH, examples_per_device=1, block_tokens=PRETRAIN_TOKENS, max_steps=1
    )  # fmt: skip
    ppo = PPOArguments(
        **shared, parent="x", reward=[RewardSource(model="x")], prompts_per_rollout=BATCH, minibatches=1, ppo_epochs=1,
        total_rollouts=1, max_prompt_tokens=PROMPT, max_response_tokens=RESPONSE, micro_batch_tokens=8192,
    )  # fmt: skip
    blocks, prompts = Data(None, PRETRAIN_TOKENS, counted=False), Data(None, PROMPT, counted=False)
    return {
        f"Pretraining, {BATCH:,} blocks of {PRETRAIN_TOKENS:,} tokens per step": _table(
            lambda setting: trainer_exchange("pretrain", pretrain, policy, setting),
            trainer_work("pretrain", pretrain, policy, blocks),
        ),
        f"PPO, {BATCH:,} prompts of {PROMPT} tokens, responses of {RESPONSE}, one step per rollout": _table(
            lambda setting: ppo_exchange(ppo, networks, prompts, setting), ppo_work(ppo, networks, prompts)
        ),
    }


def _table(exchange: Callable[[Setting], Exchange], work: Work) -> str:
    lines = ["| GPUs | groups | sent per GPU and step | exchanging | computing | longer |", "|---|---|---|---|---|---|"]
    device = devices()["h100"]
    for gpus in NUMBERS:
        for replicas in (1, gpus // REPLICATED) if gpus > REPLICATED else (1,):
            setting = Setting(device, gpus, "fsdp2", 0.4, 0.05, replicas)
            sent = exchange(setting)
            seconds = step_seconds(work, setting)
            longer = "exchanging" if sent.seconds > seconds else "computing"
            lines.append(
                f"| {gpus:,} | {replicas} of {gpus // replicas:,} | {sent.total / 1e9:,.1f} GB | {sent.seconds:,.2f} s "
                f"| {seconds:,.2f} s | {longer} |"
            )
    return "\n".join(lines)


def step_seconds(work: Work, setting: Setting) -> float:
    """Of computing one optimizer step, as `rlhf plan` counts hours; sampling is left out."""
    flops = sum(work.flops.values()) - work.flops.get("generate", 0.0) + work.attention_flops + work.recomputed_flops
    return flops / work.steps / (setting.gpus * setting.device.tflops * 1e12 * setting.mfu)


if __name__ == "__main__":
    main()

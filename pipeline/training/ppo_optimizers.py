"""PPO's two optimizers, policy and value model, each with its own learning rate and schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from pipeline.algorithms.schedules import lr_factor
from pipeline.config.ppo import PPOArguments

import torch
from torch.optim.lr_scheduler import LambdaLR


def build_optimizers(
    args: PPOArguments, trained: Mapping[str, Sequence[torch.nn.Parameter]]
) -> tuple[dict[str, torch.optim.AdamW], dict[str, LambdaLR]]:
    """AdamW and its schedule for "policy" and "value".

    A schedule counts the rollouts that its own network was trained on, so the value model's warm-up does not use up the policy's.

    Returns:
        optimizers, schedules: by network.
    """
    value_lr = args.learning_rate if args.value_learning_rate is None else args.value_learning_rate
    peaks = {"policy": args.learning_rate, "value": value_lr}
    rollouts = {"policy": args.total_rollouts - args.value_warmup_rollouts, "value": args.total_rollouts}
    shapes = {"policy": args.lr_schedule, "value": args.value_lr_schedule or args.lr_schedule}
    optimizers, schedules = {}, {}
    for name, peak in peaks.items():
        optimizers[name] = torch.optim.AdamW(
            trained[name],
            lr=peak,
            betas=(0.9, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=0.0,
            fused=True,
        )
        for parameter in trained[
            name
        ]:  # as AdamW's first step makes it; so a checkpoint of any step holds the same names
            optimizers[name].state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format, requires_grad=False),
            }
        factor = partial(
            lr_factor,
            total=rollouts[name],
            schedule=shapes[name],
            warmup=args.warmup_rollouts,
            warmup_from=args.warmup_from,
        )
        schedules[name] = LambdaLR(optimizers[name], factor)
    return optimizers, schedules

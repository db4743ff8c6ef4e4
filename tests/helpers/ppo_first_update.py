"""Run PPO, and store what its first update and its end look like in each process: `ppo_first_update.py OUT -- flags`.

`OUT-RANK.pt` holds the first rollout's samples and metrics, the first minibatch's gradients and metrics (whole tensors), the
numbers and bytes of this process's own parts, and its micro-batches.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline import ppo
from pipeline.config.stages import STAGES
from pipeline.data.batching import microbatches
from pipeline.models.sharding import local, whole
from pipeline.training.stage import Run, launch

import torch
from torch.distributed.tensor import DTensor

TRAINED = ("policy", "value")


def first_update(training: ppo.Training, run: Run[Any]) -> dict[str, Any]:
    learner, args = training.learner, run.args
    prompts = training.prompts.of_rollout(0, args.prompts_per_rollout, args.seed)
    rollout, metrics = ppo.collect_rollout(training.collector, prompts, training.state)
    rows = next(iter(learner.minibatches(len(rollout), 0)))
    minibatch = rollout.select(rows)
    step = learner.accumulate_gradients(minibatch)
    if learner.pretraining is not None:
        step["ptx_loss"] = learner.pretraining.accumulate_gradients(len(minibatch), 0)[0]
    parameters = {name: list(learner.networks.trained[name]) for name in TRAINED}
    run.processes.sum_gradients(p for name in TRAINED for p in parameters[name])
    gradients = {name: [whole(p.grad).clone() for p in parameters[name] if p.grad is not None] for name in TRAINED}
    lengths = [len(p) + len(r) for p, r in zip(minibatch.prompt_ids, minibatch.response_ids, strict=True)]
    own = run.processes.share(range(len(minibatch)))
    states = [state for optimizer in learner.optimizers.values() for state in optimizer.state.values()]
    with learner.networks.sampler("policy") as model:
        whole_policy = sum(p.numel() * p.element_size() for p in model.parameters() if not isinstance(p, DTensor))
    result = {
        "samples": [list(ids) for ids in rollout.response_ids],
        "metrics": {name: value for name, value in metrics.items() if not name.startswith("seconds")},
        "step": step,
        "gradients": gradients,
        "micro_batches": len(microbatches(lengths, own, args.micro_batch_tokens)),
        "bytes": {
            "weights": local_bytes(p for model in training.collector.networks.models() for p in model.parameters()),
            "whole_policy": whole_policy,
            "trained": local_bytes(p for name in TRAINED for p in parameters[name]),
            "gradients": local_bytes(p.grad for name in TRAINED for p in parameters[name] if p.grad is not None),
            "optimizer": local_bytes(state[name] for state in states for name in ("exp_avg", "exp_avg_sq")),
        },
    }
    for optimizer in learner.optimizers.values():
        optimizer.zero_grad()
    learner.update(rollout, metrics)
    training.state.rollout += 1
    return result


def local_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(local(tensor).numel() * tensor.element_size() for tensor in tensors)


def main(out: Path, flags: list[str]) -> None:
    def stage(run: Run[Any]) -> None:
        training = ppo.prepare(run, ppo.open_inputs(run))
        result = first_update(training, run)
        ppo.train(training, run)
        ppo.finish(training, run)
        result["processes"], result["sharded"] = run.processes.count, training.learner.networks.sharded
        torch.save(result, out.with_name(f"{out.name}-{run.processes.rank}.pt"))

    launch("ppo", STAGES["ppo"], stage, flags)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[3:])

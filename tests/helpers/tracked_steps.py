"""Steps of models sharded over a launch's processes under torch's memory tracker: `tracked_steps.py FOLDER`, one file per process.

`torch.distributed._tools` is private and was read in torch 2.13. FSDPMemTracker wraps methods of FSDP2's parameter groups, so it
breaks, with an AttributeError, if those are renamed. It follows one network; several are followed by MemTracker, which counts the
same bytes and has no name for gathered parameters.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.models.language_model import LanguageModel
from pipeline.models.loading import checkpoint_activations
from pipeline.models.networks import SeparateNetworks, response_batch
from pipeline.models.sharding import Sharding, ShardingOptions, local
from pipeline.planning.activations import by_part, peak_tracker
from pipeline.planning.parameters import build
from pipeline.training.processes import Processes

import torch
from accelerate import PartialState
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from transformers import LlamaConfig

ROWS, LENGTH, RESPONSE = 4, 64, 32


@dataclass(frozen=True)
class TrackedStep:
    """A step of the causal loss."""

    vocabulary: int = 2000
    checkpointing: bool = False


STEPS = {
    "activations": TrackedStep(),
    "checkpointing": TrackedStep(checkpointing=True),
    "vocabulary": TrackedStep(vocabulary=16000),
}


def config(vocabulary: int = 2000) -> LlamaConfig:
    """Of 6 M parameters with a vocabulary of 2,000."""
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=256, intermediate_size=688, num_hidden_layers=6, num_attention_heads=4,
        tie_word_embeddings=False,
    )  # fmt: skip


def local_bytes(tensors: Iterable[Any]) -> int:
    return sum(local(tensor).numel() * tensor.element_size() for tensor in tensors)


def tracked(tracker: Any, optimizer: torch.optim.Optimizer, accumulate: Callable[[], None]) -> dict[str, Any]:
    """Bytes at the peak of a micro-batch that adds to gradients and of the optimizer's step; and those of states."""
    with tracker:
        accumulate()
        optimizer.step()
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    states = {
        "weights": local_bytes(trained),
        "gradients": local_bytes(p.grad for p in trained),
        "optimizer": local_bytes(moments),
    }
    return {"states": states, "peak": by_part(tracker)}


def warmed_up(parameters: Iterable[Any], accumulate: Callable[[], None]) -> torch.optim.Optimizer:
    """An optimizer that has its moments, and gradients of one micro-batch."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    accumulate()
    optimizer.step()
    return optimizer


def causal_step(step: TrackedStep, sharding: Sharding) -> dict[str, Any]:
    model = build(config(step.vocabulary)).train()
    if step.checkpointing:
        checkpoint_activations(model)
    sharding.shard(model)
    ids = torch.randint(0, step.vocabulary, (ROWS, LENGTH))

    def accumulate() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    optimizer = warmed_up(model.parameters(), accumulate)
    return tracked(FSDPMemTracker(model, optimizer), optimizer, accumulate)


def ppo_step(sharding: Sharding) -> dict[str, Any]:
    """The update's passes of policy and value network, beside a frozen reference."""
    policy, reference, value = (build(config(), scalar) for scalar in (False, False, True))
    networks = SeparateNetworks(
        LanguageModel(policy, 1.0, []), LanguageModel(reference, 1.0, []), value, contextlib.nullcontext
    )
    networks.shard(sharding)
    half = [[5] * RESPONSE] * ROWS
    batch = response_batch(half, half, pad_id=0, packed=False, score_after_response=False, device=torch.device("cpu"))

    def accumulate() -> None:
        networks.accumulate_gradients(batch, lambda logprobs, _: -logprobs.sum(), lambda values: values.sum())

    optimizer = warmed_up([p for part in networks.trained.values() for p in part], accumulate)
    tracker = peak_tracker()
    tracker.track_external(networks.policy, networks.reference, networks.value, optimizer)
    result = tracked(tracker, optimizer, accumulate)
    result["states"]["reference"] = local_bytes(networks.reference.parameters())
    return result


def main(folder: Path) -> None:
    PartialState(cpu=True)
    processes = Processes.of_this_launch()
    sharding = Sharding(ShardingOptions(), processes.count, torch.device("cpu"), bf16=False)
    result = {name: causal_step(step, sharding) for name, step in STEPS.items()}
    result["ppo"] = ppo_step(sharding)
    (folder / f"{processes.rank}.json").write_text(json.dumps(result))
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

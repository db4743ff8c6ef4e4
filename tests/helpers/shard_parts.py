"""Shard tiny models over the processes of a launch and store what they do: `shard_parts.py STYLE FOLDER`, one file per process."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

from pipeline.models.sharding import (
    Sharding,
    ShardingOptions,
    clip_grad_norm,
    gathered,
    is_sharded,
    local,
    save_whole,
    sharded_as,
    whole,
)
from pipeline.training.processes import Processes
from pipeline.training.tensor_files import changed_names, read_tensors, write_tensors

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, tie_word_embeddings=False
    ),
    "gpt2": GPT2Config(vocab_size=40, n_embd=16, n_layer=3, n_head=2, n_positions=32, tie_word_embeddings=True),
}  # fmt: skip
MAX_NORM = 0.1


def make(style: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[style]).eval()


def loss_of(model: Any, seed: int) -> Any:
    ids = torch.randint(0, 40, (2, 8), generator=torch.Generator().manual_seed(seed))
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item()


def passes(model: Any, reference: Any, processes: Processes) -> dict[str, Any]:
    """Unequally many passes while whole; then gradients that are sums over processes, and their norm."""
    ids = torch.arange(8)[None]
    with torch.no_grad(), gathered(model):
        logits = [model(input_ids=ids, use_cache=False).logits for _ in range(1 + processes.rank)]
    with torch.no_grad():
        expected = reference(input_ids=ids, use_cache=False).logits
    for rank in range(processes.count):
        loss_of(reference, rank).backward()
    loss_of(model, processes.rank).backward()
    pairs = list(zip(model.parameters(), reference.parameters(), strict=True))
    result = {
        "logits": difference(logits[-1], expected),
        "parts_again": all(local(p).numel() < q.numel() for p, q in pairs if q.numel() > 1),
        "gradients": max(difference(whole(p.grad), q.grad) for p, q in pairs),
        "norm": clip_grad_norm(model.parameters(), MAX_NORM),
        "expected_norm": torch.nn.utils.clip_grad_norm_(reference.parameters(), MAX_NORM).item(),
    }
    return {**result, "clipped": max(difference(whole(p.grad), q.grad) for p, q in pairs)}


def files(model: Any, folder: Path, processes: Processes) -> dict[str, Any]:
    """Tensors written in parts, read back, and read back once a byte of a part is another."""
    folder.mkdir(exist_ok=True)
    processes.barrier()
    tree = {"model": model.state_dict(), "more": [1, "two", None, torch.ones(3)]}
    write_tensors(folder, tree, processes)
    read = read_tensors(folder, tree)
    result: dict[str, Any] = {
        "read": all(torch.equal(local(read["model"][name]), local(x)) for name, x in tree["model"].items()),
        "rest": read["more"][:3] == tree["more"][:3] and torch.equal(read["more"][3], tree["more"][3]),
        "changed": changed_names(folder, tree, processes),
    }
    processes.barrier()
    if processes.is_main:
        part = sorted((folder / "tensors").glob("*.safetensors"))[-1]
        content = bytearray(part.read_bytes())
        content[-3] ^= 1
        part.write_bytes(content)
    processes.barrier()
    return {**result, "damaged": changed_names(folder, tree, processes)}


def main(style: str, folder: Path) -> None:
    PartialState(cpu=True)
    processes = Processes.of_this_launch()
    model, reference = make(style), make(style)
    sharding = Sharding(ShardingOptions(), processes.count, torch.device("cpu"), bf16=False)
    sharding.shard(model, sum_gradients=True)
    first = next(model.parameters())
    tensor = torch.arange(first.numel(), dtype=torch.float32).view(first.shape)
    result: dict[str, Any] = {
        "sharded": is_sharded(model),
        "round_trip": torch.equal(whole(sharded_as(tensor, first)), tensor),
        "plain_stays": sharded_as(tensor, tensor) is tensor,
    }
    result |= passes(model, copy.deepcopy(reference), processes)
    result |= files(model, folder / "parts", processes)
    save_whole(model, folder / "saved")
    if processes.is_main:
        reference.save_pretrained(folder / "plain")
    (folder / f"{processes.rank}.json").write_text(json.dumps(result))
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

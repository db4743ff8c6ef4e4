"""A tree of tensors in a folder: one file, or, where tensors are sharded, a part from each process.

The parts are safetensors of `torch.distributed.checkpoint`, so any number of processes reads what another number wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipeline.models.sharding import first_names, local, sharded_as
from pipeline.training.processes import Processes

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor

ONE_FILE, PARTS, REST = "tensors.pt", "tensors", "rest.pt"
PIECE_BYTES = 2**32  # of whole tensors that are read back together, so that no second copy of all is held


def write_tensors(folder: Path, tree: Mapping[str, Any], processes: Processes) -> None:
    """Write dictionaries and lists of tensors and plain values; called by every process.

    Each process writes its parts of sharded tensors; the first one writes everything else.
    """
    tensors = _flat(tree)
    if not any(isinstance(tensor, DTensor) for tensor in tensors.values()):
        if processes.is_main:
            torch.save(dict(tree), folder / ONE_FILE)
        return
    same = processes.from_main(lambda: first_names(tensors))  # the first process has a part of every tensor
    once = {name: tensor for name, tensor in tensors.items() if same[name] == name}
    dcp.save(once, storage_writer=HuggingFaceStorageWriter(path=str(folder / PARTS), save_distributed=True))
    if processes.is_main:
        torch.save(_mapped(tree, lambda name, _: same[name]), folder / PARTS / REST)
    processes.barrier()


def read_tensors(folder: Path, like: Mapping[str, Any]) -> dict[str, Any]:
    """What `write_tensors` wrote, sharded as `like` is, a tree with the same names; called by every process.

    Tensors of parts that `like` does not name stay unread.
    """
    targets = _flat(like)
    if not (folder / PARTS).is_dir():
        return shard_tensors(torch.load(folder / ONE_FILE, map_location="cpu", weights_only=True), like)
    rest = torch.load(folder / PARTS / REST, map_location="cpu", weights_only=True)
    reader = HuggingFaceStorageReader(str(folder / PARTS))
    names = [name for name in reader.read_metadata().state_dict_metadata if name in targets]
    read = {name: torch.zeros_like(targets[name]) for name in names}
    dcp.load(read, storage_reader=HuggingFaceStorageReader(str(folder / PARTS)))
    return _filled(rest, read)


def changed_names(folder: Path, tree: Mapping[str, Any], processes: Processes) -> list[str]:
    """Names of the tensors that `write_tensors` wrote in parts and that read back differently, the same in every process."""
    if not (folder / PARTS).is_dir():
        return []
    tensors = _flat(tree)
    written = HuggingFaceStorageReader(str(folder / PARTS)).read_metadata().state_dict_metadata
    changed: list[str] = []
    for names in _pieces({name: tensors[name] for name in written}):
        read = {name: torch.zeros_like(tensors[name]) for name in names}
        dcp.load(read, storage_reader=HuggingFaceStorageReader(str(folder / PARTS)))
        changed += [name for name in names if not torch.equal(local(read[name]), local(tensors[name]))]
    return sorted(set(processes.gather(lambda: changed)))


def _pieces(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """Names in groups of at most `PIECE_BYTES`, the same in every process; a larger tensor is alone."""
    pieces: list[list[str]] = [[]]
    size = 0
    for name, tensor in sorted(tensors.items()):
        size += tensor.numel() * tensor.element_size()
        if pieces[-1] and size > PIECE_BYTES:
            pieces.append([])
            size = tensor.numel() * tensor.element_size()
        pieces[-1].append(name)
    return pieces


def shard_tensors(tree: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """Whole tensors sharded as those of the same name in `like` are."""
    targets = _flat(like)
    return _mapped(tree, lambda name, tensor: sharded_as(tensor, targets.get(name, tensor)))


def map_tensors(tree: Any, function: Callable[[Tensor], Any]) -> Any:
    """The tree with the function's result in the place of each tensor."""
    return _mapped(tree, lambda _, tensor: function(tensor))


def _flat(tree: Any, prefix: str = "") -> dict[str, Tensor]:
    """Tensors by the path of their keys, joined by slashes."""
    if isinstance(tree, Tensor):
        return {prefix: tree}
    pairs = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    return {
        name: tensor for key, value in pairs for name, tensor in _flat(value, f"{prefix}/{key}".lstrip("/")).items()
    }


def _mapped(tree: Any, function: Callable[[str, Tensor], Any], prefix: str = "") -> Any:
    """The tree with each tensor replaced by what the function makes of its path and itself."""
    if isinstance(tree, Tensor):
        return function(prefix, tree)
    if isinstance(tree, Mapping):
        return {key: _mapped(value, function, f"{prefix}/{key}".lstrip("/")) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_mapped(value, function, f"{prefix}/{index}".lstrip("/")) for index, value in enumerate(tree)]
    return tree


def _filled(rest: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The tree in which each name of a tensor is replaced by the tensor."""
    if isinstance(rest, str):
        return tensors.get(rest, rest)
    if isinstance(rest, Mapping):
        return {key: _filled(value, tensors) for key, value in rest.items()}
    return [_filled(value, tensors) for value in rest] if isinstance(rest, list) else rest

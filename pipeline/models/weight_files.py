"""The weights of a finished model on disk, in a smaller type."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

INDEX = "model.safetensors.index.json"


def round_weights_to_bf16(folder: Path) -> None:
    """Rewrite a model folder's fp32 weights in bf16, and its config.json accordingly; scalar heads stay fp32.

    Files are mapped and replaced one by one, by rename: half of one file is held in memory at a time. Weights that are
    bf16 already stay as they are, so that a killed stage may do it again.
    """
    for file in sorted(folder.glob("*.safetensors")):
        _round_file(file)
    if (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        index["metadata"]["total_size"] = sum(_tensor_bytes(file) for file in folder.glob("*.safetensors"))
        _replace_json(folder / INDEX, index)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            part["dtype"] = "bfloat16"
    _replace_json(folder / "config.json", config)


def _round_file(file: Path) -> None:
    with safe_open(file, framework="pt") as stored:
        metadata = stored.metadata()
        tensors = {name: _rounded(stored.get_tensor(name)) for name in stored.keys()}  # noqa: SIM118 (it is no dict)
    temporary = file.with_name(file.name + ".tmp")
    save_file(tensors, temporary, metadata=metadata)
    os.replace(temporary, file)


def _rounded(tensor: torch.Tensor) -> torch.Tensor:
    """A scalar head is the one matrix of one row, or its bias: bf16 has too few digits for scores."""
    scalar_head = tensor.numel() == 1 or (tensor.dim() == 2 and len(tensor) == 1)
    return tensor if scalar_head or tensor.dtype != torch.float32 else tensor.to(torch.bfloat16)


def _tensor_bytes(file: Path) -> int:
    """The bytes of a file's tensors, which follow a header whose length stands first."""
    with file.open("rb") as stored:
        header = int.from_bytes(stored.read(8), "little")
    return file.stat().st_size - 8 - header


def _replace_json(path: Path, value: object) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2, sort_keys=path.name == "config.json") + "\n", encoding="utf-8")
    os.replace(temporary, path)

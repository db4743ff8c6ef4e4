"""What is bf16 and what fp32, and every other decision that depends on the hardware: the one place that asks.

Master weights, scalar heads, logits and losses are fp32 everywhere; bf16 means autocast over fp32 weights.
"""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

PRETEND = "RLHF_PRETEND_DEVICE"  # tests set it to "cuda": a CPU then takes a GPU's decisions


@dataclass(frozen=True)
class DevicePlan:
    """How a stage computes on its device.

    Attributes:
        device_type: where tensors are: "cpu", "cuda", "mps".
        decided_for: whose decisions these are; another than `device_type` only in tests.
        autocast_dtype: bfloat16, or None for fp32.
        cast_frozen_to_bf16: frozen networks keep the weights of their linear layers in bf16.
        sample_in_bf16: sampling runs under autocast too. A CPU is slower in bf16, one token at a time.
    """

    device_type: str
    decided_for: str
    autocast_dtype: torch.dtype | None
    cast_frozen_to_bf16: bool
    sample_in_bf16: bool

    @property
    def bf16(self) -> bool:
        return self.autocast_dtype is not None

    def autocast(self) -> torch.autocast:
        """The context of a training or scoring pass."""
        return torch.autocast(self.device_type, dtype=torch.bfloat16, enabled=self.bf16)

    def sampling(self) -> contextlib.AbstractContextManager[object]:
        """The context of sampling."""
        return self.autocast() if self.sample_in_bf16 else contextlib.nullcontext()


def device_plan(device_type: str, precision: str) -> DevicePlan:
    """The decisions for a device and a recipe's `precision` ("fp32", "bf16", or "auto": what the hardware has)."""
    decided_for = decides_as(device_type)
    bf16 = has_bf16(decided_for) if precision == "auto" else precision == "bf16"
    on_gpu = bf16 and decided_for != "cpu"
    return DevicePlan(
        device_type=device_type,
        decided_for=decided_for,
        autocast_dtype=torch.bfloat16 if bf16 else None,
        cast_frozen_to_bf16=on_gpu,
        sample_in_bf16=on_gpu,
    )


def decides_as(device_type: str) -> str:
    """The type of device whose decisions are taken on a device of this type: another one only in tests."""
    return os.environ.get(PRETEND, device_type)


def accelerator_type() -> str:
    """The type of the device that stages run on: where tensors are, whatever decisions a test pretends."""
    cpu_alone = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")  # accelerate's own variable
    return "cuda" if torch.cuda.is_available() and not cpu_alone else "cpu"


def gpu_count() -> int:
    """GPUs that this process sees."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def has_bf16(device_type: str) -> bool:
    """Whether the hardware multiplies in bf16; emulation, which torch also calls support, does not count."""
    if os.environ.get(PRETEND) == device_type:
        return True
    if device_type == "cuda":
        return accelerator_type() == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", flags) is not None


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer by its type: torch's, GPT-2's transposed one, or bitsandbytes' quantised ones."""
    from transformers.pytorch_utils import Conv1D

    # bitsandbytes' 4- and 8-bit layers derive from nn.Linear.
    return isinstance(module, nn.Linear | Conv1D)


def cast_frozen_linears_to_bf16(model: nn.Module) -> None:
    """Cast the weights of a frozen model's linear layers to bf16, which halves their memory.

    For use under bf16 autocast alone, which casts them at each pass, so the results are the same to the bit. Scalar heads
    stay in fp32, and so does a head that is tied to the embedding.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for module in model.modules():
        if is_linear(module) and not _is_scalar_head(module) and id(module.weight) not in tables:
            module.to(torch.bfloat16)
    for parameter in model.parameters():
        if parameter.dtype != torch.bfloat16:  # a view of the file's mapping, which would keep all of it in memory
            parameter.data = parameter.data.clone()


def _is_scalar_head(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and module.out_features == 1

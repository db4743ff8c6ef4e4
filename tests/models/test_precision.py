"""Precision: decided in one place by the hardware, so that a CPU can take a GPU's decisions."""

from __future__ import annotations

import ast
import copy
from pathlib import Path
from typing import Any

from helpers.launches import ROOT
from pipeline.models.precision import PRETEND, cast_frozen_linears_to_bf16, device_plan, has_bf16, is_linear
from pipeline.models.reward_model import load_scalar_model, scalar_head

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


def test_a_cpu_takes_a_gpus_decisions_when_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PRETEND, "cuda")
    plan = device_plan("cpu", "auto")
    assert plan.device_type == "cpu", "tensors stay where they are"
    assert plan.decided_for == "cuda"
    assert plan.bf16
    assert plan.cast_frozen_to_bf16
    assert plan.sample_in_bf16
    assert not device_plan("cpu", "fp32").cast_frozen_to_bf16
    with plan.sampling():
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
        assert torch.is_autocast_enabled("cpu")


def test_a_cpu_of_its_own_samples_in_fp32_and_keeps_frozen_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PRETEND, raising=False)
    plan = device_plan("cpu", "bf16")
    assert plan.bf16
    assert not plan.cast_frozen_to_bf16
    with plan.sampling():
        assert not torch.is_autocast_enabled("cpu")
    assert device_plan("cpu", "fp32").autocast_dtype is None


def test_emulated_bf16_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch calls a GPU without bf16 units able, by emulation, unless it is told not to."""
    monkeypatch.delenv(PRETEND, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not has_bf16("cuda")
    assert not device_plan("cuda", "auto").bf16
    assert device_plan("cuda", "bf16").bf16, "who asks for it gets it"


@pytest.mark.parametrize(
    ("flags", "found"), [("avx2 fma", False), ("avx512_bf16", True), ("amx_bf16 amx_tile", True), ("", False)]
)
def test_a_cpus_flags_say_what_it_has(flags: str, found: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PRETEND, raising=False)
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: f"flags : {flags}")
    assert has_bf16("cpu") == found


def test_linear_layers_are_known_by_type() -> None:
    class Projection(nn.Linear):
        pass

    class NotLinearAtAll(nn.Module):
        pass

    assert is_linear(Projection(2, 2))
    assert is_linear(Conv1D(2, 2))
    assert not is_linear(NotLinearAtAll())
    assert not is_linear(nn.Embedding(2, 2))


def test_scalar_heads_and_embeddings_stay_in_fp32(tiny_lm: Any, tmp_path: Path) -> None:
    tiny_lm.save_pretrained(tmp_path)
    model = load_scalar_model(str(tmp_path))
    cast_frozen_linears_to_bf16(model)
    assert scalar_head(model).weight.dtype == torch.float32
    assert model.get_input_embeddings().weight.dtype == torch.float32
    assert torch.bfloat16 in {p.dtype for p in model.parameters()}
    causal = copy.deepcopy(tiny_lm)
    tied = causal.lm_head.weight is causal.get_input_embeddings().weight
    cast_frozen_linears_to_bf16(causal)
    assert (causal.lm_head.weight.dtype == torch.float32) == tied, "the embedding would lose its precision"


def test_nobody_else_asks_what_the_hardware_is() -> None:
    """Neither torch, nor transformers', nor accelerate's own questions, in any spelling of the import."""
    questions = {
        "backends", "cpuinfo", "device_count", "get_device_capability", "get_device_properties", "is_bf16_supported",
        "is_bf16_available", "is_cuda_available", "is_mps_available", "is_torch_bf16_gpu_available",
    }  # fmt: skip
    asking = []
    for path in sorted((ROOT / "pipeline").rglob("*.py")):
        if path.name == "precision.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            asks_torch = isinstance(node, ast.Attribute) and ast.unparse(node) in (
                "torch.cuda.is_available",
                "cuda.is_available",
                "torch.accelerator.is_available",
            )
            names = {getattr(node, "attr", None), getattr(node, "id", None)}
            names |= {alias.name for alias in node.names} if isinstance(node, ast.ImportFrom | ast.Import) else set()
            if asks_torch or names & questions:
                asking.append(f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}")
    assert not asking, f"{asking}: ask pipeline/models/precision.py"

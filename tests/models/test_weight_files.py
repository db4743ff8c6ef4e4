"""Weights rounded to bf16 on disk: each value once, scalar heads not at all, shards and configuration alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.models.loading import load_causal_lm
from pipeline.models.reward_model import load_scalar_model, scalar_head
from pipeline.models.weight_files import round_weights_to_bf16

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

IDS = torch.arange(5, 15)[None]


@pytest.mark.parametrize("shards", ["one file", "many files"])
def test_values_are_those_of_one_rounding(shards: str, tmp_path: Path, tiny_lm: Any) -> None:
    tiny_lm.save_pretrained(tmp_path, max_shard_size="20KB" if shards == "many files" else "1GB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards == "many files")
    expected = {name: tensor.bfloat16().float() for name, tensor in load_causal_lm(str(tmp_path)).state_dict().items()}
    for _ in range(2):  # a killed stage does it again
        round_weights_to_bf16(tmp_path)
        again = load_causal_lm(str(tmp_path))
        assert again.dtype == torch.float32
        assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert plain.dtype == plain.config.dtype == torch.bfloat16
    assert not list(tmp_path.glob("*.tmp"))
    index = tmp_path / "model.safetensors.index.json"
    if index.is_file():
        size = 0
        for file in tmp_path.glob("*.safetensors"):
            with safe_open(file, framework="pt") as stored:
                size += sum(stored.get_tensor(name).nbytes for name in stored.keys())  # noqa: SIM118
        assert json.loads(index.read_text())["metadata"]["total_size"] == size


def test_a_scalar_head_stays_in_fp32(tmp_path: Path, tiny_lm: Any) -> None:
    tiny_lm.save_pretrained(tmp_path)
    model: Any = load_scalar_model(str(tmp_path))
    model.config.pad_token_id = 0
    model.save_pretrained(tmp_path)
    round_weights_to_bf16(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as stored:
        types = {name: stored.get_tensor(name).dtype for name in stored.keys()}  # noqa: SIM118
    assert types.pop("score.weight") == torch.float32
    assert set(types.values()) == {torch.bfloat16}
    assert torch.equal(scalar_head(load_scalar_model(str(tmp_path))).weight, scalar_head(model).weight)
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path)(input_ids=IDS).logits.isfinite().all()

"""Networks in parts over processes: what is split, what is whole, and what a launch asks for."""

from __future__ import annotations

import json
from pathlib import Path

from helpers.launches import ROOT, launch
from helpers.shard_parts import make
from pipeline.errors import UserError
from pipeline.models.sharding import (
    ShardingOptions,
    clip_grad_norm,
    gathered,
    is_sharded,
    scalar_heads,
    sharded_as,
    take_options_of_launch,
    transformer_blocks,
    whole,
)

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

STYLES = ["llama", pytest.param("gpt2", marks=pytest.mark.full)]  # apart and tied: the embedding and the head


@pytest.mark.parametrize("style", ["llama", "gpt2"])
def test_blocks_are_the_models_own(style: str) -> None:
    model = make(style)
    layers = model.model.layers if style == "llama" else model.transformer.h
    assert transformer_blocks(model) == list(layers)
    assert transformer_blocks(nn.ModuleDict({"wrapped": model})) == list(layers)
    assert not is_sharded(model)


def test_blocks_of_a_network_without_names_are_its_longest_list() -> None:
    long = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    assert transformer_blocks(nn.ModuleDict({"short": nn.ModuleList([nn.Linear(2, 2)]), "long": long})) == list(long)
    assert transformer_blocks(nn.Linear(2, 1)) == []
    head = nn.Linear(2, 1)
    assert scalar_heads(nn.Sequential(nn.Linear(2, 2), head)) == [head]


def test_what_is_not_sharded_stays_as_it_is() -> None:
    model, reference = make("llama"), make("llama")
    with gathered(model):
        assert not is_sharded(model)
    for network in (model, reference):
        network(input_ids=torch.arange(4)[None], labels=torch.arange(4)[None]).loss.backward()
    expected = nn.utils.clip_grad_norm_(reference.parameters(), 0.1).item()
    assert clip_grad_norm(model.parameters(), 0.1) == pytest.approx(expected)
    for one, other in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    tensor = torch.ones(2)
    assert whole(tensor) is tensor
    assert sharded_as(tensor, torch.zeros(2)) is tensor


@pytest.mark.parametrize("style", STYLES)
def test_two_processes_hold_one_model_between_them(style: str, tmp_path: Path) -> None:
    launch(str(ROOT / "tests" / "helpers" / "shard_parts.py"), [style, str(tmp_path)], 2)
    for rank in range(2):
        part = json.loads((tmp_path / f"{rank}.json").read_text())
        assert all(part[name] for name in ("sharded", "round_trip", "plain_stays", "parts_again", "read", "rest"))
        assert part["logits"] < 1e-6, "whole, while processes make different numbers of passes"
        assert part["gradients"] < 1e-6, "the sum over processes"
        assert part["norm"] == pytest.approx(part["expected_norm"], rel=1e-5)
        assert part["clipped"] < 1e-6
        assert part["changed"] == []
        assert len(part["damaged"]) == 1, "a byte that reads back differently is seen, in every process"
    saved, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("saved", "plain"))
    assert saved.keys() == plain.keys(), "tied weights are written once"
    assert all(torch.equal(saved[name], plain[name]) for name in plain)
    if style == "gpt2":
        assert not any("lm_head" in name for name in saved)


# ---------------------------------------------------------------------------------------------- what a launch asks for


def asked(monkeypatch: pytest.MonkeyPatch, processes: int, **variables: str) -> ShardingOptions | None:
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "WORLD_SIZE": str(processes)}.items():
        monkeypatch.setenv(name, value)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return take_options_of_launch()


def test_options_are_those_of_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert take_options_of_launch() is None
    assert asked(monkeypatch, 2) == ShardingOptions()
    assert take_options_of_launch() is None, "taken out of the environment, where accelerate would shard too"
    assert asked(monkeypatch, 1) == ShardingOptions(), "one GPU may try what many will run"
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert take_options_of_launch() is None, "no launcher"
    assert asked(
        monkeypatch, 4, FSDP_RESHARD_AFTER_FORWARD="false", FSDP_OFFLOAD_PARAMS="true", PARALLELISM_CONFIG_DP_REPLICATE_SIZE="2"
    ) == ShardingOptions(reshard_after_forward=False, offload=True, replicas=2)  # fmt: skip


@pytest.mark.parametrize(
    ("variables", "complaint"),
    [
        ({"FSDP_VERSION": "1"}, "asks for FSDP1; say `fsdp_version: 2`"),
        ({"DP_REPLICATE_SIZE": "3"}, r"dp_replicate_size \(3\) does not divide the 4 processes"),
        ({"DP_REPLICATE_SIZE": "2", "DP_SHARD_SIZE": "4"}, r"\(2\) × dp_shard_size \(4\) are not the 4 processes"),
        ({"DP_SHARD_SIZE": "3"}, r"\(1\) × dp_shard_size \(3\) are not the 4 processes"),
        ({"TP_SIZE": "2"}, r"tp_size \(2\) is not supported"),
    ],
)
def test_what_cannot_be_sharded_so_is_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], complaint: str
) -> None:
    named = {n if n.startswith("FSDP") else f"PARALLELISM_CONFIG_{n}": value for n, value in variables.items()}
    with pytest.raises(UserError, match=complaint):
        asked(monkeypatch, 4, **named)


def test_replicas_are_read_from_an_accelerate_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By accelerate's own launcher: what its config file says arrives in the environment of the processes."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    text = (ROOT / "recipes" / "accelerate" / "cpu-fsdp2.yaml").read_text(encoding="utf-8")
    config = tmp_path / "replicated.yaml"
    config.write_text(
        text.replace("num_processes: 2", "num_processes: 4")
        + "parallelism_config:\n  parallelism_config_dp_replicate_size: 2\n  parallelism_config_dp_shard_size: 2\n"
    )
    arguments = launch_command_parser().parse_args(["--config_file", str(config), "script.py"])
    launched, _, _ = _validate_launch_command(arguments)
    exported = prepare_multi_gpu_env(launched)
    names = [name for name in exported if name.startswith(("ACCELERATE_USE", "FSDP", "PARALLELISM"))]
    assert asked(monkeypatch, 4, **{name: exported[name] for name in names}) == ShardingOptions(replicas=2)

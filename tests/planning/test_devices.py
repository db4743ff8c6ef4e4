"""Devices by the names that drivers give them, and what they may have drawn."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import UserError
from pipeline.planning.devices import device_called, devices, energy

import pytest


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L40", None),
        ("Tesla T4", "t4"),
        ("NVIDIA GB200", None),
    ],
)
def test_devices_by_their_drivers_names(name: str, key: str | None) -> None:
    found = device_called(name, devices())
    assert (found.name if found else None) == key


def test_energy_is_time_times_power() -> None:
    cluster = {"seconds": 3600, "processes": 8, "hardware": {"gpus": ["NVIDIA A100-SXM4-80GB"] * 8}}
    laptop = {"seconds": 1800, "processes": 2, "hardware": {"cpus": 2}}
    found = energy({"sft": cluster, "ppo": laptop}, None)
    assert found == {"kwh": {"sft": pytest.approx(3.2)}, "watts": {"sft": 3200.0}, "unknown": ["ppo"]}
    assert energy({"ppo": laptop}, 100.0)["kwh"] == {"ppo": pytest.approx(0.05)}


def test_devices_are_the_users_to_add(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("MyGPU: {memory_gib: 12, tflops: 30, watts: 200, usd_per_hour: 0.1, bf16: false}\n")
    assert devices(str(mine))["mygpu"].memory_gib == 12


@pytest.mark.parametrize(
    "text", ["MyGPU: {memory: 12}\n", "- a\n", "MyGPU: 3\n", "MyGPU: {memory_gib: x, tflops: 1, watts: 1, usd_per_hour: 1}\n",
             "MyGPU: {memory_gib: -1, tflops: 1, watts: 1, usd_per_hour: 1}\n", "a: [\n", ""],
)  # fmt: skip
def test_a_table_of_another_shape_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match=r"mine\.yaml: is no table of devices"):
        devices(str(tmp_path / "mine.yaml"))

"""What `rlhf init` does: look at the data, write the recipe, fit it to the hardware, check it."""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.commands.check_recipe import check_recipe
from pipeline.commands.init import KINDS
from pipeline.commands.look import Dataset, Lengths, lengths, look
from pipeline.commands.new_recipe import Draft, readme
from pipeline.data.encoding import ChatEncoder
from pipeline.data.sources import column_map
from pipeline.errors import UserError
from pipeline.models.loading import context_length, read_config
from pipeline.models.precision import gpu_count, has_bf16
from pipeline.models.tokenizers import assign_template, load_tokenizer
from pipeline.planning.devices import Device, device_called, devices
from pipeline.planning.memory import GIB
from pipeline.planning.plan import PlanOptions, plan
from pipeline.planning.table import print_plan

import torch
import yaml

CPU_TFLOPS = 0.05  # of a core, in fp32: a guess, of which the plan reaches the share that `--mfu` says


def begin(args: argparse.Namespace, ask: Callable[[str], str] | None) -> None:
    """Write, plan and check the recipe that the flags of `rlhf init` ask for.

    Args:
        ask: a question to the user; None where nobody is there.

    Raises:
        UserError: data or a model cannot be read, or the check refuses the recipe, which is then there to be corrected.
    """
    folder = Path(args.folder)
    device = _device(args)
    draft = _draft(args, ask)
    _check_stages(draft, args)
    folder.mkdir(parents=True, exist_ok=True)
    draft.write()
    report = _planned(draft, args.gpus, device)
    hardware = f"{args.gpus} × {device.name}, {device.memory_gib:g} GiB each"
    (folder / "README.md").write_text(readme(draft, hardware), encoding="utf-8")
    print(f"init: wrote {', '.join(f'{stage}.yaml' for stage in draft.stages)} and README.md to {folder}", flush=True)
    check_recipe(str(folder), None)
    print_plan(report)
    print(f"next: rlhf check {folder} --dry-run; rlhf run {folder}")


def _draft(args: argparse.Namespace, ask: Callable[[str], str] | None) -> Draft:
    """The data, read, and what follows from it."""
    columns = column_map(args.column) or {}
    data: dict[str, list[Dataset]] = {}
    for name, (kind, _) in KINDS.items():
        data[kind] = [look(dataset, kind, columns, ask) for dataset in getattr(args, name)]
    if not data["prompt"] and (data["ranking"] or args.reward):
        names = args.comparisons or args.demonstrations
        data["prompt"] = [look(dataset, "prompt", columns, ask) for dataset in names]
    context, encoder = _base(args.base)
    found = {
        kind: sum((lengths(dataset, encoder) for dataset in data[kind]), Lengths())
        for kind in ("demonstration", "ranking", "prompt")
        if data[kind]
    }
    for dataset in (dataset for datasets in data.values() for dataset in datasets):
        print(f"init: {dataset.describe()}", flush=True)
    return Draft(Path(args.folder), args.task or "", args.base, data, found, context=context, reward=args.reward)


def _base(base: str | None) -> tuple[int | None, ChatEncoder | None]:
    """The context and the encoder of the model to start from."""
    if base is None:
        return None, None
    config, tokenizer = read_config(base), load_tokenizer(base)
    assign_template(tokenizer)
    if tokenizer.eos_token_id is None:
        raise UserError(f"--base {base!r}: its tokenizer has no EOS token; responses could not end")
    return context_length(config), ChatEncoder(tokenizer)


def _check_stages(draft: Draft, args: argparse.Namespace) -> None:
    """Refuse data that no stage could begin with."""
    if draft.base is None and not args.documents:
        raise UserError("command line: without --base a model is trained from nothing, which needs --documents")
    if args.prompts and not (args.comparisons or args.reward):
        raise UserError("command line: --prompts are for PPO, which needs a reward: give --comparisons, or --reward")
    if draft.base is None and "ppo" in draft.stages and "sft" not in draft.stages:
        raise UserError("command line: PPO starts from a model that answers: give --demonstrations, or a --base")


# ------------------------------------------------------------------------------------------------ hardware


def _device(args: argparse.Namespace) -> Device:
    """The device that the flags name, or that this machine has.

    Raises:
        UserError: it is not in the table.
    """
    known = devices()
    if args.gpus < 1 or (args.memory is not None and not 0 < args.memory < 1e6):
        raise UserError("command line: --gpus and --memory must be above 0")
    if args.gpu not in (None, "cpu", *known):
        raise UserError(f"command line: --gpu {args.gpu!r} is not in the table; known: cpu, {', '.join(known)}")
    if args.gpu in known:
        device = known[args.gpu]
    elif args.gpu == "cpu" or (args.memory is None and not gpu_count()):
        return _cpu(args.memory)
    elif args.memory is not None:
        device = min(known.values(), key=lambda d: (abs(d.memory_gib - args.memory), d.tflops))
    else:
        name = torch.cuda.get_device_name(0)
        found = device_called(name, known)
        if found is None:
            raise UserError(f"command line: this machine's {name} is not in the table; say --gpu or --memory")
        device = found
    if args.memory is None or args.memory == device.memory_gib:
        return device
    name = f"{args.memory:g}-gib-as-{device.name}"
    return Device(name, args.memory, device.tflops, device.watts, device.usd_per_hour, device.bf16)


def _cpu(memory: float | None) -> Device:
    cores = os.cpu_count() or 1
    try:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    except (ValueError, OSError):
        there = 8.0
    return Device("cpu", round(memory or there, 1), cores * CPU_TFLOPS, 0, 0, has_bf16("cpu"))


@contextlib.contextmanager
def _devices_file(device: Device) -> Iterator[str]:
    """A device as a file of `rlhf plan --devices`."""
    values = {key: value for key, value in vars(device).items() if key != "name"}
    with tempfile.TemporaryDirectory(prefix="rlhf-init-") as folder:
        file = Path(folder) / "devices.yaml"
        file.write_text(yaml.safe_dump({device.name: values}), encoding="utf-8")
        yield str(file)


def _planned(draft: Draft, gpus: int, device: Device) -> dict[str, Any]:
    """The plan; where a stage does not fit, its recipe is written again with the switches by which it does."""
    with _devices_file(device) as file:
        options = PlanOptions(recipe=str(draft.folder), gpu=device.name, gpus=gpus, devices=file)
        report = plan(options)
        draft.changes = {name: stage["changes"] for name, stage in report["stages"].items() if stage["changes"]}
        if not draft.changes:
            return report
        draft.write()
        for name, changes in draft.changes.items():
            print(f"init: {name} takes {', '.join(changes)} so that it fits {device.memory_gib:g} GiB", flush=True)
        return plan(options)

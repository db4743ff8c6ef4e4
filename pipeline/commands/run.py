"""`rlhf run`: the stages of a recipe in order, each by `accelerate launch`; completion is judged by lineage alone."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

from pipeline.config.arguments import STAGES, read_recipe, recipe_stages
from pipeline.errors import UserError
from pipeline.training.lineage import read_lineage
from pipeline.training.stage import ERROR_FILE, TERMINAL, accelerate_config, cpu_cores

from rich.console import Console
from rich.table import Table

PIPELINE = Path(__file__).resolve().parent.parent


def run_recipe(args: argparse.Namespace) -> int:
    folder = Path(args.recipe)
    stages = recipe_stages(folder)
    for name in (args.first, args.last):
        if name is not None and name not in stages:
            raise UserError(f"{str(folder)!r} has no stage {name!r}; it has: {', '.join(stages)}")
    recipes = {name: read_recipe(folder / f"{name}.yaml", STAGES[name])[0] for name in stages}
    if args.labeler_folds and (args.reward_seeds or (args.last or stages[-1]) != "reward"):
        raise UserError(
            "--labeler-folds trains reward models to compare, none for PPO: say --to reward, and no --reward-seeds"
        )
    first = stages.index(args.first) if args.first else 0
    last = stages.index(args.last) if args.last else len(stages) - 1
    if first > last:
        raise UserError(f"--from {args.first} comes after --to {args.last}; the order is {', '.join(stages)}")
    outputs = {
        name: str(Path(args.output_dir) / name) if args.output_dir else str(recipes[name].get("output_dir", ""))
        for name in stages
    }
    moved = {_folder(recipes[name].get("output_dir")): outputs[name] for name in stages}
    for position, name in enumerate(stages[first : last + 1]):
        flags = stage_flags(name, recipes[name], outputs[name], moved, args)
        if args.parent and position == 0:
            flags += ["--parent", args.parent]
        for output, more in variants(name, outputs[name], recipes[name].get("seed", 0), args):
            again = [*flags, "--output_dir", output, *more]
            code = launch_stage(name, ["--config", str(folder / f"{name}.yaml"), *again], args)
            if code:
                return code
            lineage = read_lineage(Path(output))
            if lineage is None or lineage["status"] != "complete":
                print(f"error: {name} ended without a complete lineage.json in {output}", file=sys.stderr)
                return 1
        if name == "reward":
            compare_rewards([folder for folder, _ in variants(name, outputs[name], 0, args)])
    return 0


def variants(name: str, output: str, seed: int, args: argparse.Namespace) -> list[tuple[str, list[str]]]:
    """(folder, flags) of each time that a stage runs: the reward stage once a seed, or once a group of labelers."""
    if name == "reward" and args.labeler_folds:
        number = args.labeler_folds
        return [
            (f"{output}-fold-{fold}", ["--labeler_folds", str(number), "--labeler_fold", str(fold)])
            for fold in range(number)
        ]
    if name == "reward" and args.reward_seeds and args.reward_seeds > 1:
        first = seed if args.seed is None else args.seed
        others = range(1, args.reward_seeds)
        return [(output, []), *((f"{output}-seed-{n}", ["--seed", str(first + n)]) for n in others)]
    return [(output, [])]


def compare_rewards(folders: list[str]) -> None:
    """The figures of all reward models of a run, on the held-out prompts: own labelers' and those kept out (I22, table 11)."""
    if len(folders) < 2:
        return
    table = Table("reward model", "accuracy", "kept-out labelers", title="held-out prompts", title_justify="left")
    columns: list[list[float]] = [[], []]
    for folder in folders:
        lineage = read_lineage(Path(folder))
        assert lineage is not None
        figures = [lineage["metrics"].get(key) for key in ("accuracy", "held_out_labeler_accuracy")]
        for column, value in zip(columns, figures, strict=True):
            column += [] if value is None else [value]
        table.add_row(folder, *("—" if value is None else f"{value:.1%}" for value in figures))
    spread = [f"{statistics.mean(c):.1%} ± {statistics.stdev(c):.1%}" if len(c) > 1 else "—" for c in columns]
    table.add_row("mean ± standard deviation", *spread)
    Console(highlight=False).print(table)


def stage_flags(
    name: str, recipe: dict[str, Any], output: str, moved: dict[str, str], args: argparse.Namespace
) -> list[str]:
    """Flags that move a stage into the run's folder: its output, and parents that the same recipe writes."""
    flags = ["--output_dir", output]
    parent = _folder(recipe.get("parent"))
    if parent in moved and moved[parent] != parent:
        flags += ["--parent", moved[parent]]
    for key in ("reward", "score"):
        sources = recipe.get(key, [])
        if any(moved.get(_folder(source.model), source.model) != source.model for source in sources):
            here = [
                dataclasses.replace(s, model=moved.get(_folder(s.model), s.model)) if s.model else s for s in sources
            ]
            flags += [f"--{key}", *map(str, here)]
    if args.data_root:
        flags += ["--data_root", args.data_root]
    if args.seed is not None:
        flags += ["--seed", str(args.seed)]
    if args.quiet:
        flags += ["--quiet", "true"]
    return flags


def _folder(path: str | None) -> str:
    """One spelling of a path: `./runs/x/sft/` is `runs/x/sft`."""
    return os.path.normpath(path) if path else ""


def launch_stage(name: str, flags: list[str], args: argparse.Namespace) -> int:
    """One stage under `accelerate launch`; signals go to its whole process group. Returns the stage's true exit code."""
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    defaults = [
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]  # else it lists them as missing
    environment = dict(os.environ)
    processes = args.num_processes or 1
    import torch

    if args.accelerate:
        processes = args.num_processes or int(accelerate_config(args.accelerate)["num_processes"])
        command += ["--config_file", args.accelerate]
        if args.num_processes:
            command += ["--num_processes", str(processes)]
    elif torch.cuda.is_available():
        command += [*defaults, "--num_processes", str(processes), *(["--multi_gpu"] if processes > 1 else [])]
    else:
        environment["ACCELERATE_USE_CPU"] = "true"
        # `--cpu --num_processes 2` starts one process, silently; this starts two on gloo.
        command += [*defaults, *(["--multi_gpu"] if processes > 1 else ["--cpu"]), "--num_processes", str(processes)]
    if sys.stderr.isatty():
        environment[TERMINAL] = "1"  # the stage itself writes into a pipe
    # accelerate would set one thread a process.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cpu_cores() // processes)))
    with tempfile.TemporaryDirectory() as scratch:
        error_file = Path(scratch) / "error.json"
        environment[ERROR_FILE] = str(error_file)
        process = subprocess.Popen(
            [*command, str(PIPELINE / f"{name}.py"), *flags],
            env=environment,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        received: list[int] = []

        def forward(number: int, frame: types.FrameType | None) -> None:
            received.append(number)
            os.killpg(process.pid, number)

        before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            tail = _relay(process)
            process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if error_file.is_file():
            print(f"error: {name}: {json.loads(error_file.read_text())['message']}", file=sys.stderr)
            return 2
        if received:
            return 128 + received[0]
        if process.returncode:
            print(f"error: {name} failed (exit code {process.returncode}); its last words:\n{tail}", file=sys.stderr)
            return 1
    return 0


def _relay(process: subprocess.Popen[bytes]) -> str:
    """Pass the stage's own words on; keep the launcher's tracebacks for the case that nothing else explains a failure."""
    assert process.stderr is not None
    kept, hidden = b"", False
    while chunk := os.read(process.stderr.fileno(), 65536):
        kept = (kept + chunk)[-8000:]
        hidden = hidden or any(mark in kept for mark in (b"Traceback (most recent call last)", b"error: "))
        if not hidden:
            sys.stderr.buffer.write(chunk)
            sys.stderr.flush()
    return kept.decode(errors="replace")

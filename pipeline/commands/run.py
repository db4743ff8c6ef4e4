"""`rlhf run`: the stages of a recipe in order, each by `accelerate launch`; completion is judged by lineage alone."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import signal
import statistics
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

from pipeline.config.reader import read_recipe
from pipeline.config.stages import STAGES, recipe_stages
from pipeline.errors import UserError
from pipeline.training.launcher import RUN_COMMAND, accelerate_config, cpu_cores
from pipeline.training.lineage import read_lineage

from rich.console import Console
from rich.table import Table

PIPELINE = Path(__file__).resolve().parent.parent
Flags = dict[str, list[str]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe",
        help="folder with pretrain.yaml, sft.yaml, reward.yaml, ppo.yaml (any of them)",
    )
    parser.add_argument("--output-dir", help="folder of the run; default: what the recipe's stages say")
    parser.add_argument("--from", dest="first", metavar="STAGE", help="first stage to run")
    parser.add_argument("--to", dest="last", metavar="STAGE", help="last stage to run")
    parser.add_argument(
        "--num-processes", type=int, metavar="N", help="processes of each stage; default: one per visible GPU, else one"
    )
    parser.add_argument("--accelerate", metavar="FILE", help="an accelerate config, e.g. recipes/accelerate/fsdp2.yaml")
    parser.add_argument("--data-root", help="what relative dataset paths are relative to")
    parser.add_argument("--parent", help="model that the first stage starts from, instead of the recipe's")
    parser.add_argument("--seed", type=int, help="seed of every stage, instead of the recipe's")
    parser.add_argument("--reward-seeds", type=int, metavar="K", help="train K reward models, to <reward>-seed-1 …")
    parser.add_argument(
        "--labeler-folds", type=int, metavar="K", help="train K reward models, each without one group of labelers"
    )
    parser.add_argument("--quiet", action="store_true", help="summary lines and warnings only")


def run(args: argparse.Namespace) -> int:
    from pipeline.models.precision import gpu_count

    folder = Path(args.recipe)
    stages = recipe_stages(folder)
    chosen = chosen_stages(stages, args)
    recipes = {name: read_recipe(folder / f"{name}.yaml", STAGES[name]) for name in stages}
    outputs = {
        name: str(Path(args.output_dir) / name) if args.output_dir else str(recipes[name].get("output_dir", ""))
        for name in stages
    }
    moved = {_folder(recipes[name].get("output_dir")): outputs[name] for name in stages}
    command, environment = launch_command(args, gpu_count())
    for name in chosen:
        flags = {"config": [str(folder / f"{name}.yaml")], **stage_flags(recipes[name], moved, args)}
        if args.parent and name == chosen[0]:
            flags["parent"] = [args.parent]
        variants = stage_variants(name, outputs[name], recipes[name].get("seed", 0), args)
        for variant in variants:
            code = run_stage([*command, str(PIPELINE / f"{name}.py"), *as_flags(flags | variant)], environment, name)
            if code:
                return code
            (output,) = variant["output_dir"]
            lineage = read_lineage(Path(output))
            if lineage is None or lineage["status"] != "complete":
                print(f"error: {name} ended without a complete lineage.json in {output}", file=sys.stderr)
                return 1
        if name == "reward" and len(variants) > 1:
            print_rewards([variant["output_dir"][0] for variant in variants])
    return 0


def chosen_stages(stages: list[str], args: argparse.Namespace) -> list[str]:
    """The recipe's stages between --from and --to.

    Raises:
        UserError: one of them is none of the recipe's, or they come in the wrong order.
    """
    for name in (args.first, args.last):
        if name is not None and name not in stages:
            raise UserError(f"{str(args.recipe)!r} has no stage {name!r}; it has: {', '.join(stages)}")
    if args.labeler_folds and (args.reward_seeds or (args.last or stages[-1]) != "reward"):
        raise UserError(
            "--labeler-folds trains reward models to compare, none for PPO: say --to reward, and no --reward-seeds"
        )
    first = stages.index(args.first) if args.first else 0
    last = stages.index(args.last) if args.last else len(stages) - 1
    if first > last:
        raise UserError(f"--from {args.first} comes after --to {args.last}; the order is {', '.join(stages)}")
    return stages[first : last + 1]


# ---------------------------------------------------------------------------------------------- flags of a stage


def stage_flags(recipe: dict[str, Any], moved: dict[str, str], args: argparse.Namespace) -> Flags:
    """Flags that hand a stage what `rlhf run` was given, and parents that the same recipe writes elsewhere."""
    flags: Flags = {}
    for key in ("parent", "reference"):
        named = _folder(recipe.get(key))
        if named in moved and moved[named] != named:
            flags[key] = [moved[named]]
    for key in ("reward", "score"):
        sources = recipe.get(key, [])
        here = [
            dataclasses.replace(source, model=moved.get(_folder(source.model), source.model))
            if source.model
            else source
            for source in sources
        ]
        if here != sources:
            flags[key] = [str(source) for source in here]
    given = {"data_root": args.data_root, "seed": args.seed, "quiet": "true" if args.quiet else None}
    return flags | {key: [str(value)] for key, value in given.items() if value is not None}


def stage_variants(name: str, output: str, seed: int, args: argparse.Namespace) -> list[Flags]:
    """Flags of each time that a stage runs: the reward stage once per seed, or once per group of labelers."""
    if name == "reward" and args.labeler_folds:
        number = args.labeler_folds
        return [
            {"output_dir": [f"{output}-fold-{fold}"], "labeler_folds": [str(number)], "labeler_fold": [str(fold)]}
            for fold in range(number)
        ]
    if name == "reward" and args.reward_seeds and args.reward_seeds > 1:
        first = seed if args.seed is None else args.seed
        others = range(1, args.reward_seeds)
        return [
            {"output_dir": [output]},
            *({"output_dir": [f"{output}-seed-{n}"], "seed": [str(first + n)]} for n in others),
        ]
    return [{"output_dir": [output]}]


def as_flags(flags: Flags) -> list[str]:
    return [word for key, values in flags.items() for word in (f"--{key}", *values)]


def _folder(path: str | None) -> str:
    """One spelling of a path: `./runs/x/sft/` is `runs/x/sft`."""
    return os.path.normpath(path) if path else ""


# ---------------------------------------------------------------------------------------------- launching


def launch_command(args: argparse.Namespace, gpus: int) -> tuple[list[str], dict[str, str]]:
    """The command that launches a stage's script, and its environment; says how many GPUs it takes."""
    command = [sys.executable, "-m", "pipeline.training.launcher"]
    environment = {**os.environ, RUN_COMMAND: shlex.join(["rlhf", *sys.argv[1:]])}
    if args.num_processes is not None and args.num_processes < 1:
        raise UserError("command line: --num-processes must be above 0")
    if args.accelerate:
        processes = args.num_processes or int(accelerate_config(args.accelerate)["num_processes"])
        command += ["--config_file", args.accelerate]
        command += ["--num_processes", str(processes)] if args.num_processes else []
    else:
        processes = args.num_processes or max(gpus, 1)
        if gpus > 1 and args.num_processes is None:
            print(f"run: {gpus} GPUs are visible and each stage takes all of them; --num-processes N takes N")
        command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]  # else warned about
        command += ["--num_processes", str(processes)]
        if processes > 1:
            command += ["--multi_gpu", "--main_process_port", "0"]  # `--cpu --num_processes 2` starts one, silently
        elif not gpus:
            command += ["--cpu"]
        if not gpus:
            environment["ACCELERATE_USE_CPU"] = "true"
    # accelerate would set one thread per process.
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cpu_cores() // processes)))
    return command, environment


def run_stage(command: list[str], environment: dict[str, str], name: str) -> int:
    """One stage in a process group of its own, which gets our signals. Returns the stage's exit code."""
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    received: list[int] = []

    def forward(number: int, frame: types.FrameType | None) -> None:
        received.append(number)
        os.killpg(process.pid, number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        return 128 + received[0]
    if code not in (0, 2):  # 2: the stage has said why
        print(f"error: {name} failed (exit code {code})", file=sys.stderr)
        return 1
    return code


def print_rewards(folders: list[str]) -> None:
    """Accuracies of a run's reward models on the held-out prompts: of labelers trained on, and held out (InstructGPT, table 11)."""
    table = Table("reward model", "accuracy", "held-out labelers", title="held-out prompts", title_justify="left")
    columns: list[list[float]] = [[], []]
    for folder in folders:
        lineage = read_lineage(Path(folder))
        assert lineage is not None
        accuracies = [lineage["metrics"].get(key) for key in ("accuracy", "held_out_labeler_accuracy")]
        for column, value in zip(columns, accuracies, strict=True):
            column += [] if value is None else [value]
        table.add_row(folder, *("—" if value is None else f"{value:.1%}" for value in accuracies))
    spread = [f"{statistics.mean(c):.1%} ± {statistics.stdev(c):.1%}" if len(c) > 1 else "—" for c in columns]
    table.add_row("mean ± standard deviation", *spread)
    Console(highlight=False).print(table)

"""`rlhf check RECIPE --dry-run`: one real step of every stage, hand-offs included, with a shrunk model of the same class.

Each stage runs as it will run, from its own recipe, in a process of its own; only sizes and counts are small. Rows are the recipe's own
where they are here, else those of a data card, and the output says so. What a step cannot show is checked beside it: packages, trackers,
sharding, disk.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from pipeline.commands.stage_process import run_in_process, stage_body
from pipeline.commands.stand_ins import VOCABULARY, Parents, few_rows, own_config
from pipeline.commands.surroundings import check_surroundings, sharding_of
from pipeline.config.functions import import_from
from pipeline.config.reader import load
from pipeline.config.stages import FURTHER_ROWS, REWARD_PARENTS, STAGES, SUPPORT, recipe_stages
from pipeline.errors import UserError
from pipeline.models.shrink import narrow
from pipeline.training.lineage import read_lineage
from pipeline.training.stage import run_stage

import yaml
from rich.console import Console

SMALL: dict[str, Any] = {
    "max_steps": 1, "eval_steps": 1, "save_steps": 1, "logging_steps": 1, "examples_per_step": 2, "examples_per_device": 1,
    "eval_examples_per_device": 4, "warmup_steps": 0, "held_out_fraction": 0.3, "keep_checkpoints": 1, "threads": 1,
}  # fmt: skip
SMALL_PPO: dict[str, Any] = {
    "total_rollouts": 1, "prompts_per_rollout": 4, "minibatches": 2, "ppo_epochs": 1, "eval_rollouts": 1, "eval_prompts": 2,
    "save_steps": 1, "logging_steps": 1, "max_response_tokens": 8, "held_out_fraction": 0.3, "value_warmup_rollouts": 0, "ptx_ratio": 1.0,
    "keep_checkpoints": 1, "threads": 1, "engine": "local",  # a server would need the shrunk model
}  # fmt: skip


def dry_run(recipe: str, data_root: str | None = None, parent: str | None = None, accelerate: str | None = None) -> int:
    """Run it; prints a line per stage, warnings, and the first error.

    Raises:
        UserError: what would break the run, with the remedy.
    """
    import torch

    torch.set_num_threads(1)  # a forked child must not inherit a pool of threads
    started = time.perf_counter()
    folder = Path(recipe)
    console = Console(highlight=False)
    sharding = sharding_of(accelerate)
    with tempfile.TemporaryDirectory(prefix="rlhf-dry-run-") as scratch:
        parents = Parents(Path(scratch))
        for position, name in enumerate(recipe_stages(folder)):
            clock = time.perf_counter()
            flags = ["--config", str(folder / f"{name}.yaml")]
            flags += ["--data_root", data_root] if data_root else []
            flags += ["--parent", parent] if parent and position == 0 else []
            args: Any = load(STAGES[name], flags)
            warnings = check_surroundings(name, args, sharding)
            _step(name, shrunk_recipe(name, args, parents, warnings), folder, Path(scratch))
            parents.outputs[os.path.normpath(args.output_dir)] = Path(scratch) / name
            console.print(f"{name}: one step, saved and read again · {time.perf_counter() - clock:.0f} s", markup=False)
            for warning in warnings:
                console.print(f"[yellow]warning[/]: {name}: ", end="")
                console.print(warning, markup=False)
    console.print(f"{recipe}: dry run passed · {time.perf_counter() - started:.0f} s", markup=False)
    return 0


def _step(name: str, values: dict[str, Any], folder: Path, scratch: Path) -> None:
    """Run the shrunk recipe.

    Raises:
        UserError: the stage's own, with the name of the recipe that it was made from.
    """
    config = scratch / f"{name}.yaml"
    config.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    body = stage_body(name)

    def work() -> None:
        import_from(folder)
        run_stage(name, STAGES[name], body, ["--config", str(config)])

    try:
        run_in_process(name, work, scratch)
    except UserError as error:
        message = str(error).removeprefix(f"{name}: ").replace(str(config), f"{folder / name}.yaml")
        raise UserError(f"{name}: {message}") from error
    assert read_lineage(scratch / name) is not None, f"{name} left no lineage"


def shrunk_recipe(name: str, args: Any, parents: Parents, warnings: list[str]) -> dict[str, Any]:
    """The stage's recipe with small numbers, its inputs those of the dry run."""
    values = dataclasses.asdict(args)
    values |= SMALL_PPO if name == "ppo" else SMALL
    values |= {"output_dir": str(parents.scratch / name), "report_to": ["none"], "quiet": True, "data_root": "."}
    for key, kind in {"datasets": SUPPORT[name].rows, **FURTHER_ROWS}.items():
        if values.get(key):
            values[key] = [few_rows(entry, kind, args.data_root, warnings) for entry in getattr(args, key)]
    if args.parent:
        values["parent"] = parents.folder(args.parent, SUPPORT[name].parents, warnings)
        if values.get("reference"):
            values["reference"] = parents.folder(args.reference, SUPPORT[name].parents, warnings)
    elif name == "pretrain":
        small = narrow(own_config(args))
        values["model_config"] = {key: getattr(small, key, None) for key in args.model_config}
        if args.train_tokenizer:
            values["train_tokenizer"] = {"vocab_size": min(args.train_tokenizer.vocab_size, VOCABULARY)}
        values["block_tokens"] = min(args.block_tokens, 128)
    for key in ("reward", "score"):
        for source in values.get(key) or []:
            if source["model"]:
                source["model"] = parents.folder(source["model"], REWARD_PARENTS, warnings, scalar=True)
    if values.get("held_out_labelers") or values.get("labeler_weights"):
        # The first rows may not hold every labeler that the whole file does; names are checked where the file is read.
        values["held_out_labelers"], values["labeler_weights"] = [], {}
    values["labeler_folds"] = None
    if values.get("unit_variance_samples"):
        values["unit_variance_samples"] = 16
    known = {field.name for field in dataclasses.fields(args)}
    return {key: value for key, value in values.items() if value is not None and key in known}

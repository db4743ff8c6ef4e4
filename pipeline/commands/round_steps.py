"""The two steps of a round: answers to label, and training on the labels. Each goes on where a kill left it."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.commands.run import PIPELINE, Flags, as_flags, launch_command, run_stage
from pipeline.commands.sample import SampleOptions, sample_file
from pipeline.config.rewards import RewardSource
from pipeline.config.stages import SUPPORT
from pipeline.data.entries import DatasetEntry
from pipeline.data.hashing import sha256_file
from pipeline.data.records import Record
from pipeline.errors import UserError
from pipeline.labeling.export import FILES, export
from pipeline.labeling.project import open_existing
from pipeline.labeling.settings import FILE, GUIDELINES, read_settings
from pipeline.labeling.statistics import project_statistics
from pipeline.labeling.store import DATABASE
from pipeline.models.precision import gpu_count
from pipeline.rounds.folder import RoundFolder, RoundsRun, record_recipe
from pipeline.rounds.labels import Labels
from pipeline.rounds.ledger import Ledger
from pipeline.training.lock import locked

import yaml

PROMPTS, ANSWERS = "prompts.jsonl", "answers.jsonl"


@dataclass(frozen=True)
class TrainOptions:
    """The flags of `rlhf round train`."""

    partial: bool = False
    num_processes: int | None = None
    accelerate: str | None = None
    quiet: bool = False


@contextlib.contextmanager
def _alone(run: RoundsRun) -> Iterator[None]:
    run.path.mkdir(parents=True, exist_ok=True)
    with locked(run.path):
        yield


# ------------------------------------------------------------------------------------------------ new


def new_round(run: RoundsRun) -> RoundFolder:
    """Begin the next round: unseen prompts, answers of the newest policies, a labeling folder.

    Raises:
        UserError: the last round waits for labels, no prompts are left, or a model changed.
    """
    with _alone(run):
        folder = run.round(run.trained + 1)
        if folder.labeling.is_dir():
            raise UserError(
                f"round {folder.number} waits for labels (rlhf label {folder.labeling}), then `rlhf round train {run.path}`",
                file=folder.path,
            )
        made_of = run.check_models(folder.number)
        if not (run.path / "rounds.json").exists():
            record_recipe(run)
        folder.write(round=folder.number, recipe=dataclasses.asdict(run.args), **made_of)
        if not (folder.path / PROMPTS).exists():
            chosen = Ledger(run.path).take(folder.number, run.candidates(), run.args.prompts_per_round)
            _write_prompts(folder.path / PROMPTS, chosen)
            if len(chosen) < run.args.prompts_per_round:
                print(f"round {folder.number}: only {len(chosen):,} unseen prompts were left")
        ppo = run.stage_recipe("ppo")
        sample_file(
            SampleOptions(
                prompts=str(folder.path / PROMPTS),
                output=str(folder.path / ANSWERS),
                models=[model["path"] for model in made_of["policies"]],
                temperatures=[run.args.temperature],
                number=run.args.answers,
                max_response_tokens=ppo["max_response_tokens"],
                stop_tokens=ppo["stop_tokens"],
                seed=run.args.seed + folder.number,
            )
        )
        _make_labeling_folder(run, folder)
    print(f"round {folder.number}: label with `rlhf label {folder.labeling}`, then `rlhf round train {run.path}`")
    return folder


def _write_prompts(path: Path, records: list[Record]) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        for record in records:
            own = {"id": record["id"]} if record.get("id") is not None else {}
            file.write(json.dumps({"prompt": record["prompt"], **own}, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _make_labeling_folder(run: RoundsRun, folder: RoundFolder) -> None:
    """The whole folder at once, by rename: whoever serves it never sees half of it."""
    temporary = folder.path / "labeling.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    shutil.copyfile(folder.path / ANSWERS, temporary / ANSWERS)
    settings = {"title": f"Round {folder.number}", **run.args.label}
    (temporary / FILE).write_text(yaml.safe_dump(settings, allow_unicode=True, sort_keys=False), encoding="utf-8")
    read_settings(temporary)  # its errors
    if run.args.guidelines:
        if not Path(run.args.guidelines).is_file():
            raise UserError(f"guidelines: {run.args.guidelines!r} does not exist", file=run.recipe / "round.yaml")
        shutil.copyfile(run.args.guidelines, temporary / GUIDELINES)
    os.replace(temporary, folder.labeling)


# ------------------------------------------------------------------------------------------------ train


def train_round(run: RoundsRun, options: TrainOptions) -> int:
    """Train the round's reward model on the labels of all rounds, and its policy on that; returns an exit code.

    Raises:
        UserError: no round waits for it, labels are missing or another round's, or a model changed.
    """
    with _alone(run):
        number = run.trained + 1
        folder = run.round(number)
        if not folder.labeling.is_dir():
            raise UserError(f"no round waits for training; begin round {number} with `rlhf round new`", file=run.path)
        run.check_models(number)
        _freeze_labels(run, folder, options.partial)
        starts = run.starts(number)
        kinds = {part: SUPPORT["reward" if part == "reward" else "ppo"].parents for part in starts}
        folder.write(starts={part: model.identified(kinds[part]) for part, model in starts.items()})
        command, environment = launch_command(
            argparse.Namespace(num_processes=options.num_processes, accelerate=options.accelerate), gpu_count()
        )
        for stage, flags in (("reward", reward_flags(run, number)), ("ppo", ppo_flags(run, number))):
            quiet: Flags = {"quiet": ["true"]} if options.quiet else {}
            flags = {"config": [str(run.recipe / f"{stage}.yaml")], **flags, **quiet}
            code = run_stage([*command, str(PIPELINE / f"{stage}.py"), *as_flags(flags)], environment, stage)
            if code:
                return code
            if not folder.finished(stage):
                raise UserError(f"{stage} ended without a complete lineage.json", file=folder.path / stage)
    print(f"round {number}: trained; `rlhf round report {run.path}` measures it")
    return 0


def _freeze_labels(run: RoundsRun, folder: RoundFolder, partial: bool) -> None:
    """Export the round's labels once; from then on training reads that file, and a later start the same one.

    Raises:
        UserError: labels are missing, are another round's, or the frozen ones changed.
    """
    recorded = folder.read().get("labels")
    if recorded is not None:
        if not folder.labels.is_file() or sha256_file(folder.labels) != recorded["sha256"]:
            raise UserError("changed after the round's training began; restore it", file=folder.labels)
        return
    if not (folder.labeling / DATABASE).exists():
        raise UserError(f"holds no labels yet; `rlhf label {folder.labeling}`", file=folder.labeling)
    project = open_existing(folder.labeling)
    with contextlib.closing(project.store) as store:
        with store.reader() as connection:
            state = project_statistics(connection, store.now(), project.settings.overlap)
        if state.complete < state.items and not partial:
            raise UserError(
                f"{state.items - state.complete:,} of {state.items:,} items lack labels; go on labeling, or say --partial",
                file=folder.labeling,
            )
        export(store, project.settings, folder.labels.parent)
    if not folder.labels.exists():
        raise UserError("holds no rankings yet; label some items", file=folder.labeling)
    labels = Labels.read(folder.labels)
    try:
        Ledger(run.path).check_labels(folder.labels, labels.records, folder.number)
    except UserError:
        for name in FILES.values():
            (folder.labels.parent / name).unlink(missing_ok=True)
        raise
    folder.write(labels={"rankings": len(labels.records), "sha256": sha256_file(folder.labels)})
    print(
        f"round {folder.number}: {len(labels.records):,} rankings of {state.complete:,} items by {len(labels.labelers)} labelers"
    )


def reward_flags(run: RoundsRun, number: int) -> Flags:
    """Flags of the reward stage: its start, and the labels of the rounds in the window, each with its weight."""
    recipe = run.stage_recipe("reward")
    oldest = 1 if run.args.window is None else max(1, number - run.args.window + 1)
    root = Path(recipe["data_root"])
    entries = [
        DatasetEntry(
            path=os.path.relpath(run.round(n).labels, root),
            name=f"round-{n}",
            weight=run.args.weight_of(number - n),
        )
        for n in range(number, oldest - 1, -1)
    ]
    if run.args.earlier_comparisons:
        if bool(run.args.weights) != all(entry.weight is not None for entry in recipe["datasets"]):
            raise UserError(
                "weights: give rounds and the datasets of reward.yaml a weight, or neither; or say earlier_comparisons: false",
                file=run.recipe / "round.yaml",
            )
        entries += recipe["datasets"]
    return {
        "parent": [run.starts(number)["reward"].path],
        "output_dir": [str(run.round(number).path / "reward")],
        "datasets": [_as_flag(entry) for entry in entries],
    }


def _as_flag(entry: DatasetEntry) -> str:
    """An entry as YAML on one line."""
    return json.dumps({key: value for key, value in dataclasses.asdict(entry).items() if value is not None})


def ppo_flags(run: RoundsRun, number: int) -> Flags:
    """Flags of PPO: its start, its reference, and the round's reward model in the place of ppo.yaml's."""
    starts = run.starts(number)
    sources: list[RewardSource] = run.stage_recipe("ppo")["reward"]
    models = [source for source in sources if source.model is not None]
    if len(models) != 1:
        raise UserError(
            f"reward: names {len(models)} reward models; each round puts its own in the place of one",
            file=run.recipe / "ppo.yaml",
        )
    own = str(run.round(number).path / "reward")
    reward = [dataclasses.replace(source, model=own) if source.model else source for source in sources]
    flags: Flags = {
        "parent": [starts["policy"].path],
        "output_dir": [str(run.round(number).path / "ppo")],
        "reward": [str(source) for source in reward],
    }
    if starts["reference"].path != starts["policy"].path:
        flags["reference"] = [starts["reference"].path]
    return flags

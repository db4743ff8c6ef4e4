"""Folders of a run of rounds: what each round started from, and how far it is. Finished stages are known by their lineage."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.reader import read_recipe
from pipeline.config.round import RoundArguments
from pipeline.config.stages import REWARD_PARENTS, STAGES, SUPPORT
from pipeline.data.records import Record
from pipeline.data.sources import read_sources
from pipeline.data.splits import split_records
from pipeline.errors import UserError
from pipeline.rounds.ledger import prompt_key
from pipeline.training.json_files import NotAnObject, read_json_object, write_json
from pipeline.training.lineage import COMPLETE, read_lineage, verify_parent

RUN, ROUND = "rounds.json", "round.json"
FILES = ("round.yaml", "reward.yaml", "ppo.yaml")


@dataclass(frozen=True)
class Model:
    """A model that rounds use. name: `sft`, `start` (before the first round) or `round-N`."""

    name: str
    path: str

    def identified(self, stages: tuple[str, ...]) -> dict[str, Any]:
        """The model with its weights' hash, as round.json records it.

        Raises:
            UserError: it is not there, not finished, or changed since its stage finished.
        """
        return {"name": self.name, "path": self.path, "weights_sha256": verify_parent(self.path, stages).weights_sha256}


@dataclass(frozen=True)
class RoundFolder:
    """One round: `round.json`, prompts, answers, the labeling folder, its frozen labels, reward model and policy."""

    number: int
    path: Path

    @property
    def labeling(self) -> Path:
        return self.path / "labeling"

    @property
    def labels(self) -> Path:
        """Rankings as they were when training began; later labels do not change them."""
        return self.path / "labels" / "rankings.jsonl"

    def finished(self, stage: str) -> bool:
        lineage = read_lineage(self.path / stage)
        return lineage is not None and lineage.get("status") == COMPLETE

    def read(self) -> dict[str, Any]:
        """What round.json says; empty before the round began.

        Raises:
            UserError: it is damaged.
        """
        path = self.path / ROUND
        if not path.exists():
            return {}
        try:
            return read_json_object(path)
        except NotAnObject as error:
            raise UserError(f"{error}; restore it, or remove the round's folder", file=path) from error

    def write(self, **values: Any) -> None:
        """Add to round.json."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / ROUND, {**self.read(), **values})


@dataclass(frozen=True)
class RoundsRun:
    """A run of rounds and its recipe folder."""

    path: Path
    recipe: Path
    args: RoundArguments

    def round(self, number: int) -> RoundFolder:
        return RoundFolder(number, self.path / f"round-{number}")

    @property
    def trained(self) -> int:
        """Rounds from the first on whose reward model and policy are finished."""
        number = 0
        while all(self.round(number + 1).finished(stage) for stage in ("reward", "ppo")):
            number += 1
        return number

    def policies(self, rounds: int) -> list[Model]:
        """SFT, the policy before the first round where it is another, and those of the first `rounds` rounds."""
        start = [Model("start", self.args.policy)] if self.args.policy else []
        later = [Model(f"round-{n}", str(self.round(n).path / "ppo")) for n in range(1, rounds + 1)]
        return [Model("sft", self.args.sft), *start, *later]

    def reward_before(self, number: int) -> Model | None:
        """The reward model that round `number` began with; never the one that it trained."""
        if number > 1:
            return Model(f"round-{number - 1}", str(self.round(number - 1).path / "reward"))
        return Model("start", self.args.reward) if self.args.reward else None

    def recorded_reward_before(self, number: int) -> Model | None:
        """The same, known to be the very model that the round recorded when it began.

        Raises:
            UserError: another model lies there now.
        """
        model = self.reward_before(number)
        recorded = self.round(number).read().get("reward_before")
        if model is None:
            return None
        if recorded is not None and recorded["weights_sha256"] != model.identified(REWARD_PARENTS)["weights_sha256"]:
            raise UserError(f"is another reward model than the one that round {number} began with", file=model.path)
        return model

    def stage_recipe(self, stage: str) -> dict[str, Any]:
        """The values of reward.yaml or ppo.yaml, with the stage's defaults for what they leave out."""
        defaults = {
            field.name: field.default_factory() if callable(field.default_factory) else field.default
            for field in dataclasses.fields(STAGES[stage])
        }
        return {**defaults, **read_recipe(self.recipe / f"{stage}.yaml", STAGES[stage])}

    def candidates(self) -> list[Record]:
        """Prompts that rounds may be given, mixed: never those that PPO's evaluations hold out.

        Their order is another hash than the one that splits decide by: else the first rounds' labels would all be held out.
        """
        ppo = self.stage_recipe("ppo")
        sources = read_sources(self.args.prompts or ppo["datasets"], "prompt", ppo["data_root"], ppo["data_cache"])
        records = [record for source in sources for record in source.records]
        fraction = 0.0 if ppo["eval_datasets"] else ppo["held_out_fraction"]
        return sorted(split_records(records, fraction)[0], key=prompt_key)

    def starts(self, number: int) -> dict[str, Model]:
        """What the reward model, the policy and the reference of a round start from."""
        policies = self.policies(number - 1)
        sft, last = policies[0], policies[-1]
        reward = self.reward_before(number)
        return {
            "reward": sft if self.args.reward_from == "sft" or reward is None else reward,
            "policy": sft if self.args.policy_from == "sft" else last,
            "reference": sft if self.args.reference == "sft" else last,
        }

    def check_models(self, number: int) -> dict[str, Any]:
        """What a round is made of, with the weights' hashes: the policies that answer, newest first, and the reward before.

        Raises:
            UserError: a model changed, or is another than the one that the round began with.
        """
        policies = self.policies(number - 1)[::-1][: 1 + self.args.older_policies]
        reward = self.reward_before(number)
        made_of = {
            "policies": [model.identified(SUPPORT["ppo"].parents) for model in policies],
            "reward_before": None if reward is None else reward.identified(REWARD_PARENTS),
        }
        recorded = self.round(number).read()
        for before, now in zip(_models(recorded), _models(made_of), strict=False):
            if before["weights_sha256"] != now["weights_sha256"]:
                raise UserError(
                    f"is another model than the one that round {number} began with ({before['path']}); put that one back",
                    file=now["path"],
                )
        return made_of


def _models(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [*record.get("policies", []), *([record["reward_before"]] if record.get("reward_before") else [])]


def open_rounds(path: Path, recipe: str | None = None) -> RoundsRun:
    """A run of rounds, by the recipe that it was begun with or by `recipe`.

    Raises:
        UserError: no recipe is known, or it lacks a file.
    """
    known = path / RUN
    if recipe is None:
        if not known.is_file():
            raise UserError("is no run of rounds; begin one with `rlhf round new RUN --recipe DIR`", file=path)
        try:
            recipe = str(read_json_object(known)["recipe"])
        except (NotAnObject, KeyError):
            raise UserError("is damaged; say --recipe DIR", file=known) from None
    folder = Path(recipe)
    for name in FILES:
        if not (folder / name).is_file():
            raise UserError(f"holds no {name}; a recipe of rounds has {', '.join(FILES)}", file=folder)
    try:
        args = RoundArguments(**read_recipe(folder / "round.yaml", RoundArguments))
    except ValueError as error:
        raise UserError(str(error), file=folder / "round.yaml") from error
    return RoundsRun(path, folder, args)


def record_recipe(run: RoundsRun) -> None:
    run.path.mkdir(parents=True, exist_ok=True)
    write_json(run.path / RUN, {"recipe": str(run.recipe)})

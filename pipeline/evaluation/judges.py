"""Every judge of the answers: the reward that PPO trained on, reward models, Python functions.

One meaning each: `reward` is what PPO trains on, the weighted sum of all parts after the missing-EOS rule;
`reward_model` (or a folder's name) is a model's own centred score, before weights and rule; any other name is a judge's.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.algorithms.ppo import missing_eos_scores
from pipeline.config.functions import ROOT, RewardFunction, import_from, import_function
from pipeline.config.rewards import RewardSource
from pipeline.errors import UserError, shorten
from pipeline.evaluation.answers import ModelAnswers
from pipeline.evaluation.run_folder import RunFolder
from pipeline.models.precision import accelerator_type
from pipeline.rollout.rewards import (
    DISAGREEMENT,
    Scorer,
    ScoringSetup,
    build_scorer,
    call_function,
    check_finite,
    judge_labels,
)
from pipeline.training.identity import tokenizer_hashes, weights_sha256

import torch
from torch import Tensor

REWARD, REWARD_MODEL = "reward", "reward_model"
Scores = dict[str, list[float]]
"""Each judge's score of every answer, by the judge's name."""


@dataclass(frozen=True)
class TrainingReward:
    """The reward of a PPO recipe."""

    sources: list[RewardSource]
    ensemble: str = "sum"
    penalty: float = 1.0
    missing_eos: str = "none"
    missing_eos_score: float = 0.0

    def after_rule(self, scores: Tensor, finished: Sequence[bool]) -> Tensor:
        """(answers,) scores after the missing-EOS rule."""
        return missing_eos_scores(scores, torch.tensor(finished), self.missing_eos, self.missing_eos_score)


@dataclass
class JudgePanel:
    """Asks every judge. A judge that fails is a note, never a loss.

    reward: what PPO trains on; None without PPO, or where it cannot be computed here.
    models: folders of reward models, functions: Python functions; by label.
    independent: labels of those that training never saw.
    """

    run: RunFolder
    reward: TrainingReward | None
    models: dict[str, str]
    functions: dict[str, RewardFunction]
    independent: list[str]
    scorers: dict[Any, Scorer] = field(default_factory=dict)  # by name and the answers' tokenizer
    failed: set[str] = field(default_factory=set)

    def scores(self, answers: ModelAnswers) -> Scores:
        """Every judge's score of every answer."""
        scores = self._reward_scores(answers)
        for label, path in self.models.items():
            try:
                scorer = self._scorer(label, [RewardSource(model=path)], answers)
                scores[label] = scorer(answers.answers).scores.tolist()
            except UserError as error:
                self.run.note(f"{label}: does not judge here: {error}")
        for label, function in self.functions.items():
            if label not in self.failed and (verdicts := self._ask(label, function, answers)) is not None:
                scores[label] = verdicts
        return scores

    def _reward_scores(self, answers: ModelAnswers) -> Scores:
        """`reward`, and its parts' own scores."""
        if self.reward is None:
            return {}
        try:
            scored = self._scorer(REWARD, self.reward.sources, answers)(answers.answers)
        except UserError as error:
            self.run.note(f"{REWARD}: does not judge here: {error}")
            return {}
        parts = {name: values.tolist() for name, values in scored.parts.items() if name != DISAGREEMENT}
        if len(parts) == 1 and self.reward.sources[0].function is not None:
            parts = {}  # a single function is the reward itself
        own = {_part_label(name): values for name, values in parts.items()}
        return {REWARD: self.reward.after_rule(scored.scores, answers.finished).tolist(), **own}

    def _scorer(self, name: str, sources: list[RewardSource], answers: ModelAnswers) -> Scorer:
        key = (name, tokenizer_hashes(answers.encoder.tokenizer), tuple(answers.stop_ids))
        if key not in self.scorers:
            setup = ScoringSetup(answers.encoder, torch.device(accelerator_type()), answers.stop_ids)
            if name == REWARD and self.reward is not None:
                self.scorers[key] = build_scorer(sources, setup, self.reward.ensemble, self.reward.penalty)
            else:
                self.scorers[key] = build_scorer(sources, setup)
        return self.scorers[key]

    def _ask(self, label: str, function: RewardFunction, answers: ModelAnswers) -> list[float] | None:
        """A function's scores; None, with a note, if it raises or gives no finite numbers. It is not asked again."""
        try:
            given = answers.answers
            verdicts = call_function(function, label, given.prompts, given.texts, given.rows)
            check_finite(verdicts, label, given)
            return verdicts
        except UserError as error:
            reason = str(error)
        except SystemExit as error:  # the judge's own code, whatever it does
            reason = f"it ended with sys.exit({shorten(error.code)})"
        self.failed.add(label)
        self.run.note(f"judge {label}: left out: {reason}")
        return None


def _part_label(name: str) -> str:
    """`reward_model`, the name of a reward model's folder, or `module.function`."""
    return Path(name).name if "/" in name else name.replace(":", ".")


def build_panel(run: RunFolder, judges: Sequence[str], recipe_dir: str | None = None) -> JudgePanel:
    """The judges of a run's recipe, and those that the user names.

    The user's own (`judges`: `module:function`, or a reward model's folder) are imported from wherever Python finds
    them. Functions that only the run's folder names are imported from trusted folders alone.
    """
    trusted = trusted_folders(run.path, recipe_dir)
    import_from(*trusted)
    given = [judge for judge in judges if not _is_folder(judge)]
    named = [str(name) for name in run.recipe("ppo").get("judges") or []]
    labels = judge_labels(list(dict.fromkeys([*given, *named])))
    functions: dict[str, RewardFunction] = {}
    for label, name in labels.items():
        try:
            functions[label] = import_function(name) if name in given else import_trusted(name, trusted)
        except (UserError, SystemExit) as error:
            run.note(f"judge {name}: left out: {error}")
    reward = _training_reward(run, trusted, given)
    models = _judge_models(run, [judge for judge in judges if _is_folder(judge)])
    trained_on = {source.function for source in reward.sources} if reward else set()
    independent = [*models, *(label for label in functions if labels[label] not in trained_on)]
    if reward is None and "reward" in run.lineages:
        models = {REWARD_MODEL: str(run.path / "reward"), **models}
    return JudgePanel(run, reward, models, functions, independent)


def _judge_models(run: RunFolder, folders: Sequence[str]) -> dict[str, str]:
    """Folders of the user's reward models by label; one that PPO trained on is no further judge."""
    parents = {parent["weights_sha256"] for parent in run.lineages.get("ppo", {}).get("parents", [])}
    models: dict[str, str] = {}
    for folder in folders:
        try:
            known = Path(folder).is_dir() and weights_sha256(Path(folder)) in parents
        except UserError as error:
            run.note(f"judge {folder}: left out: {error}")
            continue
        if known:
            run.note(f"judge {folder}: is the reward model that PPO trained on, which is asked as {REWARD_MODEL!r}")
            continue
        name = Path(folder).name
        if name in (REWARD, REWARD_MODEL, *models):
            name = "/".join(Path(folder).resolve().parts[-2:])
        models[name] = folder
    return models


def _is_folder(judge: str) -> bool:
    return Path(judge).is_dir() or ":" not in judge


def trusted_folders(run: Path, recipe_dir: str | None = None) -> list[Path]:
    """Folders whose code a run's folder may name: `--recipe`, the current folder (unless the run holds it), recipes that ship.

    Raises:
        UserError: `recipe_dir` is no folder.
    """
    if recipe_dir is not None and not Path(recipe_dir).is_dir():
        raise UserError(f"--recipe {recipe_dir!r} is no folder; name the one that holds the judges' Python files")
    here = [] if Path.cwd().resolve().is_relative_to(run.resolve()) else [Path.cwd()]
    shipped = sorted({file.parent for file in (ROOT / "recipes").glob("*/*.py")})
    return [*([Path(recipe_dir)] if recipe_dir else []), *here, *shipped]


def import_trusted(name: str, folders: Sequence[Path]) -> RewardFunction:
    """`module:function`, if the file that Python would import lies in one of the folders, which must be importable.

    Raises:
        UserError: it lies elsewhere, or cannot be imported.
    """
    top = name.partition(":")[0].partition(".")[0]
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        spec = None
    origin = Path(spec.origin).resolve() if spec and spec.origin and spec.has_location else None
    places = {folder.resolve() for folder in folders}
    if origin is None or not places & {origin.parent, origin.parent.parent if origin.name == "__init__.py" else None}:
        raise UserError(
            f"only the run's folder names this code, and {top!r} is neither in the current folder nor in a recipe that "
            f"ships; if you trust it, say --recipe DIR (the folder that holds {top}.py) or --judge {name}"
        )
    return import_function(name)


def _training_reward(run: RunFolder, trusted: Sequence[Path], given: Sequence[str]) -> TrainingReward | None:
    """The reward that the run's PPO trained on; None, with a note, where its code is missing or outside the trusted folders."""
    recipe = run.recipe("ppo")
    if not recipe:
        return None
    try:
        sources = [RewardSource(**source) for source in recipe["reward"]]
        for source in sources:
            if source.function is not None and source.function not in given:
                import_trusted(source.function, trusted)
    except (UserError, TypeError, KeyError, ValueError) as error:
        run.note(f"{REWARD}: the reward that PPO trained on cannot be computed here: {error}")
        return None
    return TrainingReward(
        sources=[_here(source, run) for source in sources],
        ensemble=recipe.get("ensemble", "sum"),
        penalty=recipe.get("ensemble_penalty", 1.0),
        missing_eos=recipe.get("missing_eos", "none"),
        missing_eos_score=recipe.get("missing_eos_score", 0.0),
    )


def _here(source: RewardSource, run: RunFolder) -> RewardSource:
    """The run's own reward folder, if that is what the recipe's path was: a run may have been moved."""
    folder = run.path / "reward"
    if source.model is None or "reward" not in run.lineages:
        return source
    wanted = {p["weights_sha256"] for p in run.lineages["ppo"]["parents"] if p.get("path") == source.model}
    known = {run.lineages["reward"]["weights_sha256"], weights_sha256(folder)}
    if wanted & known or (Path(source.model).name == "reward" and not Path(source.model).exists()):
        return RewardSource(model=str(folder), weight=source.weight)
    return source

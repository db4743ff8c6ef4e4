"""`rlhf round report`: what each round got, whether another one is likely to help, and how all policies compare."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config.stages import SUPPORT
from pipeline.data.records import Record
from pipeline.errors import UserError
from pipeline.evaluation.answers import ModelAnswers, load_sampler, sample_answers
from pipeline.evaluation.divergence import Divergence, divergence
from pipeline.evaluation.intervals import length_controlled, win_rate, wins_of
from pipeline.evaluation.judges import REWARD, JudgePanel, Scores, build_panel
from pipeline.evaluation.ratings import ratings
from pipeline.evaluation.run_folder import held_out_prompts, read_run
from pipeline.rounds.findings import findings
from pipeline.rounds.folder import Model, RoundsRun
from pipeline.rounds.labels import Labels, accuracy, wins_of_policies
from pipeline.rounds.ledger import Ledger, prompt_key
from pipeline.rounds.page import render
from pipeline.training.json_files import NotAnObject, finite_or_null, read_json_object, write_json
from pipeline.training.lineage import read_lineage, verify_parent

import numpy as np


@dataclass
class Measured:
    """Every policy's answers to the same held-out prompts, their scores, and its KL from the SFT model."""

    prompts: list[Record]
    answers: dict[str, ModelAnswers] = field(default_factory=dict)
    scores: dict[str, Scores] = field(default_factory=dict)
    kl: dict[str, Divergence] = field(default_factory=dict)

    @property
    def prompt_names(self) -> list[str]:
        return [prompt_key(record) for record in self.prompts]


@dataclass(frozen=True)
class RoundReportOptions:
    """The flags of `rlhf round report`."""

    judges: Sequence[str] = ()
    num_prompts: int = 200
    to: str | None = None


def write_round_report(run: RoundsRun, options: RoundReportOptions) -> Path:
    """Measure all finished rounds and write report.json and index.html; returns their folder.

    Raises:
        UserError: no round is finished, a model changed, or the folder holds another report.
    """
    number = run.trained
    if not number:
        raise UserError("no round is finished yet; label, then `rlhf round train`", file=run.path)
    target = Path(options.to) if options.to else run.path / "report"
    _check_ours(target)
    newest = read_run(run.round(number).path)
    panel = build_panel(newest, options.judges, str(run.recipe))
    policies = run.policies(number)
    measured = _measure(policies, panel, Measured(held_out_prompts(newest, None, options.num_prompts)))
    judge = next((name for name in panel.independent if name in measured.scores["sft"]), REWARD)
    labels = [Labels.read(run.round(n).labels) for n in range(1, number + 1)]
    rounds = [_round(run, n, labels[n - 1], measured, judge) for n in range(1, number + 1)]
    left = Ledger(run.path).left(run.candidates())
    report: dict[str, Any] = {
        "run": run.path.resolve().name,
        "prompts": len(measured.prompts),
        "judge": {"name": judge, "independent": judge in panel.independent},
        "start": {"policy": policies[-number - 1].name, **_means(measured.scores[policies[-number - 1].name])},
        "rounds": rounds,
        "ratings": {
            "by_judge": _judge_ratings(policies, measured, judge),
            "by_labelers": _label_ratings(policies, labels),
        },
        "unseen_prompts": left,
        "findings": [],
        "notes": newest.notes,
    }
    report["findings"] = [dataclasses.asdict(finding) for finding in findings(report, run.args.prompts_per_round)]
    return _write(target, report)


def _check_ours(target: Path) -> None:
    path = target / "report.json"
    if not path.exists():
        return
    try:
        ours = "rounds" in read_json_object(path)
    except NotAnObject:
        ours = False
    if not ours:
        raise UserError("is another report (of the run's stages?); name another folder with --to", file=path)


def _write(target: Path, report: dict[str, Any]) -> Path:
    target.mkdir(parents=True, exist_ok=True)
    report = finite_or_null(report)
    write_json(target / "report.json", report)
    (target / "index.html").write_text(render(report), encoding="utf-8", errors="replace")
    for finding in report["findings"]:
        print(f"round report: {finding['text']}")
    print(f"round report: {target / 'index.html'}")
    return target


def _measure(policies: Sequence[Model], panel: JudgePanel, measured: Measured) -> Measured:
    if not measured.prompts:
        raise UserError("ppo.yaml leaves no held-out prompts to compare policies on; give `eval_datasets:`")
    recipe = panel.run.recipe("ppo")
    sft = load_sampler(Path(verify_parent(policies[0].path, SUPPORT["ppo"].parents).path), recipe)
    for policy in policies:
        path = Path(verify_parent(policy.path, SUPPORT["ppo"].parents).path)
        sampler = sft if policy is policies[0] else load_sampler(path, recipe)
        answers = sample_answers(sampler, measured.prompts)
        measured.answers[policy.name] = answers
        measured.scores[policy.name] = panel.scores(answers)
        measured.kl[policy.name] = divergence(sampler, sft, answers)
    return measured


def _means(scores: Scores) -> dict[str, float]:
    return {judge: float(np.mean(values)) for judge, values in scores.items()}


def _round(run: RoundsRun, number: int, labels: Labels, measured: Measured, judge: str) -> dict[str, Any]:
    """One round's metrics. Means of all judges stand under the judges' names."""
    name, before = f"round-{number}", run.policies(number - 1)[-1].name
    folder, recorded = run.round(number), run.round(number).read()
    return {
        **_means(measured.scores[name]),
        "round": number,
        **_won(measured, name, before, judge, "win_rate"),
        **_won(measured, name, "sft", judge, "win_rate_over_sft"),
        "kl": measured.kl[name].kl,
        "kl_standard_error": measured.kl[name].standard_error,
        "response_tokens": float(measured.answers[name].lengths.mean()),
        **_accuracies(run, number, labels),
        **labels.agreement(),
        "labels": len(labels.records),
        "labelers": labels.labelers,
        "against": before,
        "started_from": {
            part: {key: entry[key] for key in ("name", "weights_sha256")} for part, entry in recorded["starts"].items()
        },
        "seconds": {stage: _seconds(folder.path / stage) for stage in ("reward", "ppo")},
    }


def _seconds(folder: Path) -> float | None:
    return (read_lineage(folder) or {}).get("seconds")


def _won(measured: Measured, candidate: str, baseline: str, judge: str, key: str) -> dict[str, Any]:
    ours, theirs = measured.scores[candidate][judge], measured.scores[baseline][judge]
    rate = win_rate(ours, theirs, measured.prompt_names)
    longer = measured.answers[candidate].lengths - measured.answers[baseline].lengths
    return {
        key: rate.win_rate,
        f"{key}_ci95": list(rate.ci95),
        f"{key}_length_controlled": length_controlled(wins_of(ours, theirs), longer),
    }


def _accuracies(run: RoundsRun, number: int, labels: Labels) -> dict[str, Any]:
    """The accuracy on a round's labels of the reward model that the round began with, and of the one that it trained."""
    lineage = read_lineage(run.round(number).path / "reward")
    fraction = (lineage or {}).get("recipe", {}).get("held_out_fraction", 0.1)
    before, after = run.recorded_reward_before(number), str(run.round(number).path / "reward")
    entries: dict[str, Any] = {}
    for when, path in (("before", before.path if before else None), ("after", after)):
        found = accuracy(path, labels, fraction) if path else None
        entries |= {
            f"accuracy_{when}": found.all.accuracy if found else None,
            f"accuracy_{when}_ci95": list(found.all.ci95) if found and found.all.ci95 else None,
            f"held_out_accuracy_{when}": found.held_out.accuracy if found else None,
        }
        if found:
            entries |= {"pairs": found.all.pairs, "held_out_pairs": found.held_out.pairs}
    return entries


def _judge_ratings(policies: Sequence[Model], measured: Measured, judge: str) -> list[dict[str, Any]]:
    """Of all policies, by the judge's preferences between their answers to each held-out prompt."""
    names = [policy.name for policy in policies]
    wins = np.zeros((len(measured.prompts), len(names), len(names)))
    for i, ours in enumerate(names):
        for j, theirs in enumerate(names):
            if i != j:
                wins[:, i, j] = wins_of(measured.scores[ours][judge], measured.scores[theirs][judge])
    return [dataclasses.asdict(rating) for rating in ratings(names, wins)]


def _label_ratings(policies: Sequence[Model], labels: Sequence[Labels]) -> list[dict[str, Any]]:
    """Of the policies whose answers labelers compared; the newest one was not labeled yet."""
    known = [
        {"weights_sha256": verify_parent(policy.path, SUPPORT["ppo"].parents).weights_sha256, "name": policy.name}
        for policy in policies
    ]
    wins = wins_of_policies(labels, known)
    return [dataclasses.asdict(rating) for rating in ratings([p["name"] for p in known], wins)] if len(wins) else []

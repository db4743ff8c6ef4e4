"""`rlhf report`: every stage answers the same held-out prompts, every judge scores the answers, and one page says what the
run got: `report/report.json` (every number) and `report/index.html` (self-contained).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config.stages import ANSWERING
from pipeline.data.hashing import sha256_json
from pipeline.data.records import Record
from pipeline.errors import UserError
from pipeline.evaluation.alignment_tax import alignment_tax
from pipeline.evaluation.answers import SEED, ModelAnswers, as_answers, load_sampler, sample_answers, variety
from pipeline.evaluation.judges import REWARD, REWARD_MODEL, JudgePanel, Scores, build_panel
from pipeline.evaluation.llm_judge import judge_from
from pipeline.evaluation.lm_eval_tasks import require_lm_eval, task_scores
from pipeline.evaluation.over_optimisation import measured_judges, over_optimisation, reward_kl_curve
from pipeline.evaluation.page import render
from pipeline.evaluation.run_folder import RunFolder, held_out_prompts, read_run
from pipeline.evaluation.samples import extremes, samples
from pipeline.evaluation.verdict import verdict
from pipeline.evaluation.win_rates import BEST_OF, agreement, llm_win_rates, win_rates
from pipeline.planning.devices import energy
from pipeline.rollout.best_of_n import best_of_each, best_of_n, kl_bound
from pipeline.rollout.rewards import Answers, judge_labels
from pipeline.rollout.rewards import Scores as RewardScores
from pipeline.rollout.vllm_folders import ServedFolders, ServerLost
from pipeline.training.json_files import write_json

import torch

SAMPLES = 24  # prompts that the page shows


@dataclass(frozen=True)
class ReportOptions:
    """The flags of `rlhf report`."""

    judges: Sequence[str] = ()
    recipe_dir: str | None = None
    prompts_file: str | None = None
    num_prompts: int = 200
    data_root: str | None = None
    best_of: int = 8
    against: Sequence[str] = ()
    llm_judge: str | None = None
    llm_judge_model: str | None = None
    tasks: Sequence[str] = ()
    tasks_path: str | None = None
    watts: float | None = None
    engine_url: str | None = None


@dataclass
class Measured:
    """Answers of every model to the prompts, and every judge's scores of them, by model.

    served: the server that samples, if one does.
    """

    prompts: list[Record]
    served: ServedFolders | None = None
    answers: dict[str, ModelAnswers] = field(default_factory=dict)
    scores: dict[str, Scores] = field(default_factory=dict)

    @property
    def prompt_names(self) -> list[str]:
        """(prompts,) one name per prompt; the same prompt twice has the same name."""
        return [sha256_json(record["prompt"]) for record in self.prompts]


def write_report(run_dir: str, options: ReportOptions | None = None) -> Path:
    """Measure the run in `run_dir` and write its report; what is missing or changed is a note in it.

    Raises:
        UserError: no stage is there, no held-out prompts can be read, or an option is wrong.
    """
    options = options or ReportOptions()
    llm = judge_from(options.llm_judge, options.llm_judge_model) if options.llm_judge else None
    served = ServedFolders.connect(options.engine_url) if options.engine_url else None
    if options.tasks:
        require_lm_eval()
    run = read_run(Path(run_dir), options.data_root)
    panel = build_panel(run, options.judges, options.recipe_dir)
    measured = Measured(held_out_prompts(run, options.prompts_file, options.num_prompts, options.data_root), served)
    outside = _answer_and_judge(run, panel, measured, options.against)
    best = _best_of(run, panel, measured, options.best_of)
    curve = reward_kl_curve(run.path)
    in_training = measured_judges(curve, list(judge_labels([str(j) for j in run.recipe("ppo").get("judges") or []])))
    compared = llm_win_rates(llm, measured.prompts, measured.answers, list(outside), run) if llm else []
    independent = panel.independent
    report: dict[str, Any] = {
        "run": run.path.resolve().name,
        "stages": {name: _stage_metrics(name, lineage) for name, lineage in run.lineages.items()},
        "seconds": {name: lineage["seconds"] for name, lineage in run.lineages.items()},
        "prompts": len(measured.prompts),
        "engine": {"engine": "local"} if served is None else served.facts(),
        "judges": {"independent": independent + ([llm.label] if llm else []), "meaning": _meanings(run, panel)},
        "win_rates": [
            *[row for row in compared if row["prompts"]],
            *win_rates(measured.scores, measured.answers, measured.prompt_names, _judge_order(panel, measured.scores)),
        ],
        "llm_judge": compared,
        "frontier": curve,
        "over_optimisation": [item.as_dict() for item in over_optimisation(curve, in_training)],
        "best_of_n": best,
        "alignment_tax": alignment_tax(run, outside, options.data_root),
        "tasks": task_scores(
            run.path, [s for s in ANSWERING if s in run.lineages], options.tasks, options.tasks_path, run.notes
        ),
        "energy": energy(run.lineages, options.watts),
        "agreement": agreement(measured.scores, independent),
        "variety": {name: variety(answers) for name, answers in measured.answers.items()},
        "samples": samples(
            measured.prompts, measured.answers, measured.scores, range(min(SAMPLES, len(measured.prompts)))
        ),
        "extremes": {
            why: samples(measured.prompts, measured.answers, measured.scores, [row])[0]
            for why, row in extremes(measured.answers, measured.scores).items()
        },
        "lineage": run.lineages,
        "notes": run.notes,
    }
    report["verdict"] = [asdict(finding) for finding in verdict(report)]
    return _write(run, finite(report), in_training)


def _write(run: RunFolder, report: dict[str, Any], judges: Sequence[str]) -> Path:
    target = run.path / "report"
    target.mkdir(exist_ok=True)
    write_json(target / "report.json", report)
    (target / "index.html").write_text(render(report, run, judges), encoding="utf-8", errors="replace")
    print(f"report: {_summary(report)}{target / 'index.html'}")
    return target


def _answer_and_judge(run: RunFolder, panel: JudgePanel, measured: Measured, against: Sequence[str]) -> dict[str, Path]:
    """Sample and judge the answers of every stage and outside model; returns the outside models that answered."""
    outside = {name: Path(name) for name in against}
    if not measured.prompts:
        run.note("no held-out prompts; nothing was answered")
        return {}
    for name, place in {**{s: run.path / s for s in ANSWERING if s in run.lineages}, **outside}.items():
        try:  # one stage that cannot answer (no chat template, say) is a note, not the end of the report
            answers = sample_answers(load_sampler(place, run.recipe("ppo"), measured.served), measured.prompts)
        except ServerLost:  # a report without the answers of the rest would replace a whole one
            raise
        except UserError as error:
            run.note(f"{name}: does not answer here: {error}")
            continue
        measured.answers[name] = answers
        measured.scores[name] = panel.scores(answers)
    return {name: place for name, place in outside.items() if name in measured.answers}


def _best_of(run: RunFolder, panel: JudgePanel, measured: Measured, n: int) -> dict[str, Any] | None:
    """The SFT model's best of n by what PPO trains on, added to what is measured: what choosing gets without training.

    Returns:
        `n`, `kl` (nats per response), each judge's mean, and the `curve` of best of 1 … n; None where there is no such
        reward.
    """
    by = next((name for name in (REWARD, REWARD_MODEL) if name in measured.scores.get("sft", {})), None)
    if n < 2 or by is None:
        return None
    sampler = load_sampler(run.path / "sft", run.recipe("ppo"), measured.served)
    draws: list[Scores] = []

    def score(drawn: Answers) -> RewardScores:
        draws.append(panel.scores(ModelAnswers(drawn, sampler.encoder, sampler.settings.stop_ids)))
        return RewardScores(torch.tensor(draws[-1][by]), {})

    best = best_of_n(sampler.engine, sampler.model, sampler.encoder, score, measured.prompts, n=n, seed=SEED)
    name = f"{BEST_OF}{n}"
    measured.answers[name] = as_answers(sampler, measured.prompts, best.response_ids)
    measured.scores[name] = panel.scores(measured.answers[name])
    means = {
        judge: best_of_each(torch.tensor([scores[judge] for scores in draws]), best.draw_scores)
        for judge in draws[0]
        if all(judge in scores for scores in draws)
    }
    curve = [{"n": k + 1, "kl": kl_bound(k + 1), **{judge: means[judge][k] for judge in means}} for k in range(n)]
    own = {judge: sum(values) / len(values) for judge, values in measured.scores[name].items()}
    return {"n": n, "kl": kl_bound(n), "by": by, "curve": curve, **own}


def _stage_metrics(stage: str, lineage: dict[str, Any]) -> dict[str, Any]:
    metrics = {**lineage["metrics"], "flops": lineage["flops"], "processes": lineage["processes"]}
    if stage == "ppo" and "score" in metrics:
        metrics.setdefault("reward", metrics["score"])  # the same number: the weighted sum after the missing-EOS rule
    return metrics


def _judge_order(panel: JudgePanel, scores: dict[str, Scores]) -> list[str]:
    """Judges for win rates: independent ones first, the training reward next, its parts last.

    The score of the only model of a reward is left out: it differs from the reward in unfinished answers alone.
    """
    known = list(dict.fromkeys(judge for judged in scores.values() for judge in judged))
    first = [judge for judge in panel.independent if judge in known]
    rest = [judge for judge in known if judge not in first and judge != REWARD]
    if panel.reward is not None and len(panel.reward.sources) == 1:
        rest = [judge for judge in rest if judge != REWARD_MODEL]
    return [*first, *([REWARD] if REWARD in known else []), *rest]


def _meanings(run: RunFolder, panel: JudgePanel) -> dict[str, str]:
    """The kind of each judge's number."""
    meanings = dict.fromkeys(panel.independent, "independent: training never saw it")
    if panel.reward is not None:
        parts = " + ".join(
            f"{source.weight:g} × {source.function or 'reward model ' + Path(str(source.model)).name}"
            for source in panel.reward.sources
        )
        rule = {
            "replace": f"answers without a stop token get {panel.reward.missing_eos_score:g}",
            "subtract": f"answers without a stop token get {abs(panel.reward.missing_eos_score):g} less",
        }.get(panel.reward.missing_eos, "no rule for answers without a stop token")
        meanings[REWARD] = f"what PPO trained on: {parts}; {rule}"
    if "reward" in run.lineages or panel.reward is not None:
        meanings[REWARD_MODEL] = "the reward model's own score, before weights and the rule for unfinished answers"
    return meanings


def _summary(report: dict[str, Any]) -> str:
    """The verdict's first lines for the console: what is wrong before what is right."""
    order = {"bad": 0, "warning": 1, "good": 2}
    findings = sorted(report["verdict"], key=lambda finding: order[finding["level"]])
    return "".join(f"{finding['text']} · " for finding in findings[:3])


def finite(value: Any) -> Any:
    """The same data as JSON knows it: NaN and infinities are None."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

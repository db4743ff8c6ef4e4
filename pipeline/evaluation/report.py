"""`rlhf report`: what a run got: every stage answers the same held-out prompts, every judge scores the answers.

Writes `report/report.json` (all figures) and `report/index.html` (one self-contained page).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config.arguments import STAGES, DatasetEntry, RewardSource
from pipeline.config.functions import import_from, import_function
from pipeline.data.collators import BlockCollator
from pipeline.data.encoding import ChatEncoder, document_ids, forbidden_ids
from pipeline.data.packing import pack_documents
from pipeline.data.records import PARSERS, Record, read_jsonl
from pipeline.data.sources import digest_of, files_of, read_sources, split_texts
from pipeline.data.splits import split_records, spread
from pipeline.errors import UserError
from pipeline.evaluation.llm_judge import Judge, compare_answers, judge_from
from pipeline.evaluation.lm_eval_tasks import require_lm_eval, task_scores
from pipeline.evaluation.metrics import DistinctN, Perplexity, Repetition, WinRate
from pipeline.evaluation.over_optimisation import frontier, over_optimisation
from pipeline.evaluation.plots import lineage_plot
from pipeline.evaluation.preference import length_controlled
from pipeline.evaluation.report_page import draw, render, summary
from pipeline.models.loading import load_causal_lm, load_tokenizer
from pipeline.models.token_nll import token_nll
from pipeline.planning.devices import energy
from pipeline.rollout.best_of_n import best_of_each, best_of_n, kl_bound
from pipeline.rollout.rewards import Scorer, build_scorer, call_function, judge_labels
from pipeline.rollout.rollout import LocalEngine, row_uniforms
from pipeline.training.identity import tokenizer_hashes, weights_sha256
from pipeline.training.json_files import write_json
from pipeline.training.lineage import read_lineage

import numpy as np
import torch

logger = logging.getLogger(__name__)
ANSWERING = ("pretrain", "sft", "ppo")
DATASET_KEYS = ("datasets", "eval_datasets", "ptx_datasets", "center_on")
SAMPLES = 24
SEED = 2**30


def write_report(
    run_dir: str,
    judges: Sequence[str] = (),
    prompts_file: str | None = None,
    num_prompts: int = 200,
    data_root: str | None = None,
    best_of: int = 8,
    against: Sequence[str] = (),
    llm_judge: str | None = None,
    llm_judge_model: str | None = None,
    tasks: Sequence[str] = (),
    tasks_path: str | None = None,
    watts: float | None = None,
) -> Path:
    """Measure the run in `run_dir` and write its report; what is missing or changed is said in it, the rest reported.

    Raises:
        UserError: no stage is there, or no held-out prompts can be found.
    """
    folder = Path(run_dir)
    run = read_run(folder, data_root)
    lineages, notes = run.lineages, run.notes
    for lineage in lineages.values():
        if lineage.get("config"):
            import_from(Path(lineage["config"]).parent)
    asked_judge = judge_from(llm_judge, llm_judge_model) if llm_judge else None
    if tasks:
        require_lm_eval()
    prompts = held_out_prompts(folder, lineages, prompts_file, num_prompts, data_root)
    ppo_recipe = lineages.get("ppo", {}).get("recipe", {})
    models = {Path(judge).name: judge for judge in judges if _is_folder(judge)}
    functions = [judge for judge in judges if not _is_folder(judge)]
    asked = judge_labels(list(dict.fromkeys([*functions, *ppo_recipe.get("judges", [])])))
    bench = Bench(folder if "reward" in lineages else None, models, asked, notes)
    answers: dict[str, Answers] = {}
    scores: dict[str, dict[str, list[float]]] = {}
    outside = {other: Path(other) for other in against}
    for name, place in {**{name: folder / name for name in ANSWERING if name in lineages}, **outside}.items():
        try:  # one stage that cannot answer (no chat template, say) is a note, not the end of the report
            answers[name] = sample_answers(place, prompts, ppo_recipe)
            scores[name] = bench.judge(prompts, answers[name])
        except UserError as error:
            notes.append(f"{name}: does not answer here: {error}")
    reference_point = None
    if best_of > 1 and "sft" in answers and "reward" in lineages:
        reference_point = best_of_answers(folder, prompts, answers, ppo_recipe, best_of, bench)
        name, point = f"best_of_{best_of}", reference_point
        scores[name] = bench.judge(prompts, answers[name])
        point |= {judge: float(np.mean(values)) for judge, values in scores[name].items()}
    answered = {name: place for name, place in outside.items() if name in answers}
    compared = llm_win_rates(asked_judge, prompts, answers, list(answered), notes) if asked_judge else []
    points = frontier(folder)
    parted = over_optimisation(points)
    stages = {name: stage_figures(lineage) for name, lineage in lineages.items()}
    report: dict[str, Any] = {
        "run": folder.name,
        "stages": stages,
        "seconds": {name: lineage["seconds"] for name, lineage in lineages.items()},
        "win_rates": [*win_rates(scores, answers), *[row for row in compared if row["prompts"]]],
        "llm_judge": compared,
        "frontier": points,
        "over_optimisation": parted,
        "best_of_n": reference_point,
        "alignment_tax": alignment_tax(folder, lineages, answered, data_root, notes),
        "tasks": task_scores(folder, [s for s in ANSWERING if s in lineages], tasks, tasks_path, notes),
        "energy": energy(lineages, watts),
        "agreement": agreement(scores),
        "variety": {name: variety(found) for name, found in answers.items()},
        "samples": samples(prompts, answers, scores, range(min(SAMPLES, len(prompts)))),
        "extremes": {
            why: samples(prompts, answers, scores, [row])[0] for why, row in extremes(answers, scores).items()
        },
        "lineage": lineages,
        "notes": notes,
    }
    target = folder / "report"
    target.mkdir(exist_ok=True)
    write_json(target / "report.json", report)
    (target / "index.html").write_text(
        render(report, draw(folder, lineages, points, reference_point), lineage_plot(lineages, run.changed)),
        encoding="utf-8",
    )
    print(f"report: {summary(report)}{target / 'index.html'}")
    return target


@dataclass
class RunFolder:
    """Lineages of the finished stages, notes on what is missing or no longer what it was, and stages whose weights are not."""

    lineages: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)


def read_run(folder: Path, data_root: str | None = None) -> RunFolder:
    """Read a run's folder and hold every hash in its lineages against the disk."""
    found = RunFolder()
    for name in STAGES:
        if not (folder / name).is_dir():
            continue
        lineage = read_lineage(folder / name)
        if lineage is None:
            found.notes.append(f"{name}: not finished; {folder / name} has no lineage.json")
            continue
        if weights_sha256(folder / name) != lineage["weights_sha256"]:
            found.changed.append(name)
            found.notes.append(
                f"{name}: its weights changed after the stage finished; the figures below may not be theirs"
            )
        found.lineages[name] = lineage
        for parent in lineage["parents"]:
            stage = parent.get("stage")
            if stage in found.lineages and found.lineages[stage]["weights_sha256"] != parent["weights_sha256"]:
                found.notes.append(f"{name}: was trained from another {stage} than the one that lies here now")
        found.notes += _changed_data(name, lineage, data_root)
    if not found.lineages:
        raise UserError(f"{str(folder)!r} holds no finished stage; run `rlhf run RECIPE --output-dir {folder}` first")
    return found


def _changed_data(name: str, lineage: dict[str, Any], data_root: str | None) -> list[str]:
    """Datasets that no longer are what the stage read, or no longer here; the Hub's are not asked for."""
    recipe = lineage["recipe"]
    root = Path(data_root or recipe["data_root"])
    known = {d["sha256"] for d in lineage["datasets"]}
    notes = []
    for key in DATASET_KEYS:
        for values in recipe.get(key) or []:
            entry = DatasetEntry(**values)
            if entry.path is None:
                continue
            path = root / entry.path
            try:
                same = digest_of(files_of(entry, path)) in known
            except (UserError, OSError):
                notes.append(f"{name}: its data {path} cannot be read any more, so it was not checked")
                continue
            if not same:
                notes.append(f"{name}: its data {path} changed after the stage finished")
    return notes


def held_out_prompts(
    folder: Path, lineages: dict[str, Any], prompts_file: str | None, number: int, data_root: str | None
) -> list[Record]:
    """The PPO recipe's held-out prompts as PPO itself takes them, or those of `prompts_file`."""
    if prompts_file:
        return read_jsonl(Path(prompts_file), PARSERS["prompt"], number)
    stage = next((name for name in ("ppo", "sft") if name in lineages), None)
    if stage is None:
        return []
    recipe = lineages[stage]["recipe"]
    root = data_root or recipe["data_root"]
    entries = recipe.get("eval_datasets") or recipe["datasets"]
    sources = read_sources([DatasetEntry(**entry) for entry in entries], "prompt", root)
    records = [record for source in sources for record in source.records]
    if not recipe.get("eval_datasets"):
        records = split_records(records, recipe["held_out_fraction"])[1]
    records = spread(records)
    if limit := recipe.get("max_prompt_tokens"):
        encoder = ChatEncoder(load_tokenizer(str(folder / stage)))
        records = [record for record in records if len(encoder.prompt_ids(record["prompt"])) <= limit]
    return records[:number]


@dataclass(frozen=True)
class Answers:
    """One stage's answer to each prompt, through its stop token where it stopped."""

    encoder: ChatEncoder
    prompt_ids: list[list[int]]
    response_ids: list[list[int]]
    texts: list[str]


@torch.no_grad()
def sample_answers(folder: Path, prompts: list[Record], ppo_recipe: dict[str, Any]) -> Answers:
    """One sampled answer to each prompt, with the same random numbers for every stage."""
    model, engine, encoder = answering(folder, ppo_recipe)
    ids = [encoder.prompt_ids(record["prompt"]) for record in prompts]
    uniforms = row_uniforms(SEED, range(len(ids)), engine.max_new_tokens)
    found = engine.responses(model, ids, uniforms)
    return Answers(encoder, ids, found, encoder.texts(found))


def answering(folder: Path, ppo_recipe: dict[str, Any]) -> tuple[Any, LocalEngine, ChatEncoder]:
    """A stage's model, and an engine that samples as the PPO recipe does."""
    tokenizer = load_tokenizer(str(folder))
    model: Any = load_causal_lm(str(folder)).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    encoder = ChatEncoder(tokenizer)
    limit = ppo_recipe.get("max_response_tokens", 64)
    engine = LocalEngine(
        limit,
        [encoder.eos_id, *(encoder.text_ids(token)[0] for token in ppo_recipe.get("stop_tokens", []))],
        tokenizer.pad_token_id,
        forbidden_ids(tokenizer, model.get_output_embeddings().weight.shape[0]),
        ppo_recipe.get("temperature", 1.0),
        ppo_recipe.get("generation_rows", 64),
    )
    return model, engine, encoder


def best_of_answers(
    folder: Path, prompts: list[Record], answers: dict[str, Answers], ppo_recipe: dict[str, Any], n: int, bench: Bench
) -> dict[str, Any]:
    """The SFT model's best of n by the reward model, added to `answers`: what choosing gets without any training."""
    model, engine, encoder = answering(folder / "sft", ppo_recipe)
    device = next(model.parameters()).device
    scorer = build_scorer([RewardSource(model=str(folder / "reward"))], encoder, device)
    found = best_of_n(engine, model, encoder, scorer, prompts, n, SEED)
    ids = [encoder.prompt_ids(record["prompt"]) for record in prompts]
    answers[f"best_of_{n}"] = Answers(encoder, ids, found.response_ids, encoder.texts(found.response_ids))
    every = [bench.judge(prompts, Answers(encoder, ids, draw, encoder.texts(draw))) for draw in found.draws]
    means = {
        judge: best_of_each(torch.tensor([scores[judge] for scores in every]), found.draw_scores) for judge in every[0]
    }
    curve = [{"n": k + 1, "kl": kl_bound(k + 1), **{judge: means[judge][k] for judge in means}} for k in range(n)]
    return {"n": n, "kl": kl_bound(n), "curve": curve}


@dataclass
class Bench:
    """All judges: the run's reward model as `reward`, reward models of other folders, Python functions; by label.

    A reward model reads as PPO does (an answer cut at the length limit has no EOS). A judge that fails is a note, never a loss.
    """

    run: Path | None
    models: dict[str, str]
    functions: dict[str, str]
    notes: list[str]
    scorers: dict[Any, Scorer] = field(default_factory=dict)  # by folder and the answers' tokenizer

    def judge(self, prompts: list[Record], answers: Answers) -> dict[str, list[float]]:
        """Every judge's score of every answer."""
        found: dict[str, list[float]] = {}
        messages, rows = [r["prompt"] for r in prompts], [r["row"] for r in prompts]
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        own = {"reward": str(self.run / "reward")} if self.run else {}
        for label, path in {**own, **self.models}.items():
            try:
                key = (path, tokenizer_hashes(answers.encoder.tokenizer))
                if key not in self.scorers:
                    self.scorers[key] = build_scorer([RewardSource(model=path)], answers.encoder, device)
                scorer = self.scorers[key]
                found[label] = scorer(messages, answers.prompt_ids, answers.response_ids, rows).scores.tolist()
            except UserError as error:
                _note_once(self.notes, f"{label}: does not judge here: {error}")
        for label, name in self.functions.items():
            try:
                verdicts = call_function(
                    import_function(name), name, [m[-1]["content"] for m in messages], answers.texts, rows
                )
            except UserError as error:
                _note_once(self.notes, f"judge {name}: {error}")
            else:
                found[label] = verdicts
        return found


def _is_folder(judge: str) -> bool:
    return Path(judge).is_dir() or ":" not in judge


def _note_once(notes: list[str], note: str) -> None:
    if note not in notes:
        notes.append(note)


def stage_figures(lineage: dict[str, Any]) -> dict[str, Any]:
    return {**lineage["metrics"], "flops": lineage["flops"], "processes": lineage["processes"]}


def win_rates(scores: dict[str, dict[str, list[float]]], answers: dict[str, Answers]) -> list[dict[str, Any]]:
    """Each stage against each earlier one and all against outside folders, by every judge; ties count one half."""
    rows = []
    order = ["pretrain", "sft", *(name for name in scores if name.startswith("best_of_")), "ppo"]
    outside = [name for name in scores if name not in order]
    names = [*outside, *(name for name in order if name in scores)]
    for position, candidate in enumerate(names):
        for baseline in reversed(names[:position]):
            for judge in [judge for judge in scores[candidate] if judge in scores[baseline]]:
                mine, theirs = np.array(scores[candidate][judge]), np.array(scores[baseline][judge])
                result = WinRate()._compute(mine.tolist(), theirs.tolist())
                lengths = [[len(ids) for ids in answers[name].response_ids] for name in (candidate, baseline)]
                longer = np.array(lengths[0], float) - np.array(lengths[1], float)
                result["length_controlled"] = length_controlled((mine > theirs) + 0.5 * (mine == theirs), longer)
                rows.append({"candidate": candidate, "baseline": baseline, "judge": judge, **result})
    return rows


def llm_win_rates(
    judge: Judge, prompts: list[Record], answers: dict[str, Answers], outside: list[str], notes: list[str]
) -> list[dict[str, Any]]:
    """A language model's win rates: each stage over the one before it, PPO over best of n and over every outside folder."""
    chain = [name for name in ANSWERING if name in answers]
    pairs = list(zip(chain[1:], chain, strict=False))
    others = [name for name in answers if name.startswith("best_of_") or name in outside]
    pairs += [(chain[-1], name) for name in others if chain and name in answers]
    rows = []
    for candidate, baseline in pairs:
        mine, theirs = answers[candidate], answers[baseline]
        longer = [len(a) - len(b) for a, b in zip(mine.response_ids, theirs.response_ids, strict=True)]
        result = compare_answers(judge, [r["prompt"][-1]["content"] for r in prompts], mine.texts, theirs.texts, longer)
        rows.append({"candidate": candidate, "baseline": baseline, "judge": judge.label, **result})
        if result["failed"]:
            why = ", ".join(sorted({failure["why"] for failure in result["failed"]})[:3])
            notes.append(
                f"{judge.label}: {len(result['failed'])} of {len(prompts)} pairs of {candidate} and {baseline} were not "
                f"judged ({why}); they count on neither side and are listed in report.json"
            )
    return rows


@torch.no_grad()
def alignment_tax(
    folder: Path,
    lineages: dict[str, Any],
    outside: dict[str, Path],
    data_root: str | None,
    notes: list[str],
    most_blocks: int = 200,
) -> dict[str, Any] | None:
    """Perplexity of every stage, and of outside folders with the same tokens (a run without ptx, say), on the text that
    pretraining held out: what alignment cost elsewhere."""
    if "pretrain" not in lineages:
        return None
    recipe = lineages["pretrain"]["recipe"]
    tokenizer = load_tokenizer(str(folder / "pretrain"))
    try:
        entries = [DatasetEntry(**entry) for entry in recipe["datasets"]]
        sources = read_sources(entries, "document", data_root or recipe["data_root"])
    except UserError as error:
        notes.append(f"alignment tax not measured: {error}")
        return None
    texts = [text for source in sources for text in split_texts(source, recipe["held_out_fraction"])[1]]
    blocks = pack_documents(document_ids(tokenizer, texts), recipe["block_tokens"])[:most_blocks]
    if not blocks:
        return None
    collate, found = BlockCollator(tokenizer.pad_token_id), {}
    places = {name: folder / name for name in ANSWERING if name in lineages}
    for name, place in {**places, **outside}.items():
        if tokenizer_hashes(load_tokenizer(str(place)))[0] != tokenizer_hashes(tokenizer)[0]:
            notes.append(f"{name}: has another tokenizer than pretraining's; its perplexity would be of other tokens")
            continue
        model: Any = load_causal_lm(str(place)).eval()
        batches = (collate(blocks[i : i + 8]) for i in range(0, len(blocks), 8))
        nll, tokens, _ = token_nll(model, batches, next(model.parameters()).device)
        found[name] = Perplexity()._compute([nll], [tokens])["perplexity"]
    return {"perplexity": found, "tokens": tokens}


def variety(answers: Answers) -> dict[str, float]:
    """How varied a stage's answers are, within and among themselves, and how long."""
    lengths = [len(ids) for ids in answers.response_ids]
    return {
        **DistinctN()._compute(answers.texts),
        **Repetition()._compute(answers.texts),
        "mean_tokens": float(np.mean(lengths)),
        "shortest": min(lengths),
        "longest": max(lengths),
    }


def agreement(scores: dict[str, dict[str, list[float]]]) -> list[dict[str, Any]]:
    """Correlation of the reward model's scores with each Python judge's, on each stage's answers."""
    rows = []
    for stage, judged in scores.items():
        for judge, values in judged.items():
            if judge != "reward" and "reward" in judged and np.std(values) > 0 and np.std(judged["reward"]) > 0:
                r = float(np.corrcoef(judged["reward"], values)[0, 1])
                rows.append({"stage": stage, "judge": judge, "pearson_r": r, "answers": len(values)})
    return rows


def samples(
    prompts: list[Record], answers: dict[str, Answers], scores: dict[str, dict[str, list[float]]], rows: Iterable[int]
) -> list[dict[str, Any]]:
    """Some prompts with every stage's answer and its scores."""
    return [
        {
            "prompt": prompts[i]["prompt"][-1]["content"],
            "responses": {
                stage: {
                    "text": found.texts[i],
                    "scores": {judge: round(values[i], 3) for judge, values in scores.get(stage, {}).items()},
                }
                for stage, found in answers.items()
            },
        }
        for i in rows
    ]


def extremes(answers: dict[str, Answers], scores: dict[str, dict[str, list[float]]]) -> dict[str, int]:
    """Prompts at which the last stage's answer is its longest, its shortest, and each judge's best and worst."""
    last = next((name for name in reversed(ANSWERING) if name in answers), None)
    if last is None or not answers[last].response_ids:
        return {}
    lengths = [len(ids) for ids in answers[last].response_ids]
    found = {f"longest of {last}": int(np.argmax(lengths)), f"shortest of {last}": int(np.argmin(lengths))}
    for judge, values in scores.get(last, {}).items():
        found |= {
            f"best of {last} by {judge}": int(np.argmax(values)),
            f"worst of {last} by {judge}": int(np.argmin(values)),
        }
    return found

"""Evaluation of a reward model: agreement with labelers, calibration, biases, and probes of what changes a score."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.data.collators import right_pad
from pipeline.data.hashing import sha256_json
from pipeline.evaluation.calibration import (
    expected_calibration_error,
    fit_temperature,
    preference_logits,
    reliability,
)
from pipeline.evaluation.intervals import PairAccuracy, pair_accuracy
from pipeline.models.reward_model import scores_at
from pipeline.rollout.rewards import call_function

import numpy as np
import torch
from torch import Tensor

logger = logging.getLogger(__name__)
Row = dict[str, Any]
ScoreIds = Callable[[Sequence[Sequence[int]]], Tensor]  # centred scores of token sequences, (sequences,)
LENGTHS_MATCH = 0.1  # responses whose lengths differ by no more than this share of the longer count as matched
PROBES = 256  # held-out prompts at most for the sensitivity probes
PROBE_ROWS = 16  # responses per forward pass of a probe


@dataclass(frozen=True)
class Truth:
    """A function that knows the noiseless preference, and its name in the recipe."""

    name: str
    function: Callable[..., Any]


class ScoredPairs:
    """Rankings with scores, as flat arrays over their strict pairs (those that the labeler did not call a tie).

    better, worse, margin: (pairs,) score of the preferred response, of the other, and their difference.
    longer: (pairs,) tokens of the preferred response minus the other's; longest: (pairs,) tokens of the longer one.
    ranking: (pairs,) position of the pair's ranking; prompt: (pairs,) number of its prompt. Several rankings may rank
    responses to one prompt: intervals and halves go by prompt.
    """

    def __init__(self, rows: Sequence[Row], scores: Sequence[Sequence[float]]):
        self.rows, self.scores = list(rows), [list(s) for s in scores]
        self.prompt_of_row = _prompt_numbers(self.rows)
        better, worse, longer, longest, ranking = [], [], [], [], []
        for index, (row, row_scores) in enumerate(zip(self.rows, self.scores, strict=True)):
            lengths = response_lengths(row)
            for pair in row["pairs"]:
                if not pair["tie"]:
                    a, b = pair["better"], pair["worse"]
                    better.append(row_scores[a])
                    worse.append(row_scores[b])
                    longer.append(lengths[a] - lengths[b])
                    longest.append(max(lengths[a], lengths[b]))
                    ranking.append(index)
        self.better, self.worse = np.array(better, float), np.array(worse, float)
        self.margin = self.better - self.worse
        self.longer, self.longest = np.array(longer, int), np.array(longest, int)
        self.ranking = np.array(ranking, int)
        self.prompt = self.prompt_of_row[self.ranking]

    def accuracy(self, chosen: np.ndarray | None = None) -> PairAccuracy:
        """Accuracy of the pairs, or of those where `chosen` (pairs,) is True."""
        mask = np.ones(len(self.margin), bool) if chosen is None else chosen
        return pair_accuracy(self.better[mask], self.worse[mask], self.prompt[mask].tolist())

    def accuracy_by(self, name: Callable[[Row], str | None]) -> dict[str, PairAccuracy]:
        """Accuracy of the rankings that `name` gives one name; None leaves a ranking out."""
        names = [name(row) for row in self.rows]
        return {
            wanted: self.accuracy(np.array([names[r] == wanted for r in self.ranking], bool))
            for wanted in sorted({n for n in names if n is not None})
        }


def _prompt_numbers(rows: Sequence[Row]) -> np.ndarray:
    """(rows,) one number per prompt: by `prompt_id` where a row has one, else by the prompt's token ids."""
    numbers: dict[str, int] = {}
    keys = [
        str(row["prompt_id"])
        if row.get("prompt_id") is not None
        else sha256_json(row["ids"][0][: row["prompt_tokens"]])
        for row in rows
    ]
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], int)


def response_lengths(row: Row) -> list[int]:
    """Tokens of each response of an encoded ranking."""
    return [len(ids) - row["prompt_tokens"] for ids in row["ids"]]


def score_rankings(score: ScoreIds, rows: Sequence[Row]) -> ScoredPairs:
    """Score every response of encoded rankings (`encode_rankings`)."""
    flat = score([ids for row in rows for ids in row["ids"]]).tolist()
    scores, start = [], 0
    for row in rows:
        scores.append(flat[start : start + len(row["ids"])])
        start += len(row["ids"])
    return ScoredPairs(rows, scores)


def score_rankings_by_function(truth: Truth, rows: Sequence[Row]) -> ScoredPairs:
    """The same with a Python function's scores."""
    scores = []
    for row in rows:
        record = row["record"]
        n = len(record["responses"])
        given = [record["prompt"]] * n, record["responses"], [record["row"]] * n
        scores.append(call_function(truth.function, truth.name, *given))
    return ScoredPairs(rows, scores)


def labeler_of(row: Row) -> str:
    return str(row["record"].get("labeler", "unnamed"))


def calibration(pairs: ScoredPairs, tie_margin: float = 0.0) -> dict[str, Any]:
    """Does the model's probability of a preference match the labelers? Before and after temperature scaling (Guo et al. 2017).

    The error after scaling is measured on prompts that the temperature was not fitted on: each half of the prompts with
    the other half's. The temperature returned is that of all held-out pairs.

    Args:
        tie_margin: of the loss that the model was trained with (`calibration.preference_logits`).
    """
    scaled = np.empty_like(pairs.margin)
    half = pairs.prompt % 2 == 0
    for fitted_on, used_on in ((half, ~half), (~half, half)):
        temperature = fit_temperature(pairs.margin[fitted_on], tie_margin) if fitted_on.any() else 1.0
        scaled[used_on] = pairs.margin[used_on] / temperature
    result: dict[str, Any] = {"temperature": fit_temperature(pairs.margin, tie_margin)}
    for name, margins in (("before", pairs.margin), ("after", scaled)):
        probability = 1 / (1 + np.exp(-np.abs(preference_logits(margins, tie_margin))))
        outcome = (margins > 0) + 0.5 * (margins == 0)
        result[name] = {
            "ece": expected_calibration_error(probability, outcome, low=0.5),
            "bins": reliability(probability, outcome, low=0.5),
        }
    return result


def length_bias(pairs: ScoredPairs) -> dict[str, Any]:
    """Length bias: correlations of score and length, and accuracy on pairs of similar length."""
    rows = list(zip(pairs.rows, pairs.scores, pairs.prompt_of_row.tolist(), strict=True))
    length = np.array([n for row, _, _ in rows for n in response_lengths(row)], float)
    score = np.array([s for _, scores, _ in rows for s in scores], float)
    prompt = np.array([number for _, scores, number in rows for _ in scores], int)
    sizes = np.bincount(prompt)

    def within_prompt(values: np.ndarray) -> np.ndarray:
        return values - (np.bincount(prompt, weights=values) / sizes)[prompt]

    matched = np.abs(pairs.longer) <= LENGTHS_MATCH * pairs.longest
    by_difference = {
        "preferred is shorter": ~matched & (pairs.longer < 0),
        "lengths match": matched,
        "preferred is longer": ~matched & (pairs.longer > 0),
    }
    return {
        "correlation": correlation(length, score),
        "correlation_within_prompt": correlation(within_prompt(length), within_prompt(score)),
        "model_prefers_longer": _share((pairs.margin > 0) == (pairs.longer > 0), pairs.longer != 0),
        "labelers_prefer_longer": _share(pairs.longer > 0, pairs.longer != 0),
        "accuracy_by_length_difference": {
            name: pairs.accuracy(chosen).as_dict() for name, chosen in by_difference.items()
        },
    }


def _share(what: np.ndarray, among: np.ndarray) -> float | None:
    return float(what[among].mean()) if among.any() else None


def correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Pearson's r, or None where it does not exist."""
    return float(np.corrcoef(a, b)[0, 1]) if len(a) > 2 and a.std() > 0 and b.std() > 0 else None


@torch.no_grad()
def sensitivity(score: ScoreIds, model: Any, pad_id: int, pairs: ScoredPairs) -> dict[str, Any]:
    """Edits that must not change a score, and edits that must (Stiennon et al. 2020, appendix).

    edited_after_eos: the largest change of the score read at a response's end when other tokens follow it.
    swapped_prompts: the best response of each prompt after the next prompt instead: share whose score falls, mean change.
    """
    rows = pairs.rows[:PROBES]
    best = [row["ids"][int(np.argmin(row["record"]["ranks"]))] for row in rows]
    result: dict[str, Any] = {
        "edited_after_eos": _change_after_end(model, pad_id, best),
        "prompts": len(rows),
    }
    if len(rows) > 1:
        prompts = [ids[: row["prompt_tokens"]] for ids, row in zip(best, rows, strict=True)]
        answers = [ids[row["prompt_tokens"] :] for ids, row in zip(best, rows, strict=True)]
        swapped = [p + a for p, a in zip(prompts[1:] + prompts[:1], answers, strict=True)]
        change = score(swapped) - score(best)
        result["swapped_prompts"] = {
            "share_lower": (change < 0).float().mean().item(),
            "mean_change": change.mean().item(),
        }
    return result


def _change_after_end(model: Any, pad_id: int, texts: list[list[int]]) -> float:
    """The largest change of a score when random tokens follow where it is read."""
    device, vocabulary = next(model.parameters()).device, int(model.config.get_text_config().vocab_size)
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for start in range(0, len(texts), PROBE_ROWS):
        part = texts[start : start + PROBE_ROWS]
        lengths = torch.tensor([len(ids) for ids in part], device=device)
        clean = right_pad([[*ids, *[pad_id] * 8] for ids in part], pad_id).to(device)  # (rows, length)
        mask = torch.arange(clean.shape[1], device=device) < lengths[:, None]
        noise = torch.randint(0, vocabulary, clean.shape, generator=generator).to(device)
        moved = scores_at(model, torch.where(mask, clean, noise), mask)
        largest = max(largest, (scores_at(model, clean, mask) - moved).abs().max().item())
    return largest


@dataclass(frozen=True)
class MeasuredScores:
    """What needs the model: scores of rankings by labelers of the training data and by others, and the probes' results."""

    pairs: ScoredPairs
    others: ScoredPairs | None
    sensitivity: dict[str, Any]


def measure_reward_model(
    score: ScoreIds, model: Any, pad_id: int, held_out: Sequence[Row], held_out_labelers: Sequence[Row] = ()
) -> MeasuredScores:
    """All forward passes of a reward model's evaluation; called by every process.

    Args:
        score: scores with `model`, perhaps a share of the passes in each process.
        held_out: encoded rankings of unseen prompts by labelers of the training data.
        held_out_labelers: encoded rankings of unseen prompts by other labelers.
    """
    pairs = score_rankings(score, held_out)
    others = score_rankings(score, held_out_labelers) if held_out_labelers else None
    return MeasuredScores(pairs, others, sensitivity(score, model, pad_id, pairs))


def reward_metrics(measured: MeasuredScores, *, truth: Truth | None = None, tie_margin: float = 0.0) -> dict[str, Any]:
    """All metrics of a reward model: `metrics.json` of the reward stage.

    Args:
        truth: what it reaches is the ceiling that the labelers' noise leaves.
        tie_margin: of the loss, 0 unless `ties: margin`.
    """
    pairs, others = measured.pairs, measured.others
    overall = pairs.accuracy().as_dict()
    flat = np.array([score for scores in pairs.scores for score in scores])
    metrics: dict[str, Any] = {
        "accuracy": overall["accuracy"],
        "accuracy_ci95": overall["ci95"],
        "held_out_pairs": overall["pairs"],
        "scores": {"mean": float(flat.mean()), "std": float(flat.std(ddof=1)) if len(flat) > 1 else 0.0},
    }
    everyone = pairs
    if others is not None:
        metrics["held_out_labeler_accuracy"] = others.accuracy().as_dict()["accuracy"]
        metrics["held_out_labeler_accuracy_ci95"] = others.accuracy().as_dict()["ci95"]
        everyone = ScoredPairs(pairs.rows + others.rows, pairs.scores + others.scores)
    metrics["accuracy_by_labeler"] = {n: a.accuracy for n, a in everyone.accuracy_by(labeler_of).items()}
    metrics["accuracy_by_size"] = {
        n: a.as_dict() for n, a in pairs.accuracy_by(lambda row: str(len(row["ids"]))).items()
    }
    if by_confidence := pairs.accuracy_by(_confidence):
        metrics["accuracy_by_confidence"] = {n: a.as_dict() for n, a in by_confidence.items()}
    if overall["pairs"]:
        calibrated = calibration(pairs, tie_margin)
        metrics["ece"], metrics["ece_before_scaling"] = calibrated["after"]["ece"], calibrated["before"]["ece"]
        metrics["temperature"] = calibrated["temperature"]
        metrics["calibration"] = {name: calibrated[name]["bins"] for name in ("before", "after")}
        metrics["length_bias"] = length_bias(pairs)
    metrics["sensitivity"] = measured.sensitivity
    return metrics | (_noise_ceiling(truth, everyone, len(pairs.rows), metrics) if truth else {})


def _noise_ceiling(truth: Truth, everyone: ScoredPairs, count: int, metrics: dict[str, Any]) -> dict[str, Any]:
    """Accuracy of the noiseless preferences against the labelers' noisy choices.

    Args:
        everyone: rankings of labelers who were trained on, then those of held-out labelers.
        count: number of the former.
    """
    ceiling = score_rankings_by_function(truth, everyone.rows)
    by_labeler = {name: item.accuracy for name, item in ceiling.accuracy_by(labeler_of).items()}
    return {
        "noise_ceiling": ceiling.accuracy(ceiling.ranking < count).accuracy,
        "noise_ceiling_by_labeler": by_labeler,
        "share_of_ceiling_by_labeler": {
            name: metrics["accuracy_by_labeler"][name] / top for name, top in by_labeler.items() if top
        },
    }


def _confidence(row: Row) -> str | None:
    value = row["record"].get("confidence")
    return None if value is None else f"{value:.1f}"

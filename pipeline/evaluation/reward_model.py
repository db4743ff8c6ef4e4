"""What a reward model's scores mean: agreement with labelers, calibration, biases, and probes of what moves a score."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from pipeline.data.collators import right_pad
from pipeline.evaluation.calibration import ExpectedCalibrationError, fit_temperature, reliability
from pipeline.evaluation.preference import PairAccuracy
from pipeline.models.reward_model import score_ids, scores_at
from pipeline.rollout.rewards import call_function

import numpy as np
import torch

logger = logging.getLogger(__name__)
Row = dict[str, Any]
LENGTHS_MATCH = 0.1  # responses whose lengths differ by no more than this share of the longer count as matched
PROBES = 256  # held-out prompts at most for the sensitivity probes


class Judged:
    """Rankings with scores, as flat arrays over their strict pairs (those that the labeler told apart).

    margin: (pairs,) score of the preferred response minus the other's; longer: (pairs,) length difference in tokens, same
    way round; longest: (pairs,) tokens of the longer one; group: (pairs,) number of the pair's ranking.
    """

    def __init__(self, rows: Sequence[Row], scores: Sequence[Sequence[float]]):
        self.rows, self.scores = list(rows), [list(s) for s in scores]
        better, worse, longer, longest, group = [], [], [], [], []
        for index, (row, found) in enumerate(zip(self.rows, self.scores, strict=True)):
            lengths = [len(ids) - row["prompt_tokens"] for ids in row["ids"]]
            for pair in row["pairs"]:
                if not pair["tie"]:
                    a, b = pair["better"], pair["worse"]
                    better.append(found[a])
                    worse.append(found[b])
                    longer.append(lengths[a] - lengths[b])
                    longest.append(max(lengths[a], lengths[b]))
                    group.append(index)
        self.better, self.worse = np.array(better, float), np.array(worse, float)
        self.margin = self.better - self.worse
        self.longer, self.longest, self.group = np.array(longer), np.array(longest), np.array(group, int)

    def accuracy(self, chosen: np.ndarray | None = None) -> dict[str, Any]:
        """Accuracy, its interval over prompts, and pairs; of some pairs only where `chosen` says so."""
        keep = np.ones(len(self.margin), bool) if chosen is None else chosen
        if not keep.any():
            return {"accuracy": None, "ci95": None, "pairs": 0}
        # Equal scores must stay equal: the difference of two rounded numbers is compared, not their rounded difference.
        found: dict[str, Any] = PairAccuracy()._compute(self.better[keep], self.worse[keep], self.group[keep])
        return found

    def by(self, name: Callable[[Row], str | None]) -> dict[str, dict[str, Any]]:
        """Accuracy of the pairs of rankings that `name` calls alike; None leaves a ranking out."""
        names = [name(row) for row in self.rows]
        return {
            wanted: self.accuracy(np.array([names[g] == wanted for g in self.group], bool))
            for wanted in sorted({n for n in names if n is not None})
        }


def judge(model: Any, pad_id: int, rows: Sequence[Row]) -> Judged:
    """Score every response of encoded rankings (`reward.encode`)."""
    flat = score_ids(model, [ids for row in rows for ids in row["ids"]], pad_id).tolist()
    scores, start = [], 0
    for row in rows:
        scores.append(flat[start : start + len(row["ids"])])
        start += len(row["ids"])
    return Judged(rows, scores)


def judge_by(function: Callable[..., Any], name: str, rows: Sequence[Row]) -> Judged:
    """The same with a Python function's scores."""
    scores = []
    for row in rows:
        record = row["record"]
        n = len(record["responses"])
        scores.append(call_function(function, name, [record["prompt"]] * n, record["responses"], [record["row"]] * n))
    return Judged(rows, scores)


def labeler_of(row: Row) -> str:
    return str(row["record"].get("labeler", "unnamed"))


def calibration(judged: Judged) -> dict[str, Any]:
    """Is sigmoid(margin) the share of labelers that agree? Before and after temperature scaling (Guo et al. 2017).

    The error after scaling is measured on prompts that the temperature was not fitted on: each half of the prompts with
    the other half's. The temperature that is kept is that of all held-out pairs.
    """
    ece = ExpectedCalibrationError()
    scaled = np.empty_like(judged.margin)
    half = judged.group % 2 == 0
    for fitted_on, used_on in ((half, ~half), (~half, half)):
        temperature = fit_temperature(judged.margin[fitted_on]) if fitted_on.any() else 1.0
        scaled[used_on] = judged.margin[used_on] / temperature
    found: dict[str, Any] = {"temperature": fit_temperature(judged.margin)}
    for name, margins in (("before", judged.margin), ("after", scaled)):
        probability = 1 / (1 + np.exp(-np.abs(margins)))
        outcome = (margins > 0) + 0.5 * (margins == 0)
        found[name] = {
            **ece._compute(probability, outcome, low=0.5),
            "bins": reliability(probability, outcome, low=0.5),
        }
    return found


def length_bias(judged: Judged) -> dict[str, Any]:
    """Does the score follow the length? Correlations, and accuracy where length cannot tell."""
    lengths, scores, of_row = [], [], []
    for index, (row, found) in enumerate(zip(judged.rows, judged.scores, strict=True)):
        lengths += [len(ids) - row["prompt_tokens"] for ids in row["ids"]]
        scores += found
        of_row += [index] * len(found)
    length, score, group = np.array(lengths, float), np.array(scores), np.array(of_row)
    sizes = np.bincount(group)

    def within(values: np.ndarray) -> np.ndarray:
        return values - (np.bincount(group, weights=values) / sizes)[group]

    matched = np.abs(judged.longer) <= LENGTHS_MATCH * judged.longest
    return {
        "correlation": _correlation(length, score),
        "correlation_within_prompt": _correlation(within(length), within(score)),
        "model_prefers_longer": _share((judged.margin > 0) == (judged.longer > 0), judged.longer != 0),
        "labelers_prefer_longer": _share(judged.longer > 0, judged.longer != 0),
        "accuracy_by_length_difference": {
            "preferred is shorter": judged.accuracy(~matched & (judged.longer < 0)),
            "lengths match": judged.accuracy(matched),
            "preferred is longer": judged.accuracy(~matched & (judged.longer > 0)),
        },
    }


def _share(what: np.ndarray, among: np.ndarray) -> float | None:
    return float(what[among].mean()) if among.any() else None


def _correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    return float(np.corrcoef(a, b)[0, 1]) if len(a) > 2 and a.std() > 0 and b.std() > 0 else None


@torch.no_grad()
def sensitivity(model: Any, pad_id: int, judged: Judged, vocabulary: int) -> dict[str, Any]:
    """What must not move a score and what must (Stiennon et al. 2020, appendix).

    edited_after_eos: the largest change of what is read at a response's EOS when other tokens stand behind it.
    swapped_prompts: the best response of each prompt, behind the next prompt instead: share whose score falls, mean change.
    """
    rows = judged.rows[:PROBES]
    texts = [row["ids"][int(np.argmin(row["record"]["ranks"]))] for row in rows]
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for start in range(0, len(texts), 16):
        part = texts[start : start + 16]
        lengths = torch.tensor([len(ids) for ids in part], device=device)
        clean = right_pad([[*ids, *[pad_id] * 8] for ids in part], pad_id).to(device)
        mask = torch.arange(clean.shape[1], device=device) < lengths[:, None]
        noise = torch.randint(0, vocabulary, clean.shape, generator=generator).to(device)
        plain = scores_at(model, clean, mask)
        moved = scores_at(model, torch.where(mask, clean, noise), mask)
        largest = max(largest, (plain - moved).abs().max().item())
    answers = [ids[row["prompt_tokens"] :] for ids, row in zip(texts, rows, strict=True)]
    prompts = [ids[: row["prompt_tokens"]] for ids, row in zip(texts, rows, strict=True)]
    found: dict[str, Any] = {"edited_after_eos": largest, "prompts": len(rows)}
    if len(rows) > 1:
        swapped = [p + a for p, a in zip(prompts[1:] + prompts[:1], answers, strict=True)]
        change = score_ids(model, swapped, pad_id) - score_ids(model, texts, pad_id)
        found["swapped_prompts"] = {
            "share_lower": (change < 0).float().mean().item(),
            "mean_change": change.mean().item(),
        }
    return found


def measure(
    model: Any,
    pad_id: int,
    held_out: Sequence[Row],
    outsiders: Sequence[Row],
    truth: Callable[..., Any] | None,
    truth_name: str | None,
) -> dict[str, Any]:
    """All figures of a reward model: `metrics.json` of the reward stage.

    Args:
        held_out: encoded rankings of unseen prompts by labelers of the training data; outsiders: by others.
        truth: knows the noiseless preference; what it reaches is the ceiling that the labelers' noise leaves.
    """
    judged = judge(model, pad_id, held_out)
    overall = judged.accuracy()
    metrics: dict[str, Any] = {
        "accuracy": overall["accuracy"],
        "accuracy_ci95": overall["ci95"],
        "held_out_pairs": overall["pairs"],
    }
    flat = np.array([s for found in judged.scores for s in found])
    metrics["scores"] = {"mean": float(flat.mean()), "std": float(flat.std(ddof=1)) if len(flat) > 1 else 0.0}
    everyone = judged
    if outsiders:
        strangers = judge(model, pad_id, outsiders)
        metrics["held_out_labeler_accuracy"] = strangers.accuracy()["accuracy"]
        metrics["held_out_labeler_accuracy_ci95"] = strangers.accuracy()["ci95"]
        everyone = Judged(judged.rows + strangers.rows, judged.scores + strangers.scores)
    by_labeler = everyone.by(labeler_of)
    metrics["accuracy_by_labeler"] = {name: found["accuracy"] for name, found in by_labeler.items()}
    metrics["accuracy_by_size"] = judged.by(lambda row: str(len(row["ids"])))
    confidence = judged.by(_confidence)
    if confidence:
        metrics["accuracy_by_confidence"] = confidence
    if overall["pairs"]:
        found = calibration(judged)
        metrics["ece"], metrics["ece_before_scaling"] = found["after"]["ece"], found["before"]["ece"]
        metrics["temperature"] = found["temperature"]
        metrics["calibration"] = {name: found[name]["bins"] for name in ("before", "after")}
        metrics["length_bias"] = length_bias(judged)
    metrics["sensitivity"] = sensitivity(model, pad_id, judged, int(model.config.get_text_config().vocab_size))
    if truth is not None and truth_name is not None:
        ceiling = judge_by(truth, truth_name, everyone.rows)
        metrics["noise_ceiling"] = ceiling.accuracy(ceiling.group < len(judged.rows))["accuracy"]
        ceilings = {name: found["accuracy"] for name, found in ceiling.by(labeler_of).items()}
        metrics["noise_ceiling_by_labeler"] = ceilings
        metrics["share_of_ceiling_by_labeler"] = {
            name: metrics["accuracy_by_labeler"][name] / top for name, top in ceilings.items() if top
        }
    return metrics


def _confidence(row: Row) -> str | None:
    value = row["record"].get("confidence")
    return None if value is None else f"{value:.1f}"

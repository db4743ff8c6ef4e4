"""The verdict of a report: sentences on its numbers, good and bad, at the top of the page."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

FEW_PROMPTS = 50  # below, a win rate is uncertain by more than 14 points either way, and no headline is made of it
PERPLEXITY_RISE = (1.1, 2.0)  # factors over the pretrained model that are a warning, and bad
LENGTH_CORRELATION = 0.5  # of scores and lengths within a prompt
LENGTH_PREFERENCE = 0.1  # by which a reward model prefers the longer response more, or less, often than labelers do
MOSTLY_LONGER = 0.8  # share of pairs in which it prefers the longer response
AGREEMENT_FALL = 0.1  # of the correlation with an independent judge
UNFINISHED = 0.1  # share of answers without a stop token
VARIETY_LOSS = 0.5  # of distinct word pairs, against SFT
MISCALIBRATED = 0.1  # expected calibration error
Level = Literal["bad", "warning", "good"]


@dataclass(frozen=True)
class Finding:
    """One sentence of the verdict."""

    level: Level
    text: str


def verdict(report: dict[str, Any]) -> list[Finding]:
    """The findings of a report in reading order: its limits, win rates by independent judges and by the training reward,
    losses elsewhere, and the reward model's quality."""
    parts = (_limits, _wins, _over_optimisation, _agreement, _tax, _answers, _reward_model)
    return [finding for part in parts for finding in part(report)]


def _limits(report: dict[str, Any]) -> Iterator[Finding]:
    number = report["prompts"]
    if not number:
        yield Finding("warning", "no held-out prompts were answered: no win rates")
    elif number < FEW_PROMPTS:
        yield Finding(
            "warning",
            f"only {number} held-out prompt{'s were' if number > 1 else ' was'} answered: too few for a verdict on win rates "
            f"(a rate is uncertain by about ±{0.98 / math.sqrt(number):.0%}); use at least {FEW_PROMPTS}",
        )
    if report["notes"]:
        count = len(report["notes"])
        yield Finding("warning", f"{count} note{'s' * (count > 1)} on what is missing or changed stand below")


def _wins(report: dict[str, Any]) -> Iterator[Finding]:
    """The last stages against those before, by independent judges first; none where prompts are few."""
    if report["prompts"] < FEW_PROMPTS:
        return
    independent = report["judges"]["independent"]
    for candidate, baseline in (("ppo", "sft"), ("sft", "pretrain")):
        rows = [r for r in report["win_rates"] if (r["candidate"], r["baseline"]) == (candidate, baseline)]
        judged = [row for row in rows if row["judge"] in independent]
        yield from (_win(row, f"judge {row['judge']}") for row in judged)
        if candidate == "ppo" and not judged:
            yield from (_win(row, "the reward it was trained on") for row in rows if row["judge"] == "reward")
            if rows:
                yield Finding(
                    "warning",
                    "no independent judge: a win by the reward that PPO trained on is no evidence of better answers; give "
                    "--judge or --llm-judge",
                )


def _win(row: dict[str, Any], who: str) -> Finding:
    (low, high), rate = row["ci95"], row["win_rate"]
    numbers = f"{rate:.0%} [{low:.0%}, {high:.0%}]"
    if low > 0.5:
        text, level = f"{row['candidate']} beats {row['baseline']} in {numbers} by {who}", "good"
    elif high < 0.5:
        text, level = f"{row['candidate']} loses to {row['baseline']}: it wins {numbers} by {who}", "bad"
    else:
        text, level = f"{row['candidate']} and {row['baseline']} cannot be told apart: {numbers} by {who}", "warning"
    if row["length_controlled"] is None and level == "good":
        text += "; a rate at equal length is not identified, their lengths hardly overlap"
    elif level == "good" and row["length_controlled"] < 0.5:
        text, level = f"{text}, but only {row['length_controlled']:.0%} at equal length", "warning"
    return Finding(level, text)  # type: ignore[arg-type]


def _over_optimisation(report: dict[str, Any]) -> Iterator[Finding]:
    for item in report["over_optimisation"]:
        moves = (
            f"{item['judge']} went from {item['gold_best']:.3g} to {item['gold_end']:.3g} while the reward rose from "
            f"{item['proxy_then']:.3g} to {item['proxy_end']:.3g}"
        )
        if item["fell"]:
            yield Finding(
                "bad", f"over-optimised from rollout {item['step']} ({item['kl']:.3g} nats per response) on: {moves}"
            )
        elif item["fell"] is None:
            yield Finding(
                "warning",
                f"over-optimisation cannot be tested: after rollout {item['step']} {moves}, but this run's history has no "
                f"standard errors (eval_{item['judge']}_se)",
            )


def _agreement(report: dict[str, Any]) -> Iterator[Finding]:
    """Fisher's z-test of a correlation that fell from SFT's answers to PPO's."""
    rows = {(row["stage"], row["judge"]): row for row in report["agreement"]}
    for (stage, judge), after in rows.items():
        before = rows.get(("sft", judge))
        if stage != "ppo" or before is None or min(before["answers"], after["answers"]) < 4:
            continue
        r, s = before["pearson_r"], after["pearson_r"]
        error = math.sqrt(1 / (before["answers"] - 3) + 1 / (after["answers"] - 3))
        z = (math.atanh(min(max(r, -0.9999), 0.9999)) - math.atanh(min(max(s, -0.9999), 0.9999))) / error
        if r - s > AGREEMENT_FALL and z > 1.645:
            yield Finding(
                "bad",
                f"the reward agrees less with {judge} on PPO's answers than on SFT's: correlation {r:.2f} → {s:.2f}; "
                "the policy is moving out of the reward model's training distribution",
            )


def _tax(report: dict[str, Any]) -> Iterator[Finding]:
    perplexities = (report["alignment_tax"] or {}).get("perplexity", {})
    base = perplexities.get("pretrain")
    last = next((name for name in ("ppo", "sft") if name in perplexities), None)
    if base is None or last is None:
        return
    steps = " → ".join(f"{perplexities[n]:.3g} ({n})" for n in ("pretrain", "sft", "ppo") if n in perplexities)
    factor = perplexities[last] / base
    if factor > PERPLEXITY_RISE[0]:
        level: Level = "bad" if factor > PERPLEXITY_RISE[1] else "warning"
        yield Finding(level, f"alignment tax: perplexity on held-out pretraining text rose {steps}")


def _answers(report: dict[str, Any]) -> Iterator[Finding]:
    variety = report["variety"]
    for name in ("sft", "ppo"):
        unfinished = 1 - variety[name]["stopped"] if name in variety else 0.0
        if unfinished > UNFINISHED:
            yield Finding("warning", f"{unfinished:.0%} of {name}'s answers hit the length limit without a stop token")
    if "sft" in variety and "ppo" in variety:
        before, after = variety["sft"]["distinct_2"], variety["ppo"]["distinct_2"]
        if after < VARIETY_LOSS * before:
            yield Finding(
                "warning", f"ppo's answers vary less than sft's: distinct word pairs {before:.2f} → {after:.2f}"
            )


def _reward_model(report: dict[str, Any]) -> Iterator[Finding]:
    metrics = report["stages"].get("reward", {})
    interval, bias = metrics.get("accuracy_ci95"), metrics.get("length_bias") or {}
    if interval and metrics.get("accuracy") is not None:
        low, high = interval
        ceiling = metrics.get("noise_ceiling")
        of = f" (labelers' noise allows {ceiling:.0%})" if ceiling else ""
        text = f"the reward model agrees with labelers on {metrics['accuracy']:.0%} [{low:.0%}, {high:.0%}] of held-out pairs{of}"
        yield Finding("good", text) if low > 0.5 else Finding("bad", f"{text}: no better than chance")
    yield from _length_bias(bias)
    if (metrics.get("ece") or 0.0) > MISCALIBRATED:
        yield Finding("warning", f"the reward model is miscalibrated: expected calibration error {metrics['ece']:.2f}")


def _length_bias(bias: dict[str, Any]) -> Iterator[Finding]:
    correlations = [bias[key] for key in ("correlation_within_prompt", "correlation") if bias.get(key) is not None]
    r = max(correlations, key=abs, default=0.0)
    if abs(r) > LENGTH_CORRELATION:
        yield Finding(
            "bad", f"length bias: the reward model's scores follow the response's length (correlation {r:.2f})"
        )
    model, people = bias.get("model_prefers_longer"), bias.get("labelers_prefer_longer")
    if model is None or people is None:
        return
    if abs(model - people) > LENGTH_PREFERENCE or model > MOSTLY_LONGER:
        yield Finding(
            "bad" if model > MOSTLY_LONGER else "warning",
            f"length bias: the reward model prefers the longer response in {model:.0%} of pairs, labelers in {people:.0%}",
        )

"""What a report of rounds says in sentences: what the last round got, and whether to stop."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipeline.evaluation.verdict import FEW_PROMPTS, Finding

LOW_ALPHA = 0.2  # of Krippendorff's alpha over pairs; below, labels are hardly better than coin flips
LEARNT = 0.01  # of accuracy on held-out labels; a smaller gain counts as none


def findings(report: dict[str, Any], prompts_per_round: int) -> list[Finding]:
    """The findings in reading order; the first one says whether another round is likely to help."""
    last = report["rounds"][-1]
    return [
        *_stop(report, last),
        *_over_optimisation(report),
        *_reward_model(last),
        *_labels(last),
        *_prompts(report, prompts_per_round),
    ]


def _stop(report: dict[str, Any], last: dict[str, Any]) -> Iterator[Finding]:
    judge = report["judge"]
    by = f"by {judge['name']}" if judge["independent"] else "by the reward that it was trained on, which is no evidence"
    low, high = last["win_rate_ci95"]
    rate = f"{last['win_rate']:.0%} [{low:.0%}, {high:.0%}] {by}"
    name, before = f"round {last['round']}", last["against"].replace("-", " ")
    if report["prompts"] < FEW_PROMPTS:
        yield Finding(
            "warning", f"only {report['prompts']} held-out prompts: too few to say whether {name} beats {before}"
        )
    elif low > 0.5:
        yield Finding("good", f"{name} beats {before} in {rate}: another round may help")
    elif high < 0.5:
        yield Finding("bad", f"{name} loses to {before}, it wins {rate}: stop, and keep {before}'s policy")
    else:
        yield Finding("warning", f"{name} and {before} cannot be told apart, {rate}: stop, or label more per round")


def _over_optimisation(report: dict[str, Any]) -> Iterator[Finding]:
    judge = report["judge"]["name"]
    if not report["judge"]["independent"]:
        return
    steps = [report["start"], *report["rounds"]]
    before, last = steps[-2], steps[-1]
    if "reward" in last and last["reward"] > before["reward"] and last[judge] < before[judge]:
        yield Finding(
            "bad",
            f"the reward rose in the last round from {before['reward']:.3g} to {last['reward']:.3g} while {judge} fell from "
            f"{before[judge]:.3g} to {last[judge]:.3g}: the policy exploits the reward model; raise kl_coef or stop",
        )


def _reward_model(last: dict[str, Any]) -> Iterator[Finding]:
    before, after = last["accuracy_before"], last["accuracy_after"]
    if before is None or after is None:
        return
    low = last["accuracy_before_ci95"][0]
    text = f"on round {last['round']}'s labels the reward model before it is right in {before:.0%}, after it in {after:.0%}"
    held_out = (last["held_out_accuracy_before"], last["held_out_accuracy_after"])
    if None not in held_out:
        text += f" (of prompts that training held out: {held_out[0]:.0%} and {held_out[1]:.0%})"
    if low <= 0.5:
        yield Finding("warning", f"{text}: the old one was no better than chance on these answers")
    elif None not in held_out and held_out[1] - held_out[0] < LEARNT:
        yield Finding("warning", f"{text}: the new labels taught it nothing that carries over")
    else:
        yield Finding("good", text)


def _labels(last: dict[str, Any]) -> Iterator[Finding]:
    if last["alpha"] is None:
        yield Finding("warning", "no pair was judged by two labelers, so their agreement is not known; raise `overlap`")
    elif last["alpha"] < LOW_ALPHA:
        yield Finding(
            "warning",
            f"labelers hardly agree (alpha {last['alpha']:.2f}): the answers have become too alike, or the guidelines do "
            "not decide",
        )


def _prompts(report: dict[str, Any], prompts_per_round: int) -> Iterator[Finding]:
    left = report["unseen_prompts"]
    if left < prompts_per_round:
        yield Finding("warning", f"{left:,} unseen prompts are left, a round takes {prompts_per_round:,}; add some")

"""Win rates of one model's answers over another's, and agreement of the judges with the reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.config.stages import ANSWERING
from pipeline.data.records import Record
from pipeline.evaluation.answers import ModelAnswers, dialogue_text
from pipeline.evaluation.intervals import length_controlled, win_rate, wins_of
from pipeline.evaluation.judges import REWARD, REWARD_MODEL, Scores
from pipeline.evaluation.llm_judge import Judge, compare_answers
from pipeline.evaluation.reward_model import correlation
from pipeline.evaluation.run_folder import RunFolder

import numpy as np

BEST_OF = "best_of_"


def win_rates(
    scores: dict[str, Scores], answers: dict[str, ModelAnswers], prompts: Sequence[str], judges: Sequence[str]
) -> list[dict[str, Any]]:
    """Each stage against each earlier one and all against outside models, by every judge; ties count one half.

    Args:
        scores, answers: by model.
        prompts: (prompts,) names of the prompts; one that stands twice is resampled as one.
        judges: in the order in which they are to be read.
    """
    stages = [*ANSWERING[:-1], *(name for name in scores if name.startswith(BEST_OF)), ANSWERING[-1]]
    outside = [name for name in scores if name not in stages]
    names = [*outside, *(name for name in stages if name in scores)]
    rows = []
    for position, candidate in enumerate(names):
        for baseline in reversed(names[:position]):
            longer = answers[candidate].lengths - answers[baseline].lengths
            for judge in judges:
                if judge in scores[candidate] and judge in scores[baseline]:
                    ours, theirs = scores[candidate][judge], scores[baseline][judge]
                    rows.append(
                        {
                            "candidate": candidate,
                            "baseline": baseline,
                            "judge": judge,
                            **win_rate(ours, theirs, prompts).as_dict(),
                            "length_controlled": length_controlled(wins_of(ours, theirs), longer),
                        }
                    )
    return rows


def llm_win_rates(
    judge: Judge, prompts: Sequence[Record], answers: dict[str, ModelAnswers], outside: Sequence[str], run: RunFolder
) -> list[dict[str, Any]]:
    """A language model's win rates: each stage over the one before it, the last stage over best of n and every outside
    model. The judge reads whole dialogues."""
    chain = [name for name in ANSWERING if name in answers]
    pairs = list(zip(chain[1:], chain, strict=False))
    others = [name for name in answers if name.startswith(BEST_OF) or name in outside]
    pairs += [(chain[-1], name) for name in others if chain]
    questions = [dialogue_text(record["prompt"]) for record in prompts]
    rows = []
    for candidate, baseline in pairs:
        ours, theirs = answers[candidate], answers[baseline]
        longer = (ours.lengths - theirs.lengths).astype(int).tolist()
        verdicts = compare_answers(judge, questions, ours.texts, theirs.texts, longer)
        rows.append({"candidate": candidate, "baseline": baseline, "judge": judge.label, **verdicts.as_dict()})
        if verdicts.failed:
            why = ", ".join(sorted({failure["why"] for failure in verdicts.failed})[:3])
            run.note(
                f"{judge.label}: {len(verdicts.failed)} of {len(prompts)} pairs of {candidate} and {baseline} were not "
                f"judged ({why}); they count on neither side and are listed in report.json"
            )
    return rows


def agreement(scores: dict[str, Scores], judges: Sequence[str]) -> list[dict[str, Any]]:
    """Pearson correlation of the reward model's own scores (of the reward, where it is no model) with each judge that
    training never saw, on each model's answers."""
    rows = []
    for stage, judged in scores.items():
        reward = next((name for name in (REWARD_MODEL, REWARD) if name in judged), None)
        for judge in judges:
            if reward is None or judge not in judged:
                continue
            r = correlation(np.array(judged[reward]), np.array(judged[judge]))
            if r is not None:
                rows.append(
                    {"stage": stage, "judge": judge, "of": reward, "pearson_r": r, "answers": len(judged[judge])}
                )
    return rows

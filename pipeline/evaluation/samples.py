"""Answers that the report shows: the first prompts as they came, and the extremes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from pipeline.config.stages import ANSWERING
from pipeline.data.records import Record
from pipeline.evaluation.answers import ModelAnswers, dialogue_text
from pipeline.evaluation.judges import Scores

import numpy as np


def samples(
    prompts: Sequence[Record], answers: dict[str, ModelAnswers], scores: dict[str, Scores], rows: Iterable[int]
) -> list[dict[str, Any]]:
    """Prompts, every turn of them, with each model's answer, its scores, and whether it ended."""
    return [
        {
            "prompt": dialogue_text(prompts[i]["prompt"]),
            "messages": [{"role": m["role"], "content": m["content"]} for m in prompts[i]["prompt"]],
            "responses": {
                name: {
                    "text": answered.texts[i],
                    "stopped": answered.finished[i],
                    "scores": {judge: round(values[i], 3) for judge, values in scores.get(name, {}).items()},
                }
                for name, answered in answers.items()
            },
        }
        for i in rows
    ]


def extremes(answers: dict[str, ModelAnswers], scores: dict[str, Scores]) -> dict[str, int]:
    """Prompts to which the last stage's answer is its longest, its shortest, and each judge's best and worst."""
    last = next((name for name in reversed(ANSWERING) if name in answers), None)
    if last is None or not len(answers[last].texts):
        return {}
    lengths = answers[last].lengths
    rows = {f"longest of {last}": int(np.argmax(lengths)), f"shortest of {last}": int(np.argmin(lengths))}
    for judge, values in scores.get(last, {}).items():
        rows |= {
            f"best of {last} by {judge}": int(np.argmax(values)),
            f"worst of {last} by {judge}": int(np.argmin(values)),
        }
    return rows

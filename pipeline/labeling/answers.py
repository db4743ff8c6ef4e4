"""What a labeler says of an item: checked as it comes from the page, and turned from the order shown to the file's order."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.labeling.refusal import Refused
from pipeline.labeling.settings import STRENGTHS, Settings

QUALITIES = 7


@dataclass(frozen=True)
class Answer:
    """A label. Lists have one entry per response, in the order of the file.

    Attributes:
        ranks: 1 is best, equal ranks tie, None was not compared; empty where the item has no responses.
        strength: of two responses, by how much the better one is better: 1 (negligibly) to 4 (significantly).
        both_bad: two responses, equally bad.
        quality: 1 to 7, or None.
        flags: names of the yes/no questions that were answered with yes.
        response: the answer that the labeler wrote, or "".
    """

    ranks: list[int | None]
    strength: int | None
    both_bad: bool
    quality: list[int | None]
    flags: list[list[str]]
    response: str

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Answer:
        return cls(**json.loads(text))


def parse_answer(raw: Any, shown: Sequence[int], settings: Settings) -> Answer:
    """An answer from the page.

    Args:
        raw: decoded JSON, lists in the order shown.
        shown: which response of the file stood at each place.

    Raises:
        Refused: it is no answer to an item of so many responses.
    """
    if not isinstance(raw, dict):
        raise Refused(422, "An answer is a JSON object.")
    unknown = raw.keys() - {"ranks", "strength", "both_bad", "quality", "flags", "response"}
    if unknown:
        raise Refused(422, f"An answer has no field {sorted(unknown)[0]!r:.60}.")
    ranks = _ranks(raw.get("ranks"), len(shown))
    strength, both_bad = _strength(raw, ranks, settings)
    return Answer(
        ranks=_to_file_order(ranks, shown),
        strength=strength,
        both_bad=both_bad,
        quality=_to_file_order(_quality(raw.get("quality"), len(shown), settings), shown),
        flags=_to_file_order(_flags(raw.get("flags"), len(shown), settings), shown),
        response=_response(raw.get("response"), not shown, settings),
    )


def as_shown(answer: Answer, shown: Sequence[int]) -> dict[str, Any]:
    """The answer as the page has it: lists in the order shown."""
    lists = {
        name: [values[i] for i in shown] if values else []
        for name, values in (("ranks", answer.ranks), ("quality", answer.quality), ("flags", answer.flags))
    }
    return {**asdict(answer), **lists}


def dense_ranks(ranks: Sequence[int | None]) -> list[int | None]:
    """The same order with ranks 1, 2, 3 … without gaps."""
    levels = sorted({rank for rank in ranks if rank is not None})
    return [None if rank is None else levels.index(rank) + 1 for rank in ranks]


def _to_file_order(values: Sequence[Any], shown: Sequence[int]) -> list[Any]:
    ordered: list[Any] = [None] * len(values)
    for place, value in enumerate(values):
        ordered[shown[place]] = value
    return ordered


def _is_whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _ranks(value: Any, responses: int) -> list[int | None]:
    if responses == 0:
        if value not in (None, []):
            raise Refused(422, "This item has no answers to rank.")
        return []
    if not isinstance(value, list) or len(value) != responses:
        raise Refused(422, f"A ranking of {responses} answers has {responses} ranks.")
    if not all(rank is None or _is_whole(rank, 1, responses) for rank in value):
        raise Refused(422, f"A rank is a whole number from 1 to {responses}, or nothing; equal ranks are ties.")
    if sum(rank is not None for rank in value) < 2:
        raise Refused(422, "Rank at least two answers, or skip the item.")
    return dense_ranks(value)


def _strength(raw: dict[str, Any], ranks: list[int | None], settings: Settings) -> tuple[int | None, bool]:
    strength, both_bad = raw.get("strength"), raw.get("both_bad", False)
    if not isinstance(both_bad, bool) or (both_bad and (ranks != [1, 1] or not settings.both_bad)):
        raise Refused(422, "“Both bad” is a tie of two answers.")
    asked = settings.strength and len(ranks) == 2 and ranks[0] != ranks[1]
    if not asked:
        if strength is not None:
            raise Refused(422, "A strength belongs to one of two answers that is better.")
    elif not _is_whole(strength, 1, STRENGTHS):
        raise Refused(422, f"Say how much better it is, from 1 to {STRENGTHS}.")
    return strength, both_bad


def _quality(value: Any, responses: int, settings: Settings) -> list[int | None]:
    if value in (None, []):
        return [None] * responses
    if not isinstance(value, list) or len(value) != responses:
        raise Refused(422, "Quality has one number per answer.")
    if not all(item is None or (settings.quality and _is_whole(item, 1, QUALITIES)) for item in value):
        raise Refused(422, f"Quality is a whole number from 1 to {QUALITIES}, where it is asked for.")
    return value


def _flags(value: Any, responses: int, settings: Settings) -> list[list[str]]:
    if value in (None, []):
        return [[] for _ in range(responses)]
    if not isinstance(value, list) or len(value) != responses or not all(isinstance(names, list) for names in value):
        raise Refused(422, "Flags are one list of names per answer.")
    if not all(isinstance(name, str) and name in settings.flags for names in value for name in names):
        raise Refused(422, "A flag is none of those that are asked for.")
    return [[name for name in settings.flags if name in names] for names in value]


def _response(value: Any, required: bool, settings: Settings) -> str:
    if value is not None and not isinstance(value, str):
        raise Refused(422, "A written answer is text.")
    text = "" if value is None or not value.strip() else value
    if text and not (required or settings.better_answer):
        raise Refused(422, "No written answer is asked for here.")
    if required and not text:
        raise Refused(422, "Write an answer, or skip the item.")
    check_written(text, "answer", settings)
    return text


def check_written(text: str, what: str, settings: Settings) -> None:
    """Refuse a text of a labeler's that is too long, or that no file can keep."""
    if len(text) > settings.max_answer_characters:
        raise Refused(
            422, f"The {what} has {len(text):,} characters; at most {settings.max_answer_characters:,} are kept."
        )
    if any("\ud800" <= character <= "\udfff" for character in text) or "\x00" in text:
        raise Refused(422, f"The {what} holds a character that no file can keep; type it again.")


def seconds_on_task(value: Any, most: float) -> float:
    """Time on task as the page measured it, at most the time since the item was given."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        return 0.0
    return round(min(max(float(value), 0.0), max(most, 0.0)), 1)

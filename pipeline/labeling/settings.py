"""What `label.yaml` of a labeling folder may say."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.data.files import read_text
from pipeline.errors import UserError, shorten

import yaml

FILE = "label.yaml"
GUIDELINES = "guidelines.md"
STRENGTHS = 4  # from negligibly to significantly better
MODES = ("rows", "chat")


@dataclass(frozen=True)
class Settings:
    """One field per key of `label.yaml`; the defaults suit a folder of plain comparisons.

    Attributes:
        title: stands at the top of the page.
        mode: "rows": label the folder's rows; "chat": chat with `model`, and compare two of its answers now and then.
        overlap: how many labelers judge each item.
        calibration_every: one item in so many comes from the calibration file, for each labeler.
        strength: ask by how much the better one of two answers is better, in four steps.
        margins: the `margin` that is exported for each strength (Llama 2's "small" margins).
        both_bad: offer "both bad" beside the tie of two answers.
        quality: ask for an overall quality of 1 to 7 per answer.
        flags: yes/no questions per answer (InstructGPT asked, e.g., "Hallucination", "Gives harmful advice").
        better_answer: let labelers write a better answer; it becomes a demonstration.
        skip_reasons: what a labeler may choose from when skipping.
        reserve_minutes: how long an item that was opened is kept for its labeler.
        max_answer_characters: of an answer or a question that a labeler writes.
        model: of a chat: one, or two whose answers are compared. The first one answers where nothing is compared.
        system: the system prompt of conversations that begin from now on.
        compare_every: each so many-th question of a conversation gets two answers.
        max_turns: questions in a conversation.
        max_tokens: of an answer.
        temperature: of all answers; 0 takes the likeliest token.
    """

    title: str = "Labeling"
    mode: str = "rows"
    overlap: int = 1
    calibration_every: int = 10
    strength: bool = True
    margins: tuple[float, ...] = (0.0, 0.3333, 0.6667, 1.0)
    both_bad: bool = True
    quality: bool = False
    flags: tuple[str, ...] = ()
    better_answer: bool = False
    skip_reasons: tuple[str, ...] = ("I cannot judge this", "The prompt makes no sense", "Harmful or private content")
    reserve_minutes: float = 30.0
    max_answer_characters: int = 20_000
    model: tuple[str, ...] = ()
    system: str = ""
    compare_every: int = 2
    max_turns: int = 20
    max_tokens: int = 512
    temperature: float = 1.0


_CHAT_KEYS = ("model", "system", "compare_every", "max_turns", "max_tokens", "temperature")
_ROW_KEYS = ("overlap", "calibration_every")
_RANGES = {
    "overlap": (1, 1000),
    "calibration_every": (2, 1_000_000),
    "reserve_minutes": (1, 10_080),
    "max_answer_characters": (1, 200_000),
    "compare_every": (1, 1000),
    "max_turns": (1, 1000),
    "max_tokens": (1, 32_768),
    "temperature": (0, 100),
}


def read_settings(folder: Path) -> Settings:
    """The settings of a labeling folder.

    Raises:
        UserError: `label.yaml` is no YAML mapping, has an unknown key, or a value of a wrong type or range.
    """
    path = folder / FILE
    if not path.exists():
        return Settings()
    text = read_text(path)
    try:
        given = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        line = error.problem_mark.line + 1 if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark else None
        raise UserError("is no valid YAML; write one `key: value` per line", file=path, line=line) from None
    if not isinstance(given, dict):
        raise UserError("must hold `key: value` lines", file=path)
    names = [field.name for field in dataclasses.fields(Settings)]
    values = {}
    for key, value in given.items():
        line = _line_of(str(key), text)
        if key not in names:
            raise UserError(f"unknown key {shorten(key)}; keys are {', '.join(names)}", file=path, line=line)
        try:
            values[key] = _checked(key, value)
        except ValueError as error:
            raise UserError(f"`{key}` {error}, got {shorten(value)}", file=path, line=line) from None
    settings = Settings(**values)
    if wrong := _contradiction(settings, values):
        raise UserError(wrong[1], file=path, line=_line_of(wrong[0], text))
    return settings


def setting_error(folder: Path, key: str, message: str) -> UserError:
    """An error that names the line of a key in `label.yaml`."""
    return UserError(message, file=folder / FILE, line=_line_of(key, read_text(folder / FILE)))


def _contradiction(settings: Settings, given: Collection[str]) -> tuple[str, str] | None:
    """A key that does not go with the others, and why."""
    chat = settings.mode == "chat"
    for key in _ROW_KEYS if chat else _CHAT_KEYS:
        if key in given:
            return key, f"`{key}` means nothing with `mode: {settings.mode}`; leave one of them out"
    if chat and not settings.model:
        return "mode", "`mode: chat` needs `model:`, the folder of a model (or a list of two)"
    if chat and len(settings.model) == 1 and settings.temperature == 0:
        return (
            "temperature",
            "with `temperature: 0` one model gives the same answer twice; raise it, or name two models",
        )
    return None


def _line_of(key: str, text: str) -> int | None:
    match = re.search(rf"^[\s\"']*{re.escape(key)}[\"']?\s*:", text, re.MULTILINE)
    return text.count("\n", 0, match.end()) + 1 if match else None


def _checked(key: str, value: Any) -> Any:
    default = getattr(Settings(), key)
    if key == "model":
        return _checked_models([value] if isinstance(value, str) else value)
    if key == "mode" and value not in MODES:
        raise ValueError(f"must be {' or '.join(MODES)}")
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise ValueError("must be true or false")
        return value
    if isinstance(default, str):
        if not isinstance(value, str):
            raise ValueError("must be text")
        return value
    if isinstance(default, tuple):
        return _checked_list(key, value)
    low, high = _RANGES[key]
    kinds = (int,) if isinstance(default, int) else (int, float)
    if not isinstance(value, kinds) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"must be a {'whole ' if kinds == (int,) else ''}number from {low} to {high}")
    return value


def _checked_models(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) and name.strip() for name in value):
        raise ValueError("must be the folder of a model, or a list of two")
    if not 1 <= len(set(value)) == len(value) <= 2:
        raise ValueError("must name one model, or two different ones")
    return tuple(value)


def _checked_list(key: str, value: Any) -> tuple[Any, ...]:
    if key == "margins":
        numbers = isinstance(value, list) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in value)
        if not numbers or len(value) != STRENGTHS or not all(0 <= v <= 1e6 for v in value) or sorted(value) != value:
            raise ValueError(f"must be {STRENGTHS} rising numbers from 0, of negligibly to significantly better")
        return tuple(float(v) for v in value)
    if not isinstance(value, list) or not all(isinstance(v, str) and 0 < len(v.strip()) <= 200 for v in value):
        raise ValueError("must be a list of short texts")
    if len(set(value)) != len(value):
        raise ValueError("must not name anything twice")
    return tuple(value)

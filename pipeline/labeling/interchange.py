"""Label Studio's and Argilla's files, read and written.

Written: Label Studio tasks with a `Ranker` (one bucket per rank, so that ties and unranked answers have a place), Argilla
records with a ranking question. What both lack (strength, both bad) is written as further questions. Read: the same, and whatever
`pipeline.data.layouts` reads of these tools.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.data.files import RecordError, UnusableRecord, iter_rows
from pipeline.data.layouts import expand_row
from pipeline.data.records import parse_prompt, parse_ranking
from pipeline.errors import UserError
from pipeline.labeling.answers import Answer, dense_ranks
from pipeline.labeling.export import Label, labels_to_export
from pipeline.labeling.store import Store

_UNRANKED = "_"  # Label Studio's name of the bucket where items lie at first
FORMATS = ("label-studio", "argilla")


@dataclass(frozen=True)
class ImportedLabel:
    """One person's judgement in a file of another tool."""

    labeler: str
    answer: Answer
    seconds: float
    shown: list[int] | None = None  # None where the tool does not say
    at: float | None = None
    adjudication: bool = False


@dataclass
class ImportedItem:
    """A task with its judgements."""

    line: int
    row: dict[str, Any]
    labels: list[ImportedLabel] = field(default_factory=list)


# ------------------------------------------------------------------------------------------------ writing


def write_labels(store: Store, format_name: str, path: Path) -> int:
    """All labels as a file of another tool; returns how many.

    Raises:
        UserError: the file exists.
    """
    if path.exists():
        raise UserError("exists; name another file with --to", file=path)
    with store.reader() as connection:
        tasks: dict[str, list[Label]] = {}
        for label in labels_to_export(connection):
            tasks.setdefault(label.item_key, []).append(label)
    task = _label_studio_task if format_name == "label-studio" else _argilla_record
    rows = [task(number, labels) for number, labels in enumerate(tasks.values(), 1)]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(rows, file, ensure_ascii=False, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return sum(map(len, tasks.values()))


def _answers_by_question(label: Label) -> dict[str, Any]:
    """Everything but the ranks, as questions: those that were answered."""
    answer = label.answer
    questions: dict[str, Any] = {"strength": answer.strength, "response": answer.response or None}
    questions["both_bad"] = "yes" if answer.both_bad else None
    questions["adjudication"] = "yes" if label.adjudication else None
    questions["shown"] = [str(place) for place in label.shown] or None
    questions["labeled_at"] = repr(label.at)
    for place, (quality, flags) in enumerate(zip(answer.quality, answer.flags, strict=True)):
        questions |= {f"quality-{place}": quality, f"flags-{place}": flags or None}
    return {name: value for name, value in questions.items() if value is not None}


def _label_studio_task(number: int, labels: Sequence[Label]) -> dict[str, Any]:
    row = labels[0].row
    items = [
        {"id": str(place), "title": f"Answer {place + 1}", "body": text} for place, text in enumerate(row["responses"])
    ]
    data = {**{name: value for name, value in row.items() if name != "responses"}, "items": items}
    return {"id": number, "data": data, "annotations": [_annotation(label) for label in labels]}


def _annotation(label: Label) -> dict[str, Any]:
    results: list[dict[str, Any]] = []
    if label.answer.ranks:
        buckets: dict[str, list[str]] = {}
        for place, rank in enumerate(label.answer.ranks):
            buckets.setdefault(_UNRANKED if rank is None else f"rank-{rank}", []).append(str(place))
        results.append({"from_name": "ranking", "to_name": "items", "type": "ranker", "value": {"ranker": buckets}})
    for name, value in _answers_by_question(label).items():
        kind, held = ("rating", value) if isinstance(value, int) else ("choices", value)
        if name in ("response", "labeled_at"):
            kind, held = "textarea", [value]
        elif isinstance(value, str):
            held = [value]
        key = "text" if kind == "textarea" else kind
        results.append({"from_name": name, "to_name": "prompt", "type": kind, "value": {key: held}})
    return {
        "completed_by": {"email": label.labeler},
        "lead_time": label.seconds,
        "was_cancelled": False,
        "result": results,
    }


def _argilla_record(number: int, labels: Sequence[Label]) -> dict[str, Any]:
    row = labels[0].row
    fields: dict[str, Any] = {"prompt": row["prompt"]}
    fields |= {f"response-{place}": text for place, text in enumerate(row["responses"])}
    responses: dict[str, list[dict[str, Any]]] = {}
    for label in labels:
        questions = _answers_by_question(label)
        ranked = [
            {"value": f"response-{place}", "rank": rank}
            for place, rank in enumerate(label.answer.ranks)
            if rank is not None
        ]
        if ranked:
            questions["ranking"] = ranked
        questions["seconds"] = label.seconds
        for name, value in questions.items():
            entry = {"user_id": label.labeler, "value": value, "status": "submitted"}
            responses.setdefault(name, []).append(entry)
    metadata = {name: value for name, value in row.items() if name not in ("prompt", "responses")}
    return {"id": str(number), "status": "completed", "fields": fields, "metadata": metadata, "responses": responses}


# ------------------------------------------------------------------------------------------------ reading


def read_labels(path: Path) -> Iterator[ImportedItem]:
    """The tasks of a file of Label Studio or Argilla.

    Raises:
        UserError: with the line of the first row that is no such task.
    """
    for file_row in iter_rows(path):
        try:
            if file_row.columns is None:
                raise RecordError(file_row.error or "no row")
            yield _imported(file_row.columns, file_row.line)
        except (RecordError, KeyError, TypeError, ValueError, AttributeError) as error:
            reason = (
                str(error)
                if isinstance(error, RecordError)
                else f"no task that can be read ({type(error).__name__}: {error})"
            )
            raise UserError(f"{reason}; nothing was imported", file=path, line=file_row.line) from None


def _imported(row: dict[str, Any], line: int) -> ImportedItem:
    data, fields = row.get("data"), row.get("fields")
    if isinstance(data, dict) and isinstance(data.get("items"), list):
        return _from_ranker(row, line)
    if isinstance(fields, dict):
        return _from_argilla(row, line)
    if isinstance(data, dict):
        return _from_other_task(row, line)
    raise RecordError(
        "is neither a Label Studio task (`data`, `annotations`) nor an Argilla record (`fields`, `responses`)"
    )


def _from_ranker(row: dict[str, Any], line: int) -> ImportedItem:
    items = row["data"]["items"]
    places = {str(item["id"]): place for place, item in enumerate(items)}
    rest = {name: value for name, value in row["data"].items() if name != "items"}
    texts = [item.get("body") or item.get("html") or item["title"] for item in items]
    imported = ImportedItem(line=line, row={**rest, "responses": texts})
    for annotation in row.get("annotations") or ():
        if annotation.get("was_cancelled"):
            continue
        questions: dict[str, Any] = {}
        ranks: list[int | None] = [None] * len(items)
        for result in annotation["result"]:
            value = result["value"]
            if "ranker" in value:
                for rank, place in _ranker_ranks(value["ranker"], places):
                    ranks[place] = rank
            else:
                key = next(key for key in ("rating", "choices", "text") if key in value)
                questions[result["from_name"]] = value[key]
        imported.labels.append(
            _label(
                labeler=_annotator(annotation.get("completed_by")),
                ranks=ranks,
                questions=questions,
                seconds=annotation.get("lead_time"),
            )
        )
    return imported


def _ranker_ranks(buckets: dict[str, list[Any]], places: dict[str, int]) -> Iterator[tuple[int, int]]:
    """(rank, place) of each ranked item: by bucket where buckets are ranks, else by the order in the one list."""
    for name, members in buckets.items():
        if name == _UNRANKED and len(buckets) > 1:
            continue
        match = re.fullmatch(r"rank-(\d+)", name)
        for order, member in enumerate(members, 1):
            if not match and len([b for b in buckets if b != _UNRANKED]) > 1:
                raise RecordError(f"buckets of a ranker must be called rank-1, rank-2, …, got {name!r:.60}")
            yield (int(match[1]) if match else order), places[str(member)]


def _annotator(by: Any) -> str:
    if isinstance(by, dict):
        by = by.get("email", by.get("id"))
    return "unknown" if by is None else str(by)


def _from_argilla(row: dict[str, Any], line: int) -> ImportedItem:
    fields, responses = row["fields"], row.get("responses") or {}
    ranked = {
        item["value"] if isinstance(item, dict) else item
        for answers in responses.values()
        for answer in answers
        if isinstance(answer.get("value"), list)
        for item in answer["value"]
        if (item["value"] if isinstance(item, dict) and "rank" in item else item if isinstance(item, str) else "")
        in fields
    }
    stems = {_stem(name) for name in ranked} or {"response"}
    names = [name for name in fields if name in ranked or (_stem(name) in stems and name != _stem(name))]
    others = {name: value for name, value in fields.items() if name not in names}
    kept = {**(row.get("metadata") or {}), **others}
    imported = ImportedItem(line=line, row={**kept, "responses": [fields[name] for name in names]})
    users: dict[str, dict[str, Any]] = {}
    for question, answers in responses.items():
        for answer in answers:
            if answer.get("status", "submitted") == "submitted":
                users.setdefault(str(answer.get("user_id")), {})[question] = answer["value"]
    for user, questions in users.items():
        ranks: list[int | None] = [None] * len(names)
        for question, value in questions.items():
            ranking = isinstance(value, list) and question != "shown" and not question.startswith("flags-")
            for place, item in enumerate(value, 1) if ranking else ():
                name, rank = (item["value"], item["rank"]) if isinstance(item, dict) else (item, place)
                if name in names:
                    ranks[names.index(name)] = int(rank)
        imported.labels.append(_label(labeler=user, ranks=ranks, questions=questions, seconds=questions.get("seconds")))
    return imported


def _stem(name: str) -> str:
    return re.sub(r"[-_ ]?(\d+|[a-z])$", "", name)


def _from_other_task(row: dict[str, Any], line: int) -> ImportedItem:
    """Whatever else the stages read of Label Studio: two answers and which one won."""
    imported = ImportedItem(line=line, row={})
    try:
        judgements = list(expand_row({**row, "annotations": row.get("annotations") or []}))
    except UnusableRecord:
        judgements = [{**row["data"], "winner": "tie"}]
    for judged in judgements:
        record = parse_ranking(judged)
        prompt = row["data"].get("prompt")
        imported.row = {
            "prompt": prompt if isinstance(prompt, str) else record["prompt"],
            "responses": record["responses"],
        }
        if row.get("annotations"):
            ranks: list[int | None] = list(record["ranks"])
            labeler = record.get("labeler", "unknown")
            imported.labels.append(_label(labeler=labeler, ranks=ranks, questions={}, seconds=None))
    return imported


def _label(*, labeler: str, ranks: list[int | None], questions: dict[str, Any], seconds: Any) -> ImportedLabel:
    def first(name: str) -> Any:
        value = questions.get(name)
        return value[0] if isinstance(value, list) and value else value

    if ranks and sum(rank is not None for rank in ranks) < 2:
        raise RecordError("a judgement that ranks fewer than two answers")
    strength, at, shown = first("strength"), first("labeled_at"), questions.get("shown")
    answer = Answer(
        ranks=dense_ranks(ranks),
        strength=int(strength) if strength is not None else None,
        both_bad=first("both_bad") == "yes",
        quality=[questions.get(f"quality-{place}") for place in range(len(ranks))],
        flags=[list(questions.get(f"flags-{place}") or []) for place in range(len(ranks))],
        response=first("response") or "",
    )
    return ImportedLabel(
        labeler=labeler,
        answer=answer,
        seconds=float(seconds or 0),
        shown=[int(place) for place in shown] if shown else None,
        at=float(at) if at else None,
        adjudication=first("adjudication") == "yes",
    )


def check_prompt(item: ImportedItem) -> None:
    """Refuse a task without a prompt."""
    parse_prompt(item.row)

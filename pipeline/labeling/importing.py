"""Another tool's tasks and judgements into a labeling folder: rows in a file, judgements in the store."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.files import RecordError
from pipeline.errors import UserError
from pipeline.labeling.assignment import give, recount_slots
from pipeline.labeling.interchange import ImportedItem, ImportedLabel, check_prompt, read_labels
from pipeline.labeling.items import item_key
from pipeline.labeling.labelers import check_name
from pipeline.labeling.labels import current_label
from pipeline.labeling.project import Project, open_project
from pipeline.labeling.settings import read_settings, setting_error


@dataclass(frozen=True)
class Imported:
    """What an import did."""

    rows: Path
    items: int
    labels: int
    there_already: int


def import_labels(folder: Path, source: Path) -> Imported:
    """Read a file of Label Studio or Argilla. The same file again changes nothing.

    Raises:
        UserError: a task that cannot be read, or a judgement that differs from one that is there already.
    """
    if not source.is_file():
        raise UserError("does not exist", file=source)
    folder.mkdir(parents=True, exist_ok=True)
    if read_settings(folder).mode == "chat":
        raise setting_error(folder, "mode", "with `mode: chat` no rows are labeled; import into a folder of its own")
    items = list(read_labels(source))
    for item in items:
        try:
            check_prompt(item)
        except RecordError as error:
            raise UserError(str(error), file=source, line=item.line) from None
        for label in item.labels:
            check_name(label.labeler)
    target = folder / f"imported-{source.name.partition('.')[0]}.jsonl"
    if target.resolve() == source.resolve():
        raise UserError("is a file of the labeling folder itself; import another", file=source)
    _write_rows(target, items)
    project = open_project(folder)
    try:
        added, there = _store_labels(project, source, items)
    finally:
        project.store.close()
    return Imported(rows=target, items=len(items), labels=added, there_already=there)


def _write_rows(target: Path, items: list[ImportedItem]) -> None:
    temporary = target.with_name(target.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        for item in items:
            file.write(json.dumps(item.row, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, target)


def _store_labels(project: Project, source: Path, items: list[ImportedItem]) -> tuple[int, int]:
    added = there = 0
    with project.store.transaction() as connection:
        for item in items:
            key = item_key(item.row)
            row = connection.execute("SELECT id FROM items WHERE key = ?", (key,)).fetchone()
            if row is None:
                continue  # left out when the rows were read, which said why
            for label in item.labels:
                labeler = _labeler(project, label.labeler)
                current = current_label(connection, labeler, row["id"])
                if current is None:
                    _store_label(project, label=label, item=row["id"], labeler=labeler)
                    added += 1
                elif current["answer"] != label.answer.to_json():
                    raise UserError(
                        f"{label.labeler!r} has another label for this row here already; nothing was imported",
                        file=source,
                        line=item.line,
                    )
                else:
                    there += 1
        recount_slots(connection, project.settings.overlap)
    return added, there


def _labeler(project: Project, name: str) -> int:
    """The labeler of that name; a new one has no link until `users link` makes one."""
    connection = project.store.connection
    connection.execute("INSERT OR IGNORE INTO labelers (name, lead) VALUES (?, 0)", (name,))
    return int(connection.execute("SELECT id FROM labelers WHERE name = ?", (name,)).fetchone()["id"])


def _store_label(project: Project, *, label: ImportedLabel, item: int, labeler: int) -> None:
    connection = project.store.connection
    give(project.store, project.settings, labeler=labeler, item=item)
    file_order = list(range(len(label.answer.ranks)))
    shown = file_order if label.shown is None or sorted(label.shown) != file_order else label.shown
    connection.execute(
        "UPDATE assignments SET state = 'done', shown = ?, adjudication = ? WHERE item = ? AND labeler = ?",
        (json.dumps(shown), label.adjudication, item, labeler),
    )
    connection.execute(
        "INSERT INTO labels (item, labeler, request, kind, answer, seconds, at, current) VALUES (?, ?, ?, 'label', ?, ?, ?, 1)",
        (
            item,
            labeler,
            f"import-{item}-{labeler}",
            label.answer.to_json(),
            label.seconds,
            label.at or project.store.now(),
        ),
    )

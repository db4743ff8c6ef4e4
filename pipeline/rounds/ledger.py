"""The ledger of a run of rounds: which prompt was given to which round. No prompt is given twice."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from pipeline.data.hashing import sha256_json
from pipeline.data.records import Record
from pipeline.errors import UserError

FILE = "ledger.jsonl"


def prompt_key(record: Record) -> str:
    return sha256_json(record["prompt"])


class Ledger:
    """`ledger.jsonl`: one line per prompt, appended and never changed.

    Attributes:
        rounds: the round of each prompt, by its key.

    Raises:
        UserError: a line that is none of ours.
    """

    def __init__(self, folder: Path):
        self.path = folder / FILE
        self.rounds: dict[str, int] = {}
        end = 0
        for number, line in enumerate(self._lines(), 1):
            if not line.endswith(b"\n"):  # a kill left it half written
                os.truncate(self.path, end)
                break
            end += len(line)
            try:
                entry = json.loads(line)
                self.rounds[str(entry["prompt"])] = int(entry["round"])
            except (ValueError, KeyError, TypeError):
                raise UserError("is no line of a ledger; restore the file", file=self.path, line=number) from None

    def _lines(self) -> Iterable[bytes]:
        return self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []

    def take(self, number: int, candidates: Sequence[Record], wanted: int) -> list[Record]:
        """Prompts for round `number`: those that it has already (a start was interrupted), then unseen ones, in order.

        Raises:
            UserError: none is left.
        """
        different = list({prompt_key(record): record for record in reversed(candidates)}.items())[::-1]
        own = [record for key, record in different if self.rounds.get(key) == number]
        unseen = [record for key, record in different if key not in self.rounds][: max(0, wanted - len(own))]
        if not own and not unseen:
            raise UserError(
                f"no prompts left: the rounds so far had all {len(different):,}; add some to `prompts:` of round.yaml",
                file=self.path,
            )
        self._append(number, unseen)
        chosen = {prompt_key(record) for record in [*own, *unseen]}
        return [record for key, record in different if key in chosen]

    def _append(self, number: int, records: Sequence[Record]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            for record in records:
                entry = {
                    "round": number,
                    "prompt": prompt_key(record),
                    "file": record.get("file"),
                    "line": record["line"],
                }
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
                self.rounds[prompt_key(record)] = number
            file.flush()
            os.fsync(file.fileno())

    def left(self, candidates: Iterable[Record]) -> int:
        """How many different prompts no round has had."""
        return len({key for record in candidates if (key := prompt_key(record)) not in self.rounds})

    def check_labels(self, path: Path, records: Iterable[Record], number: int) -> None:
        """
        Raises:
            UserError: a label is of a prompt that round `number` was not given: another round's labels, or other rows.
        """
        others: Counter[str] = Counter()
        first = None
        for record in records:
            if (owner := self.rounds.get(prompt_key(record))) != number:
                others["of no round" if owner is None else f"of round {owner}"] += 1
                first = first or record["line"]
        if others:
            what = ", ".join(f"{count} labels {owner}" for owner, count in others.items())
            raise UserError(
                f"these are not the labels of round {number} ({what}); put that round's labeling folder in its place",
                file=path,
                line=first,
            )

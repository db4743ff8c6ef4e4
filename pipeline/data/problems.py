"""What is wrong in a source, collected over all its rows and said at once."""

from __future__ import annotations

from pipeline.errors import UserError

MAX_LISTED = 20


class Problems:
    """Collects what is wrong in a source, and raises a UserError: one line per fault, with the lines that have it."""

    def __init__(self, source: str):
        self.source = source
        self.lines: dict[str, list[int]] = {}  # message → lines, the first MAX_LISTED in all
        self.count = 0

    def add(self, line: int, message: str) -> None:
        self.count += 1
        if self.count <= MAX_LISTED:
            self.lines.setdefault(message, []).append(line)

    def refuse(self) -> None:
        if not self.count:
            return
        faults = [
            f"{self.source}:{lines[0]}: {message}"
            + (f" (also lines {', '.join(map(str, lines[1:]))})" if lines[1:] else "")
            for message, lines in self.lines.items()
        ]
        if self.count > MAX_LISTED:
            faults.append(f"… and {self.count - MAX_LISTED} more in {self.source}")
        raise UserError("\n".join(faults))

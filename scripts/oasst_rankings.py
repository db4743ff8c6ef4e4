#!/usr/bin/env python
"""OpenAssistant message trees to rankings: all ranked answers to the same messages, best first.

    python scripts/oasst_rankings.py messages.jsonl rankings.jsonl [--lang en]

Answers without a rank, deleted or synthetic ones are left out and counted; so are prompts with fewer than two answers.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

ROLES = {"prompter": "user", "assistant": "assistant"}


def rankings(messages: list[dict[str, Any]], lang: str | None, left_out: Counter[str]) -> list[dict[str, Any]]:
    """One row (prompt, responses, ranks, id) for every message that was answered more than once."""
    by_id = {message["message_id"]: message for message in messages}
    answers: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for message in messages:
        if message["role"] != "assistant":
            continue
        if message.get("deleted") or message.get("synthetic"):
            left_out["deleted or synthetic answers"] += 1
        elif message.get("rank") is None:
            left_out["answers without a rank"] += 1
        elif lang is None or message["lang"] == lang:
            answers[message["parent_id"]].append(message)
    rows = []
    for parent, ranked in answers.items():
        if len(ranked) < 2:
            left_out["prompts with one ranked answer"] += 1
            continue
        dialogue: list[dict[str, str]] = []
        above: str | None = parent
        while above is not None and above in by_id:
            message = by_id[above]
            dialogue.insert(0, {"role": ROLES[message["role"]], "content": message["text"]})
            above = message["parent_id"]
        if above is not None:
            left_out["prompts whose tree is incomplete"] += 1
            continue
        ranked.sort(key=lambda message: message["rank"])
        rows.append(
            {
                "prompt": dialogue,
                "responses": [message["text"] for message in ranked],
                "ranks": [message["rank"] + 1 for message in ranked],
                "id": parent,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("messages", type=Path, help="JSONL, one message a line, as on the Hub")
    parser.add_argument("rankings", type=Path, help="JSONL to write")
    parser.add_argument("--lang", help="keep answers of one language only, e.g. en")
    args = parser.parse_args()
    left_out: Counter[str] = Counter()
    messages = [json.loads(line) for line in args.messages.read_text(encoding="utf-8").splitlines() if line.strip()]
    rows = rankings(messages, args.lang, left_out)
    args.rankings.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    rest = "".join(f"; left out {count} {what}" for what, count in sorted(left_out.items()))
    print(f"{len(rows)} rankings in {args.rankings}{rest}")


if __name__ == "__main__":
    main()

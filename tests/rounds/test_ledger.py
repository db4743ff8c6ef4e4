"""The ledger of rounds: no prompt is given twice, whatever interrupts a start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.rounds.ledger import Ledger, prompt_key

import pytest


def prompts(count: int) -> list[Any]:
    return [
        {"prompt": [{"role": "user", "content": f"Question {n}"}], "line": n + 1, "file": "p.jsonl"}
        for n in range(count)
    ]


def test_no_prompt_is_given_to_two_rounds(tmp_path: Path) -> None:
    taken = [prompt_key(r) for n in (1, 2, 3) for r in Ledger(tmp_path).take(n, prompts(10), 3)]
    assert len(taken) == len(set(taken)) == 9
    assert len(Ledger(tmp_path).take(4, prompts(10), 3)) == 1
    with pytest.raises(UserError, match="no prompts left: the rounds so far had all 10; add some"):
        Ledger(tmp_path).take(5, prompts(10), 3)


def test_a_prompt_that_stands_twice_in_the_data_is_given_once(tmp_path: Path) -> None:
    assert len(Ledger(tmp_path).take(1, prompts(3) + prompts(3), 10)) == 3


def test_an_interrupted_start_keeps_its_prompts_and_fills_up(tmp_path: Path) -> None:
    first = Ledger(tmp_path).take(1, prompts(10), 4)
    with (tmp_path / "ledger.jsonl").open("a") as file:
        file.write('{"round": 1, "prom')  # a kill within a line
    again = Ledger(tmp_path).take(1, prompts(10), 6)
    assert again[:4] == first
    assert len(again) == 6
    assert {prompt_key(r) for r in again}.isdisjoint(prompt_key(r) for r in Ledger(tmp_path).take(2, prompts(10), 4))
    assert (tmp_path / "ledger.jsonl").read_bytes().endswith(b"\n")


def test_a_damaged_ledger_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "ledger.jsonl").write_text('{"round": 1, "prompt": "a"}\n[]\n')
    with pytest.raises(UserError, match=r"ledger.jsonl:2: is no line of a ledger"):
        Ledger(tmp_path)


def test_labels_of_another_round_are_refused_with_their_line(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    one, two = ledger.take(1, prompts(10), 4), ledger.take(2, prompts(10), 4)
    ledger.check_labels(tmp_path / "l.jsonl", one, 1)
    with pytest.raises(UserError, match=r"l.jsonl:\d+: these are not the labels of round 1 \(4 labels of round 2\)"):
        ledger.check_labels(tmp_path / "l.jsonl", [*one, *two], 1)

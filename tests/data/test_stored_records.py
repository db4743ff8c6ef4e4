"""Columns beside stored records decide what the records themselves would decide."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.data.comparisons import find_invalid_rankings, labelers_of, stored_invalid_rankings
from pipeline.data.entries import DatasetEntry
from pipeline.data.parallel import map_batches
from pipeline.data.sources import read_source
from pipeline.data.splits import is_held_out
from pipeline.errors import UserError

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROWS = st.fixed_dictionaries(
    {
        "prompt": st.sampled_from("pq"),
        "responses": st.lists(st.sampled_from(["a", "b", "c", " "]), min_size=1, max_size=3),
    },
    optional={"labeler": st.sampled_from(["ana", "ben"]), "split": st.sampled_from(["train", "test"])},
)


@st.composite
def rankings(draw: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = draw(st.lists(ROWS, min_size=1, max_size=14))
    return [
        {
            **row,
            "ranks": draw(st.lists(st.integers(1, 2), min_size=len(row["responses"]), max_size=len(row["responses"]))),
        }
        for row in rows
    ]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rankings(), st.sampled_from(["drop", "half"]), st.sampled_from([0.0, 0.3, 0.9]))
def test_stored_rankings_are_judged_and_split_like_records(
    tmp_path: Path, rows: list[dict[str, Any]], ties: str, fraction: float
) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = read_source(DatasetEntry(path="a.jsonl"), "ranking", tmp_path)
    records = list(source.records)
    valid, problems = stored_invalid_rankings(source.records, ties)
    assert (valid.tolist(), problems) == find_invalid_rankings(records, ties)
    chosen = source.records.select(valid)
    assert chosen.held_out(fraction).tolist() == [is_held_out(records[i], fraction) for i in valid]
    assert [record["line"] for record in chosen] == [records[i]["line"] for i in valid]
    assert labelers_of([source]) == sorted({r["labeler"] for r in records if "labeler" in r})


def test_batches_come_back_in_order_from_several_processes() -> None:
    batches = [[n, n + 1] for n in range(0, 100, 2)]
    assert list(map_batches(sum, iter(batches), processes=2)) == [sum(batch) for batch in batches]


def test_the_first_error_of_several_processes_is_raised() -> None:
    def refuse(batch: int) -> int:
        if batch in (17, 31):
            raise UserError(f"row {batch}", file="a.jsonl", line=batch)
        return batch

    with pytest.raises(UserError, match=r"^a\.jsonl:17: row 17$"):
        list(map_batches(refuse, range(60), processes=2))

"""Labelers' files: every accepted form reads the same, every wrong row is named with its line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from pipeline.data.comparisons import find_invalid_rankings, pairs_of, summary
from pipeline.data.entries import DatasetEntry
from pipeline.data.records import PARSERS, parse_demonstration, parse_prompt, parse_ranking, read_records
from pipeline.data.sources import read_source
from pipeline.data.splits import split_key, split_records
from pipeline.errors import UserError

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

USER = [{"role": "user", "content": "Hi"}]
PAIR = {"prompt": USER, "responses": ["good", "bad"], "ranks": [1, 2]}
HH = "\n\nHuman: Hi\n\nAssistant: "


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "chosen": "good", "rejected": "bad"},
        {"prompt": USER, "chosen": "good", "rejected": "bad"},
        {"prompt": "Hi", "winner": "good", "loser": "bad"},
        {"prompt": "Hi", "winning_response": "good", "losing_response": "bad"},
        {"prompt": "Hi", "responses": ["good", "bad"], "ranks": [1, 2]},
        {"chosen": HH + "good", "rejected": HH + "bad"},
        {
            "prompt": "Hi",
            "chosen": [{"role": "assistant", "content": "good"}],
            "rejected": [{"role": "assistant", "content": "bad"}],
        },
        {
            "chosen": [*USER, {"role": "assistant", "content": "good"}],
            "rejected": [*USER, {"role": "assistant", "content": "bad"}],
        },
    ],
)
def test_forms_of_a_comparison(row: dict[str, Any]) -> None:
    assert parse_ranking(row) == PAIR


def test_forms_of_a_demonstration() -> None:
    answer = {"role": "assistant", "content": "Hello"}
    for row in (
        {"prompt": "Hi", "response": "Hello"},
        {"prompt": "Hi", "completion": "Hello"},
        {"prompt": USER, "response": "Hello"},
    ):
        assert parse_demonstration(row) == {"messages": [*USER, answer], "trained": [False, True]}
    assert parse_demonstration({"messages": [*USER, answer]}) == {"messages": [*USER, answer], "trained": [False, True]}


def test_a_prompt_comes_from_any_record() -> None:
    for row in (
        {"prompt": "Hi"},
        {"prompt": "Hi", "response": "x"},
        {"messages": [*USER, {"role": "assistant", "content": "x"}]},
        {"chosen": HH + "a", "rejected": HH + "b"},
    ):
        assert parse_prompt(row)["prompt"] == USER


@pytest.mark.parametrize(
    ("kind", "line", "complaint"),
    [
        ("document", '{"text": "a"', "not valid JSON"),
        ("document", "[1]", "expected a JSON object"),
        ("document", "{}", "no column `text`"),
        ("document", '{"text": ""}', "`text` is empty"),
        ("document", '{"text": 3}', "`text` must be text, got 3"),
        ("document", '{"text": "a", "text": "b"}', "stands twice"),
        ("document", '{"text": NaN}', "NaN is no JSON number"),
        ("demonstration", '{"prompt": "a"}', "needs `prompt` and `response`"),
        ("demonstration", '{"prompt": "a", "response": "  "}', "`response` is empty"),
        ("demonstration", '{"messages": [{"role": "user", "content": "a"}]}', "must end with an assistant's turn"),
        ("demonstration", '{"messages": [{"role": "boss", "content": "a"}]}', "unknown role 'boss'"),
        ("ranking", '{"prompt": "a", "chosen": "b"}', "needs `prompt`, `chosen`, `rejected`"),
        ("ranking", '{"prompt": "a", "responses": ["b", "c"], "ranks": [1]}', "2 responses but 1 ranks"),
        ("ranking", '{"prompt": "a", "responses": ["b", "c"], "ranks": [0, 1]}', "whole numbers from 1"),
        ("ranking", '{"prompt": "a", "chosen": "b", "rejected": "c", "margin": "big"}', "`margin` must be a finite number"),
        ("ranking", '{"chosen": "b", "rejected": "c"}', "no `Human:`/`Assistant:` dialogue"),
        ("prompt", '{"prompt": [{"role": "assistant", "content": "a"}]}', "must end with a user's turn"),
        ("prompt", '{"text": "a"}', "no column `prompt`; columns are: text"),
    ],
)  # fmt: skip
def test_a_wrong_row_is_named(tmp_path: Path, kind: str, line: str, complaint: str) -> None:
    good = {
        "document": '{"text": "a"}',
        "demonstration": '{"prompt": "a", "response": "b"}',
        "prompt": '{"prompt": "a"}',
    }
    path = tmp_path / "data.jsonl"
    path.write_text(good.get(kind, '{"prompt": "a", "chosen": "b", "rejected": "c"}') + "\n" + line + "\n")
    with pytest.raises(UserError) as caught:
        read_records(path, PARSERS[kind])
    assert f"{path}:2: " in str(caught.value)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_many_wrong_rows_are_listed_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(f'{{"column {n}": 1}}\n' for n in range(30)))
    with pytest.raises(UserError) as caught:
        read_records(path, PARSERS["document"])
    lines = str(caught.value).splitlines()
    assert len(lines) == 21
    assert "and 10 more" in lines[-1]


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(UserError, match=r"data\.jsonl:2: not UTF-8 \(byte 11: 0xff\)"):
        read_records(path, PARSERS["document"])
    path.write_bytes('{"text": "a"}\n'.encode("utf-16"))
    with pytest.raises(UserError, match="UTF-8"):
        read_records(path, PARSERS["document"])
    path.write_bytes(b"\xef\xbb\xbf" + b'{"text": "a"}\n\n{"text": "b"}')
    assert [r["line"] for r in read_records(path, PARSERS["document"])] == [1, 3]
    path.write_bytes(b"")
    with pytest.raises(UserError, match="no records"):
        read_records(path, PARSERS["document"])


def test_sources_of_every_file_type(tmp_path: Path) -> None:
    import datasets

    rows = [{"prompt": f"p{i}", "response": f"r{i}"} for i in range(5)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(text)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "c.parquet")
    read = [
        read_source(DatasetEntry(path=name), "demonstration", tmp_path).records
        for name in ("a.jsonl", "b.jsonl.gz", "c.parquet")
    ]
    read = [[{key: value for key, value in r.items() if key != "file"} for r in records] for records in read]
    assert read[0] == read[1] == read[2]
    assert len(read_source(DatasetEntry(path="a.jsonl", max_rows=2), "demonstration", tmp_path).records) == 2
    renamed = read_source(
        DatasetEntry(path="a.jsonl", columns={"prompt": "response", "response": "prompt"}), "demonstration", tmp_path
    )
    assert renamed.records[0]["messages"][0]["content"] == "r0"
    with pytest.raises(UserError, match=r"no column `question` \(columns: prompt ← question\)"):
        read_source(DatasetEntry(path="a.jsonl", columns={"prompt": "question"}), "demonstration", tmp_path)
    (tmp_path / "e.jsonl").write_text(
        '{"prompt": "p", "completion": "yes <|end|>"}\n{"prompt": "p", "completion": "no"}\n{"prompt": "p", "completion": "<|end|>"}\n'
    )
    entry = DatasetEntry(path="e.jsonl", response_suffix="<|end|>")
    stripped = read_source(entry, "demonstration", tmp_path).records
    assert [r["messages"][-1]["content"] for r in stripped] == ["yes", "no"]
    with pytest.raises(UserError, match="no response ends in 'END'"):
        read_source(DatasetEntry(path="e.jsonl", response_suffix="END"), "demonstration", tmp_path)
    (tmp_path / "d.txt").write_text("one\n--\ntwo\n--\n")
    assert [
        r["text"]
        for r in read_source(DatasetEntry(path="d.txt", document_separator="--\n"), "document", tmp_path).records
    ] == ["one\n", "two\n"]
    assert read_source(DatasetEntry(path="d.txt"), "document", tmp_path).single_document
    with pytest.raises(UserError, match="does not exist"):
        read_source(DatasetEntry(path="none.jsonl"), "document", tmp_path)


def test_a_prompt_never_sits_on_both_sides() -> None:
    records = [parse_ranking({"prompt": f"p{i % 40}", "chosen": f"a{i}", "rejected": "b"}) for i in range(400)]
    train, held_out = split_records(records, 0.25)
    assert len(train) + len(held_out) == 400
    assert 20 < len(held_out) < 200
    assert not {split_key(r) for r in train} & {split_key(r) for r in held_out}
    # The split follows the prompt, not the file: a demonstration of the same prompt falls on the same side.
    for record in (parse_demonstration({"prompt": f"p{i}", "response": "x"}) for i in range(40)):
        same_side = split_key(record) in {split_key(r) for r in held_out}
        assert bool(split_records([record], 0.25)[1]) == same_side
    assert split_records([{**records[0], "split": "test"}], 0.0)[1]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=2, max_size=7))
def test_pairs_of_a_ranking(ranks: list[int]) -> None:
    strict, all_pairs = pairs_of(ranks, "drop"), pairs_of(ranks, "half")
    assert len(all_pairs) == len(ranks) * (len(ranks) - 1) // 2
    assert all(ranks[p["better"]] < ranks[p["worse"]] for p in strict)
    assert len(strict) == sum(p["target"] == 1.0 for p in all_pairs)


def test_untrainable_rankings_are_sifted_and_said() -> None:
    def record(line: int, responses: list[str], ranks: list[int], **more: Any) -> dict[str, Any]:
        return {"prompt": USER, "responses": responses, "ranks": ranks, "line": line, **more}

    records = [
        record(1, ["a", "b"], [1, 2], labeler="ana"),
        record(2, ["a", "b"], [1, 2], labeler="ana"),  # duplicate
        record(3, ["b", "a"], [1, 2], labeler="ana"),  # contradiction
        record(4, ["b", "a"], [1, 2], labeler="ben"),  # another labeler may differ
        record(5, ["a", "a"], [1, 2]),
        record(6, ["a", " "], [1, 2]),
        record(7, ["a", "b"], [1, 1]),
        record(8, ["a"], [1]),
        record(9, ["a", "a", "b"], [1, 2, 3]),
        {**parse_ranking({"chosen": HH + "a", "rejected": "\n\nHuman: Ho\n\nAssistant: b"}), "line": 10},
    ]
    kept, problems = find_invalid_rankings(records, "drop")
    assert [records[k]["line"] for k in kept] == [1, 4]
    assert [line for line, _ in problems] == [2, 3, 5, 6, 7, 8, 9, 10]
    assert "dropped 8 rankings" in summary(problems, "file")
    assert [records[k]["line"] for k in find_invalid_rankings(records, "half")[0]] == [1, 4, 7]

"""Files that people have: every layout is read rightly, or refused with the line and the remedy."""

from __future__ import annotations

import datetime
import gzip
import json
import logging
import random
import tracemalloc
from pathlib import Path
from typing import Any

from pipeline.data.cache import DataCache
from pipeline.data.entries import DatasetEntry
from pipeline.data.files import BLOCK_CHARACTERS, iter_rows
from pipeline.data.records import PARSERS, Record, read_records
from pipeline.data.sources import Source, read_source
from pipeline.errors import UserError

import pytest

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello."}


@pytest.fixture(autouse=True)
def heard(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A stage that ran in this process keeps its log lines to itself; here they are read."""
    monkeypatch.setattr(logging.getLogger("pipeline"), "propagate", True)
    caplog.set_level(logging.WARNING, logger="pipeline")


def read(folder: Path, rows: list[Any], kind: str, name: str = "rows.jsonl", **entry: Any) -> list[Record]:
    text = json.dumps(rows, indent=1) if name.endswith(".json") else "".join(json.dumps(row) + "\n" for row in rows)
    (folder / name).write_text(text, encoding="utf-8")
    return list(read_source(DatasetEntry(path=name, **entry), kind, folder).records)


def one(folder: Path, row: Any, kind: str, **entry: Any) -> Record:
    (record,) = read(folder, [row], kind, **entry)
    return record


def contents(record: Record) -> list[str]:
    return [message["content"] for message in record.get("messages") or record["prompt"]]


# ------------------------------------------------------------------------------------------------ demonstrations


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "Say hello.", "input": "", "output": "Hello."}, ["Say hello.", "Hello."]),
        ({"instruction": "Correct this.", "input": "helo", "output": "hello"}, ["Correct this.\n\nhelo", "hello"]),
        ({"instruction": "Sum up.", "context": "A text.", "response": "Text."}, ["Sum up.\n\nA text.", "Text."]),
        ({"system": "Be kind.", "prompt": "Hi", "response": "Hello."}, ["Be kind.", "Hi", "Hello."]),
        ({"system": "", "prompt": "Hi", "response": "Hello."}, ["Hi", "Hello."]),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}, ["Hi", "Hello."]),
        ({"conversations": [USER, ANSWER]}, ["Hi", "Hello."]),
        (
            {"system": "Be kind.", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes?"}]},
            ["Be kind.", "Hi", "Yes?"],
        ),
        ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}],
          "completion": [{"role": "assistant", "content": [{"type": "text", "text": "Hello."}]}]}, ["Hi", "Hello."]),
        ({"prompt": "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Bye\n\nAssistant:", "response": "Bye."},
         ["Hi", "Yes?", "Bye", "Bye."]),
    ],
)  # fmt: skip
def test_forms_of_published_demonstrations(tmp_path: Path, row: dict[str, Any], expected: list[str]) -> None:
    record = one(tmp_path, row, "demonstration")
    assert contents(record) == expected
    assert record["trained"][-1]
    assert record["trained"].count(True) == (2 if len(expected) == 5 else 1)
    if "response" in row or "output" in row:
        assert contents(one(tmp_path, row, "prompt")) == expected[:-1]


def test_columns_that_belong_to_the_prompt_follow_a_column_map(tmp_path: Path) -> None:
    row = {"instruction": "Correct this.", "input": "helo", "output": "hello"}
    mapped = one(tmp_path, row, "demonstration", columns={"prompt": "instruction", "response": "output"})
    assert contents(mapped) == ["Correct this.\n\nhelo", "hello"]
    orca = {"system": "One word.", "question": "Broken?", "chosen": "Yes.", "rejected": "Well, it is."}
    assert contents(one(tmp_path, orca, "ranking", columns={"prompt": "question"})) == ["One word.", "Broken?"]


def test_each_message_says_whether_it_is_learnt(tmp_path: Path) -> None:
    turns = [USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "train": False}, USER, {**ANSWER, "weight": 1}]
    assert one(tmp_path, {"messages": turns}, "demonstration")["trained"] == [False] * 5 + [True]
    for bad, message in (({"weight": 0.5}, "must be 0 or 1"), ({"train": "no"}, "must be true or false")):
        with pytest.raises(UserError, match=rf"rows\.jsonl:1: `messages`\[1\]: .* {message}"):
            one(tmp_path, {"messages": [USER, {**ANSWER, **bad}]}, "demonstration")
    with pytest.raises(UserError, match="every answer of the dialogue says"):
        one(tmp_path, {"messages": [USER, {**ANSWER, "weight": 0}]}, "demonstration")


def test_tool_calls_are_refused_and_other_keys_of_messages_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "find_order", "arguments": "{}"}}
    with pytest.raises(UserError, match=r"rows\.jsonl:1: `messages`\[1\] has `tool_calls`, which no stage reads"):
        one(tmp_path, {"messages": [USER, {**ANSWER, "tool_calls": [call]}]}, "demonstration")
    spoken = {**ANSWER, "reasoning_content": "It left on Monday.", "tool_calls": None, "name": "clerk"}
    read(tmp_path, [{"messages": [USER, spoken]}] * 3, "demonstration")
    assert "keys of messages that are not read: name (3×), reasoning_content (3×)" in caplog.text
    assert "tool_calls (" not in caplog.text


def test_columns_that_are_not_read_are_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": "Hi", "response": "Hello.", "quality": 3, "empty": None, "id": "x"}] * 4
    read(tmp_path, rows, "demonstration")
    assert [r.getMessage() for r in caplog.records] == [
        f"{tmp_path / 'rows.jsonl'}: columns that are not read: quality"
    ]


def test_rows_that_a_label_calls_bad_are_not_learnt(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": f"p{n}", "completion": "x", "label": bool(n % 2)} for n in range(4)]
    with pytest.raises(UserError, match=r"rows\.jsonl:1: `label` is false"):
        read(tmp_path, rows, "demonstration")
    assert [r["line"] for r in read(tmp_path, rows, "demonstration", problems="drop")] == [2, 4]
    assert "2 rows left out (2 × `label` is false" in caplog.text
    with pytest.raises(UserError, match="rows that judge one answer each must be joined to pairs"):
        read(tmp_path, rows, "ranking")


# ------------------------------------------------------------------------------------------------ comparisons


@pytest.mark.parametrize(
    ("verdict", "ranks"),
    [("a", [1, 2]), ("response_b", [2, 1]), ("B", [2, 1]), ("tie", [1, 1]), ("model_a", [1, 2]), ("left", [1, 2])],
)
def test_a_column_may_say_which_of_two_responses_won(tmp_path: Path, verdict: str, ranks: list[int]) -> None:
    row = {"prompt": "Hi", "response_a": "Hello.", "response_b": "No.", "winner": verdict, "labeler": 7}
    record = one(tmp_path, row, "ranking")
    assert (record["responses"], record["ranks"], record["labeler"]) == (["Hello.", "No."], ranks, "7")
    theirs = {"question": "Hi", "answer1": "Hello.", "answer2": "No.", "vote": verdict.replace("response_", "")}
    columns = {"prompt": "question", "response_a": "answer1", "response_b": "answer2", "winner": "vote"}
    assert one(tmp_path, theirs, "ranking", columns=columns)["ranks"] == ranks


def test_a_map_that_calls_the_loser_chosen_is_refused_with_the_remedy(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{n}", "response_a": "x", "response_b": "y", "winner": "ab"[n % 2]} for n in range(30)]
    columns = {"chosen": "response_a", "rejected": "response_b"}
    with pytest.raises(UserError) as caught:
        read(tmp_path, rows, "ranking", columns=columns)
    assert str(caught.value) == (
        f"{tmp_path / 'rows.jsonl'}:2: `winner` is 'b', so `response_a` is not always the chosen response; map the two as "
        "`columns: {response_a: response_a, response_b: response_b, winner: winner}`"
    )
    with pytest.raises(UserError, match="must say which of `response_a` and `response_b` won"):
        read(tmp_path, [{"prompt": "p", "response_a": "x", "response_b": "y", "winner": 1}], "ranking")


def test_a_wrong_column_map_is_told_once(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, [{"prompt": "p", "response": "r"}] * 30, "demonstration", columns={"prompt": "question"})
    assert str(caught.value).count("no column `question`") == 1


def test_responses_without_a_rank_are_left_out_of_the_pairs(tmp_path: Path) -> None:
    row = {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [2, None, 1]}
    record = one(tmp_path, row, "ranking")
    assert (record["responses"], record["ranks"]) == (["a", "c"], [2, 1])
    with pytest.raises(UserError, match="no response is ranked"):
        one(tmp_path, {**row, "ranks": [None] * 3}, "ranking")


def test_exports_of_labeling_tools(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def annotation(who: int, side: str, **more: Any) -> dict[str, Any]:
        result = [{"from_name": "pref", "type": "pairwise", "value": {"selected": side}}]
        return {"completed_by": who, "result": result, **more}

    tasks = [
        {"id": 1, "data": {"prompt": "p", "answer1": "a", "answer2": "b"},
         "annotations": [annotation(3, "left"), annotation(4, "right"), annotation(5, "left", was_cancelled=True)]},
        {"id": 2, "data": {"prompt": "q", "answer1": "a", "answer2": "b"}, "annotations": []},
    ]  # fmt: skip
    records = read(tmp_path, tasks, "ranking", "studio.json")
    assert [(r["labeler"], r["ranks"]) for r in records] == [("3", [1, 2]), ("4", [2, 1])]
    assert "1 rows left out (1 × a task without annotations" in caplog.text

    argilla = {
        "id": "u", "fields": {"prompt": "p", "response-1": "a", "response-2": "b"},
        "responses": {"order": [{"user_id": "ana", "value": ["response-2", "response-1"], "status": "submitted"},
                                {"user_id": "ben", "value": ["response-1", "response-2"], "status": "draft"}]},
    }  # fmt: skip
    (record,) = read(tmp_path, [argilla], "ranking", "argilla.json")
    assert (record["responses"], record["ranks"], record["labeler"]) == (["b", "a"], [1, 2], "ana")


# ------------------------------------------------------------------------------------------------ files


def test_a_json_array_is_read_with_the_lines_of_its_items(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{n}", "response": "r"} for n in range(3)]
    assert [r["line"] for r in read(tmp_path, rows, "demonstration", "a.json")] == [2, 6, 10]
    (tmp_path / "b.json").write_text(json.dumps(rows))
    assert [r["line"] for r in read_records(tmp_path / "b.json", PARSERS["demonstration"])] == [1, 2, 3]
    (tmp_path / "c.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    assert len(read_records(tmp_path / "c.json.gz", PARSERS["demonstration"])) == 3
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(read_records(tmp_path / "d.jsonl", PARSERS["demonstration"])) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '[\n{"prompt": "p", "response": "r"},\n{"prompt": 3, "response": "r"}\n]',
            ":3: `prompt` must",
        ),
        ('[\n{"prompt": "p", "response": "r"},\n{"prompt": "p" "response": "r"}\n]', ":3: not valid JSON"),
        ('[\n{"prompt": "p", "response": "r"}\n{"prompt": "p", "response": "r"}\n]', ":3: not valid JSON"),
        ('[{"prompt": "p", "response": "r"}', ":1: not valid JSON"),
        ('[{"prompt": "p", "response": "r"}] x', ":1: more text follows the JSON array"),
        ('[{"prompt": "p", "response": "r", "score": NaN}]', ":1: item 1 of the array: NaN is no JSON number"),
        ("[1, 2]", "item 1 of the array: expected a JSON object, got 1"),
        ("[]", "no records"),
        ('{\n "data": [\n  {"prompt": "p"}\n ]\n}', "one JSON object a line, or one array of objects"),
    ],
)
def test_a_broken_json_array_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError) as caught:
        read_records(tmp_path / "a.json", PARSERS["demonstration"])
    assert message in str(caught.value).splitlines()[0]


def test_tables_of_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(
        "\ufeffprompt,chosen,rejected,margin,labeler\r\n"
        '"Hi,\r\nthere",a\u2028b,c,0.5,7\r\n\r\nHi,"say ""x""",c,,\r\n'.encode()
    )
    records = read_records(tmp_path / "a.csv", PARSERS["ranking"])
    assert [(r["line"], r["prompt"][0]["content"]) for r in records] == [(2, "Hi,\r\nthere"), (5, "Hi")]
    assert records[0]["responses"] == ["a\u2028b", "c"]
    assert (records[0]["margin"], records[0]["labeler"]) == (0.5, "7")
    assert records[1]["responses"][0] == 'say "x"'
    (tmp_path / "b.csv").write_text('prompt,responses,ranks\np,"[""a"", ""b""]","[1, null]"\n')
    assert read_records(tmp_path / "b.csv", PARSERS["ranking"])[0]["ranks"] == [1]
    (tmp_path / "c.tsv").write_text("prompt\tresponse\np\tr\n")
    assert len(read_records(tmp_path / "c.tsv", PARSERS["demonstration"])) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt,response\np,r,s\n", ":2: 3 cells, but the header names 2 columns"),
        ("prompt,response\np\n", ":2: 1 cells, but the header names 2 columns"),
        ("prompt;response\np;r\n", ":1: columns are separated by `;`"),
        ("prompt,prompt\np,r\n", ":1: column 'prompt' stands twice in the header"),
        ('prompt,response\np,"r\n', ":2: not valid CSV"),
        ("prompt,response\np,r\x00\n", ": holds a NUL byte"),
        ("prompt,messages\np,\"[{'role': 'user'}]\"\n", ":2: column `messages` of a CSV must hold JSON"),
        ("prompt,response\n", ": no records"),
        ("", ": no records"),
    ],
)
def test_a_broken_table_of_text_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(UserError) as caught:
        read_records(tmp_path / "a.csv", PARSERS["demonstration"])
    assert str(caught.value).startswith(f"{tmp_path / 'a.csv'}{message}")


def test_parquet_with_times_nested_columns_and_nulls(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"messages": [USER, {**ANSWER, "tool_calls": None}], "created_at": datetime.datetime(2026, 5, 1, 12), "n": 1.5,
         "labeler": 3.0, "raw": b"\xff", "day": datetime.date(2026, 5, 1), "lasted": datetime.timedelta(seconds=2)},
        {"messages": [USER, ANSWER], "created_at": None, "n": None, "labeler": None, "raw": None, "day": None, "lasted": None},
    ]  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    first, second = read_source(DatasetEntry(path="a.parquet"), "demonstration", tmp_path).records
    assert contents(first) == ["Hi", "Hello."] == contents(second)
    assert first["row"]["created_at"] == "2026-05-01T12:00:00"
    assert (first["row"]["raw"], first["row"]["lasted"], first["labeler"]) == ({"bytes": 1}, 2.0, "3")
    assert "created_at" not in second["row"]


def test_bytes_of_a_table_are_text_only_where_they_are_utf8(tmp_path: Path) -> None:
    """Spark and others write text without saying so; "<5 bytes>" was trained on instead."""
    import pyarrow
    import pyarrow.parquet

    rows = [{"prompt": "Straße".encode(), "response": b"yes"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    record = read_records(tmp_path / "a.parquet", PARSERS["demonstration"])[0]
    assert contents(record) == ["Straße", "yes"]
    rows[0]["response"] = "Straße".encode("latin-1")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r":1: `response` must be text, got {'bytes': 6}"):
        read_records(tmp_path / "b.parquet", PARSERS["demonstration"])


def test_a_parquet_column_that_stands_twice_is_refused(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    columns = [pyarrow.array([text]) for text in ("p", "one", "other")]
    table = pyarrow.Table.from_arrays(columns, names=["prompt", "response", "response"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="column 'response' stands twice; keep one"):
        read_records(tmp_path / "a.parquet", PARSERS["demonstration"])


@pytest.mark.parametrize("write", [json.dumps, repr], ids=["as JSON", "as Python"])
def test_a_list_of_messages_that_was_written_as_text_is_no_text(tmp_path: Path, write: Any) -> None:
    row = {"prompt": write([USER]), "chosen": "a", "rejected": "b"}
    with pytest.raises(UserError, match="`prompt` is a list of messages written as text; give the list itself"):
        one(tmp_path, row, "ranking")
    with pytest.raises(UserError, match="`rejected` is a list of messages written as text"):
        one(tmp_path, {"prompt": "Hi", "chosen": "a", "rejected": write([USER, ANSWER])}, "ranking")
    assert contents(one(tmp_path, {"prompt": "[INST] {x}", "response": '[{"role": 1}]'}, "demonstration"))


# ------------------------------------------------------------------------------------------------ broken and unusable rows


def test_max_rows_hides_no_broken_line(tmp_path: Path) -> None:
    rows: list[Any] = [{"prompt": "no answer"}, *({"prompt": f"p{n}", "response": "r"} for n in range(9))]
    with pytest.raises(UserError, match=r"rows\.jsonl:1: needs `prompt` and `response`"):
        read(tmp_path, rows, "demonstration", max_rows=3)
    assert len(read(tmp_path, rows, "demonstration", max_rows=3, problems="drop")) == 3
    assert len(read(tmp_path, rows[1:] + rows[:1], "demonstration", max_rows=3)) == 3, "rows beyond are not read"


def test_one_broken_row_among_thousands_may_be_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows: list[Any] = [{"prompt": f"p{n}", "response": "r"} for n in range(2000)]
    rows[1200] = {"prompt": 3, "response": "r"}
    with pytest.raises(UserError, match=r"rows\.jsonl:1201: `prompt` must be text"):
        read(tmp_path, rows, "demonstration")
    assert len(read(tmp_path, rows, "demonstration", problems="drop")) == 1999
    assert "1 rows left out (1 × `prompt` must be text" in caplog.text
    assert "lines 1201" in caplog.text
    with pytest.raises(UserError, match=r"rows\.jsonl:1: .*; no row of the file can be used"):
        read(tmp_path, rows[1200:1201], "demonstration", problems="drop")


def test_an_empty_turn_among_many_is_dropped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    chats = [{"messages": [USER, {**ANSWER, "content": "" if n == 7 else "Hello."}]} for n in range(60)]
    assert len(read(tmp_path, chats, "demonstration")) == 59
    assert "1 rows left out (1 × `messages`[1]: content is empty" in caplog.text
    assert "lines 8" in caplog.text
    with pytest.raises(UserError, match=r"rows\.jsonl:8: `messages`\[1\]: content is empty"):
        read(tmp_path, chats, "demonstration", problems="error")
    pairs = [{"prompt": "Hi", "chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": ""}]}]
    assert read(tmp_path, pairs, "ranking")[0]["responses"] == ["Hello.", ""], "the check of rankings drops it"


def test_a_fault_of_many_rows_is_told_once(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, [{"question": "p"}] * 3, "document")
    assert str(caught.value).endswith("rows.jsonl:1: no column `text`; columns are: question (also lines 2, 3)")


# ------------------------------------------------------------------------------------------------ splits


@pytest.mark.parametrize(
    "name", ["test", "Testing", "val", "VALID", "validation", "dev", "eval", "Evaluation", "held-out"]
)
def test_a_rows_own_split_is_known_by_its_common_names(tmp_path: Path, name: str) -> None:
    from pipeline.data.splits import split_records

    rows = [{"prompt": f"p{n}", "response": "r", "split": name if n < 2 else "Training"} for n in range(5)]
    train, held_out = split_records(read(tmp_path, rows, "demonstration"), 0.5)
    assert ([r["line"] for r in train], [r["line"] for r in held_out]) == ([3, 4, 5], [1, 2])


def test_a_split_of_unknown_name_is_an_error(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "response": "r", "split": name} for name in ("train", "valid1")]
    with pytest.raises(UserError, match=r"rows\.jsonl:2: `split` 'valid1' is of neither side; write train"):
        read(tmp_path, rows, "demonstration")


def test_a_plain_files_split_selects_its_rows(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{n}", "split": "test" if n < 2 else "train"} for n in range(5)]
    assert len(read(tmp_path, rows, "prompt")) == 5
    assert len(read(tmp_path, rows, "prompt", split="test")) == 2
    assert len(read(tmp_path, rows, "prompt", split="test", max_rows=1)) == 1
    with pytest.raises(UserError, match=r"no row's own `split` is 'validation' \(rows name: train \(3\), test \(2\)\)"):
        read(tmp_path, rows, "prompt", split="validation")


# ------------------------------------------------------------------------------------------------ the Hub


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"scripted.py": "import datasets", "train.jsonl": ""}, "scripts are no longer supported.*download its data files"),
        ({"a.jsonl": '{"prompt": "p"}', "b.jsonl": '{"prompt": "p", "task": "x"}'}, "its files differ in their columns"),
        ({"a.jsonl": "{broken"}, "JSON parse error"),
        ({}, "doesn't contain any data files"),
    ],
)  # fmt: skip
def test_a_hub_dataset_that_cannot_be_loaded_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], message: str
) -> None:
    """`load_dataset` takes a folder as it takes an id."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "scripted"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text + "\n")
    with pytest.raises(UserError, match=message) as caught:
        read_source(DatasetEntry(hub=str(folder)), "demonstration", tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_documents_of_a_large_text_file_are_those_of_the_whole_text(tmp_path: Path) -> None:
    chance = random.Random(0)
    text = "".join(chance.choice(["a line é\n", "--\n", "---\n", "x" * 50_000]) for _ in range(200))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    assert (tmp_path / "a.txt").stat().st_size > 2 * BLOCK_CHARACTERS, "several blocks"
    records = read_source(DatasetEntry(path="a.txt", document_separator="--\n"), "document", tmp_path).records
    assert [record["text"] for record in records] == [part for part in text.split("--\n") if part.strip()]
    first = read_source(DatasetEntry(path="a.txt", document_separator="--\n", max_rows=3), "document", tmp_path).records
    assert [record["text"] for record in first] == [record["text"] for record in records][:3]


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.csv.gz"])
def test_a_byte_that_is_no_text_is_named_late_in_a_large_file(tmp_path: Path, name: str) -> None:
    good = b"text\n" + ("\u00e9" * 60 + " line\n").encode() * 25_000
    content = good + b"bad \xe9 byte\n" + b"more\n" * 100
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(UserError) as refusal:
        read_source(DatasetEntry(path=name, document_separator="\n\n"), "document", tmp_path)
    place = f"{tmp_path / name}:25002: not UTF-8 (byte {len(good) + 5})"
    assert str(refusal.value) == f"{place}; save the file as UTF-8"


def test_a_table_of_text_is_not_held_in_memory(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\n" + "a long cell of text\n" * 60_000)
    tracemalloc.start()
    try:
        assert sum(1 for _ in iter_rows(tmp_path / "a.csv")) == 60_000
        assert tracemalloc.get_traced_memory()[1] < 1 << 18
    finally:
        tracemalloc.stop()


def test_rows_of_a_hub_table_are_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    hub = tmp_path / "hub"
    hub.mkdir()

    def source(count: int, **entry: Any) -> Source:
        (hub / "train.jsonl").write_text("".join(json.dumps({"text": f"text {n}"}) + "\n" for n in range(count)))
        return read_source(DatasetEntry(hub=str(hub), **entry), "document", tmp_path, str(tmp_path / "cache"))

    first, again, part, more = source(5), source(5), source(5, max_rows=2), source(6)
    assert first.sha256 == again.sha256
    assert [len(each.records) for each in (first, again, part, more)] == [5, 5, 2, 6]
    assert len({first.sha256, part.sha256, more.sha256}) == 3
    kinds = [entry.what.split(" of ")[0] for entry in DataCache(tmp_path / "cache").entries()]
    assert sorted(kinds) == ["documents"] * 3 + ["hash"] * 3

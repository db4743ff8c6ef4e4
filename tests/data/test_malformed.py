"""Malformed files of comparisons: each is refused with file, line, what is wrong and what to do; none gets through."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from pipeline.data.files import MAX_LINE_BYTES, RecordError
from pipeline.data.problems import MAX_LISTED
from pipeline.data.records import PARSERS, parse_ranking, read_records
from pipeline.errors import UserError

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

GOOD = {"prompt": "Hi", "chosen": "Hello.", "rejected": "No."}
RANKED = {"prompt": "Hi", "responses": ["a", "b", "c"], "ranks": [1, 2, 2]}


def row(**changes: Any) -> bytes:
    return json.dumps({**GOOD, **changes}).encode()


def ranked(**changes: Any) -> bytes:
    return json.dumps({**RANKED, **changes}).encode()


def without(name: str, base: dict[str, Any] = GOOD) -> bytes:
    return json.dumps({k: v for k, v in base.items() if k != name}).encode()


def turns(*roles: str, content: Any = "x") -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role in roles]


LONG = "x" * 300
# name: (the bad line, what the message must say)
BAD: dict[str, tuple[bytes, str]] = {
    # bytes
    "bad UTF-8": (b'{"prompt": "\xff\xfe", "chosen": "a", "rejected": "b"}', "not UTF-8"),
    "latin-1": ('{"prompt": "é", "chosen": "a", "rejected": "b"}'.encode("latin-1"), "not UTF-8"),
    "UTF-16": ('{"prompt": "a"}'.encode("utf-16-le"), "NUL"),
    "NUL": (b'{"prompt": "a\x00", "chosen": "a", "rejected": "b"}', "NUL"),
    "BOM inside the file": (b"\xef\xbb\xbf" + row(), "not valid JSON"),
    "half a surrogate": (b'{"prompt": "\\ud83d", "chosen": "a", "rejected": "b"}', "surrogate"),
    "truncated UTF-8": (b'{"prompt": "\xe2\x82', "not UTF-8"),
    # JSON
    "truncated line": (row()[:-9], "not valid JSON"),
    "single quotes": (b"{'prompt': 'a', 'chosen': 'b', 'rejected': 'c'}", "not valid JSON"),
    "trailing comma": (b'{"prompt": "a", "chosen": "b", "rejected": "c",}', "not valid JSON"),
    "two objects": (row() + b" " + row(), "not valid JSON"),
    "a comment": (b"// rankings of May", "not valid JSON"),
    "CSV": (b"prompt,chosen,rejected", "not valid JSON"),
    "a bracket of a JSON array": (b"[", "not valid JSON"),
    "raw newline in text": (b'{"prompt": "a', "not valid JSON"),
    "control character": (b'{"prompt": "a\x01", "chosen": "b", "rejected": "c"}', "not valid JSON"),
    "bad escape": (b'{"prompt": "\\x41", "chosen": "b", "rejected": "c"}', "not valid JSON"),
    "a list": (b'["Hi", "Hello.", "No."]', "expected a JSON object"),
    "a list of rows": (b"[" + row() + b"]", "expected a JSON object"),
    "a string": (b'"Hi"', "expected a JSON object"),
    "a number": (b"7", "expected a JSON object"),
    "null": (b"null", "expected a JSON object"),
    "NaN": (b'{"prompt": "a", "chosen": "b", "rejected": "c", "margin": NaN}', "NaN is no JSON number"),
    "Infinity": (b'{"prompt": "a", "chosen": "b", "rejected": "c", "margin": Infinity}', "Infinity is no JSON number"),
    "duplicate key": (b'{"prompt": "a", "prompt": "b", "chosen": "c", "rejected": "d"}', "'prompt' stands twice"),
    "duplicate key deep": (b'{"prompt": [{"role": "user", "role": "system", "content": "a"}], "chosen": "b", "rejected": "c"}', "'role' stands twice"),
    "nested too deeply": (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    # columns
    "empty object": (b"{}", "columns are: none"),
    "no prompt": (without("prompt"), "no column `prompt`"),
    "no chosen": (without("chosen"), "columns are: prompt, rejected"),
    "no rejected": (without("rejected"), "columns are: chosen, prompt"),
    "winner without loser": (b'{"prompt": "a", "winner": "b"}', "columns are: prompt, winner"),
    "mixed aliases": (b'{"prompt": "a", "winner": "b", "rejected": "c"}', "needs `prompt`"),
    "columns in capitals": (b'{"Prompt": "a", "Chosen": "b", "Rejected": "c"}', "columns are: Chosen, Prompt, Rejected"),
    "no responses": (without("responses", RANKED), "needs `responses`"),
    "no ranks": (without("ranks", RANKED), "needs `ranks`"),
    "ranking without prompt": (without("prompt", RANKED), "needs `prompt`"),
    # prompts
    "empty prompt": (row(prompt=""), "`prompt` is empty"),
    "blank prompt": (row(prompt=" \n\t"), "`prompt` is empty"),
    "number for prompt": (row(prompt=3), "`prompt` must be text"),
    "null prompt": (row(prompt=None), "`prompt` must be text"),
    "object for prompt": (row(prompt={"role": "user", "content": "a"}), "`prompt` must be text"),
    "no messages": (row(prompt=[]), "`prompt` must be text"),
    "list of texts": (row(prompt=["Hi"]), r"`prompt`\[0\] must be"),
    "list in a list": (row(prompt=[turns("user")]), r"`prompt`\[0\] must be"),
    "message without role": (row(prompt=[{"content": "a"}]), r"`prompt`\[0\] must be"),
    "message without content": (row(prompt=[{"role": "user"}]), r"`prompt`\[0\] must be"),
    "content is a picture": (row(prompt=turns("user", content=[{"type": "image", "url": "a"}])), "is no text"),
    "content is a list of lists": (row(prompt=turns("user", content=[["a"]])), r"`prompt`\[0\] must be"),
    "content is null": (row(prompt=turns("user", content=None)), r"`prompt`\[0\] must be"),
    "empty content": (row(prompt=turns("user", content=" ")), "content is empty"),
    "unknown role": (row(prompt=turns("human")), "unknown role 'human'; use one of"),
    "number for role": (row(prompt=[{"role": 1, "content": "a"}]), "unknown role 1"),
    "long unknown role": (row(prompt=turns(LONG)), "unknown role 'x+…"),
    "prompt ends with the assistant": (row(prompt=turns("user", "assistant")), "must end with a user's turn"),
    "prompt ends with the system": (row(prompt=turns("system")), "must end with a user's turn"),
    "system message last": (row(prompt=turns("user", "system")), "stands first or not at all"),
    "system message in between": (row(prompt=turns("user", "system", "user")), "stands first or not at all"),
    # responses of a comparison
    "number for chosen": (row(chosen=1.5), "`chosen` must be text, got 1.5"),
    "null rejected": (row(rejected=None), "`rejected` must be text, got None"),
    "true for chosen": (row(chosen=True), "`chosen` must be text, got True"),
    "object for rejected": (row(rejected={"text": LONG}), "`rejected` must be text, got .{79}…$"),
    "chosen as the user's message": (row(chosen=turns("user")), "`chosen` must be text or messages"),
    "chosen as another dialogue": (row(chosen=turns("user", "assistant")), "after the prompt's"),
    "chosen as an empty list": (row(chosen=[]), "`chosen` must be text"),
    "dialogue without an answer": (b'{"chosen": "\\n\\nHuman: a", "rejected": "\\n\\nHuman: a"}', "must end with an answer"),
    "no dialogue": (b'{"chosen": "Hello.", "rejected": "No."}', "no column `prompt`"),
    "dialogue of one answer": (json.dumps({"chosen": turns("assistant"), "rejected": turns("assistant")}).encode(), "is no dialogue"),
    # rankings
    "ranks shorter": (ranked(ranks=[1, 2]), "3 responses but 2 ranks"),
    "ranks longer": (ranked(ranks=[1, 2, 3, 4]), "3 responses but 4 ranks"),
    "negative rank": (ranked(ranks=[1, 2, -1]), "whole numbers from 1"),
    "rank zero": (ranked(ranks=[0, 1, 2]), "whole numbers from 1"),
    "tool calls in the prompt": (row(prompt=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [{"id": "c"}]}]), "has `tool_calls`"),
    "fractional rank": (ranked(ranks=[1, 1.5, 2]), "whole numbers from 1"),
    "text for a rank": (ranked(ranks=["1", "2", "3"]), "whole numbers from 1"),
    "true for a rank": (ranked(ranks=[True, 2, 3]), "whole numbers from 1"),
    "ranks as text": (ranked(ranks="A > B = C"), "`ranks` must be a list"),
    "ranks as an object": (ranked(ranks={"a": 1}), "`ranks` must be a list"),
    "nested ranks": (ranked(ranks=[[1], [2], [3]]), "whole numbers from 1"),
    "responses as text": (ranked(responses="abc"), "`responses` must be a list of texts"),
    "number among responses": (ranked(responses=["a", 2, "c"]), "`responses` must be a list of texts"),
    "null among responses": (ranked(responses=["a", None, "c"]), "`responses` must be a list of texts"),
    "messages among responses": (ranked(responses=[turns("assistant")] * 3), "`responses` must be a list of texts"),
    # optional columns
    "margin as text": (row(margin="big"), "`margin` must be a finite number"),
    "margin as truth": (row(margin=True), "`margin` must be a finite number"),
    "margin beyond floats": (b'{"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1e999}', "`margin` must be a finite number"),
    "confidence as a list": (row(confidence=[0.7]), "`confidence` must be a finite number"),
    "truth for labeler": (row(labeler=True), "`labeler` must be text, got True"),
    "split of neither side": (row(split="foo"), "`split` 'foo' is of neither side; write train"),
    "list for split": (row(split=["train"]), "`split` must be text"),
    "object for id": (row(id={"n": 1}), "`id` must be text"),
}  # fmt: skip


def test_there_are_enough_of_them() -> None:
    assert len(BAD) >= 60


@pytest.mark.parametrize("name", BAD)
def test_a_malformed_line_is_named(tmp_path: Path, name: str) -> None:
    line, message = BAD[name]
    path = tmp_path / "rankings.jsonl"
    path.write_bytes(row() + b"\n" + line + b"\n" + row() + b"\n")
    with pytest.raises(UserError, match=message) as found:
        read_records(path, PARSERS["ranking"])
    (text,) = str(found.value).splitlines()
    assert text.startswith(f"{path}:2: ")
    assert len(text) - len(str(path)) < 300, "an offending value is cut"


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        (b"", "", "no records"),
        (b"\n\n \n", "", "no records"),
        (b"\xef\xbb\xbf", "", "no records"),
        (b"\xff\xfe" + "{}\n".encode("utf-16-le"), ":1", "not UTF-8"),
        (row() + b"\n" + row()[: len(row()) // 2], ":2", "not valid JSON"),
        (row() + b"\r" + row(), ":1", "not valid JSON"),
        (b"\x1f\x8b not gzip at all", ":1", "not UTF-8"),
    ],
)
def test_a_malformed_file_is_named(tmp_path: Path, content: bytes, line: str, message: str) -> None:
    path = tmp_path / "rankings.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as found:
        read_records(path, PARSERS["ranking"])
    assert str(found.value).startswith(f"{path}{line}: ")


def test_a_broken_archive_is_named(tmp_path: Path) -> None:
    whole = gzip.compress((row() + b"\n") * 1000)
    for number, content in enumerate((b"plain text", whole[:-20], whole[:30] + b"\x00" * 40 + whole[70:])):
        path = tmp_path / f"{number}.jsonl.gz"
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"{number}.jsonl.gz: cannot be read"):
            read_records(path, PARSERS["ranking"])


def test_a_huge_line_is_refused_without_being_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "huge.jsonl"
    with path.open("wb") as file:
        file.write(row() + b"\n")
        file.write(b'{"prompt": "')
        file.seek(MAX_LINE_BYTES, 1)  # a hole: the file is long, the disk is not
        file.write(b'"}\n' + row() + b"\n")
    with pytest.raises(UserError, match=r"huge\.jsonl:2: is longer than 64 MiB"):
        read_records(path, PARSERS["ranking"])


def test_harmless_oddities_are_read(tmp_path: Path) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + row() + b"\r\n\r\n   \r\n" + row(extra={"deep": [1, None]}) + b"\n" + row())
    assert [r["line"] for r in read_records(path, PARSERS["ranking"])] == [1, 4, 5]


def test_twenty_are_listed_and_the_rest_counted(tmp_path: Path) -> None:
    path = tmp_path / "many.jsonl"
    path.write_bytes(b"\n".join(line for n in range(33) for line in (b'{"column %d": 1}' % n, row())))
    with pytest.raises(UserError) as found:
        read_records(path, PARSERS["ranking"])
    lines = str(found.value).splitlines()
    assert len(lines) == MAX_LISTED + 1
    assert lines[0].startswith(f"{path}:1: ")
    assert lines[1].startswith(f"{path}:3: ")
    assert lines[-1] == f"… and 13 more in {path}"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.text(max_size=12),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner, max_size=3)
    ),
    max_leaves=12,
)
COLUMNS = st.sampled_from(
    ["prompt", "chosen", "rejected", "winner", "loser", "responses", "ranks", "margin", "confidence", "labeler", "id"]
)


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(COLUMNS, VALUES, max_size=8))
def test_any_object_is_a_record_or_an_explained_error(found: dict[str, Any]) -> None:
    try:
        record = parse_ranking(found)
    except RecordError as error:
        message = str(error)
    else:
        message = ""
    if message:
        assert "\n" not in message
        return
    assert len(record["responses"]) == len(record["ranks"])
    assert all(isinstance(text, str) for text in record["responses"])
    assert record["prompt"][-1]["content"].strip()


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_records_or_an_explained_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("bytes") / "any.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"any\.jsonl"):
        read_records(path, PARSERS["ranking"])

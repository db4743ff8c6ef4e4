"""Files and cards made to break the reader: each is read, or refused in one line; never a traceback, a hang, or a foreign file."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

from pipeline.data.cards import card_columns, split_files
from pipeline.data.entries import DatasetEntry
from pipeline.data.sources import read_source
from pipeline.errors import UserError

import pytest

GOOD = '{"prompt": "p", "chosen": "a", "rejected": "b"}\n'
DIGITS = "9" * 5000


def deep(depth: int, opening: str = "[", closing: str = "]") -> str:
    return opening * depth + "1" + closing * depth


# name: (text after one good row, part of the message; None where the file is read)
RECORDS: dict[str, tuple[str, str | None]] = {
    "integer of 5,000 digits": (f'{{"prompt": "p", "chosen": "a", "rejected": "b", "margin": {DIGITS}}}', "thousands of digits"),
    "integer of 5,000 digits, unread": (f'{{"prompt": "p", "chosen": "a", "rejected": "b", "x": {DIGITS}}}', "thousands of digits"),
    "integer of 4,000 digits as margin": (f'{{"prompt": "p", "chosen": "a", "rejected": "b", "margin": {DIGITS[:4000]}}}', "must be a finite number"),
    "integer of 4,000 digits as confidence": (f'{{"prompt": "p", "chosen": "a", "rejected": "b", "confidence": -{DIGITS[:4000]}}}', "must be a finite number"),
    "integer of 4,000 digits as id": (f'{{"prompt": "p", "chosen": "a", "rejected": "c", "id": {DIGITS[:4000]}}}', None),
    "integer of 4,000 digits as labeler": (f'{{"prompt": "p", "chosen": "a", "rejected": "c", "labeler": {DIGITS[:4000]}}}', None),
    "integer of 4,000 digits as rank": (f'{{"prompt": "p", "responses": ["a", "b"], "ranks": [1, {DIGITS[:4000]}]}}', None),
    "float beyond floats": ('{"prompt": "p", "chosen": "a", "rejected": "b", "confidence": 1e999}', "must be a finite number"),
    "float beyond floats as rank": ('{"prompt": "p", "responses": ["a", "b"], "ranks": [1, 1e999]}', "whole numbers from 1"),
    "list 70 deep": (f'{{"prompt": "p", "chosen": "a", "rejected": "c", "x": {deep(70)}}}', "nested too deeply"),
    "list 900 deep as prompt": (f'{{"prompt": {deep(900)}, "chosen": "a", "rejected": "b"}}', "nested too deeply"),
    "list 30 deep, unread": (f'{{"prompt": "p", "chosen": "a", "rejected": "c", "x": {deep(30)}}}', None),
    "object 2,000 deep": (f'{{"prompt": {deep(2000, chr(123) + chr(34) + "a" + chr(34) + ":", chr(125))}}}', "nested too deeply"),
    "object 100,000 deep": (deep(100_000, '{"a":', "}"), "nested too deeply"),
    "many brackets, flat": ('{"prompt": "' + "[" * 500 + '", "chosen": "a", "rejected": "c"}', None),
    "half a surrogate in a key": ('{"prompt": "p", "chosen": "a", "rejected": "b", "\\ud800": 1}', "surrogate"),
    "half a surrogate unread": ('{"prompt": "p", "chosen": "a", "rejected": "b", "x": ["\\uDfff"]}', "surrogate"),
    "escaped NUL": ('{"prompt": "p\\u0000", "chosen": "a", "rejected": "c"}', None),
    "newline in a column's name": ('{"a\\nb": 1}', "columns are: 'a\\nb'"),
    "column's name of a megabyte": (json.dumps({"x" * 1_000_000: 1}), "columns are: 'xxx"),
    "10,000 columns": (json.dumps({f"c{n}": n for n in range(10_000)}), ", …"),
    "empty name of a column": ('{"": 1}', "columns are:"),
    "right-to-left override": ('{"prompt": "p\\u202e", "chosen": "a", "rejected": "c"}', None),
    "private-use marks in text": ('{"prompt": "\\ue0000\\ue001", "chosen": "a", "rejected": "c"}', None),
    "role of a list": ('{"prompt": [{"role": ["user"], "content": "a"}], "chosen": "a", "rejected": "b"}', "unknown role ['user']"),
    "role of an object": ('{"prompt": [{"role": {"a": 1}, "content": "a"}], "chosen": "a", "rejected": "b"}', "unknown role"),
    "from of a list": ('{"prompt": [{"from": ["human"], "value": "a"}], "chosen": "a", "rejected": "b"}', "unknown `from`"),
    "message that is null": ('{"prompt": [null], "chosen": "a", "rejected": "b"}', "must be {role, content}"),
    "parts of numbers": ('{"prompt": [{"role": "user", "content": [1, 2]}], "chosen": "a", "rejected": "b"}', "must be {role, content}"),
    "part without text": ('{"prompt": [{"role": "user", "content": [{"type": "text"}]}], "chosen": "a", "rejected": "b"}', "is no text"),
    "system of a number": ('{"system": 3, "prompt": "p", "chosen": "a", "rejected": "b"}', "`system` must be text"),
    "two systems": ('{"system": "s", "prompt": [{"role": "system", "content": "t"}, {"role": "user", "content": "u"}], "chosen": "a", "rejected": "b"}', "keep one of them"),
    "verdict of a list": ('{"prompt": "p", "response_a": "a", "response_b": "b", "winner": ["a"]}', "must say which of"),
    "verdict of an object": ('{"prompt": "p", "response_a": "a", "response_b": "b", "winner": {"a": 1}}', "must say which of"),
    "verdict without an answer": ('{"prompt": "p", "response_a": null, "response_b": "b", "winner": "a"}', "must be a list of texts"),
    "export of numbers": ('{"data": {}, "annotations": [1, 2]}', "a task without annotations"),
    "export without results": ('{"data": {"prompt": "p"}, "annotations": [{"result": null}]}', "needs `prompt`, `chosen`"),
    "export with odd results": ('{"data": {"prompt": "p"}, "annotations": [{"result": [3, {"value": 4}, {"value": {"text": []}}]}]}', "needs `prompt`"),
    "export whose results are a number": ('{"data": {"prompt": "p"}, "annotations": [{"result": 7}]}', "needs `prompt`"),
    "Argilla of numbers": ('{"fields": {"prompt": "p"}, "responses": {"q": [1]}}', "without submitted responses"),
    "Argilla ranking of nothing": ('{"fields": {"prompt": "p", "a": "x", "b": "y"}, "responses": {"q": [{"value": [[], {}]}]}}', "needs `prompt`"),
    "labeler NaN as text": ('{"prompt": "p", "chosen": "a", "rejected": "c", "labeler": "NaN"}', None),
    "labeler below zero": ('{"prompt": "p", "chosen": "a", "rejected": "c", "labeler": -1.5}', None),
    "dialogue of 3,000 turns": (json.dumps({"prompt": [{"role": ("user", "assistant")[n % 2], "content": "x"} for n in range(3001)], "chosen": "a", "rejected": "c"}), None),
    "array in the middle": ("[" + GOOD.strip() + "]", "expected a JSON object"),
}  # fmt: skip


@pytest.mark.parametrize("name", RECORDS)
def test_a_hostile_row_is_read_or_refused_in_one_line(tmp_path: Path, name: str) -> None:
    text, message = RECORDS[name]
    (tmp_path / "rows.jsonl").write_text(GOOD + text + "\n", encoding="utf-8", errors="surrogatepass")
    entry = DatasetEntry(path="rows.jsonl", problems="error")
    if message is None:
        assert len(read_source(entry, "ranking", tmp_path).records) == 2
        return
    with pytest.raises(UserError) as caught:
        read_source(entry, "ranking", tmp_path)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{tmp_path / 'rows.jsonl'}:2: ")
    assert message in line
    assert len(line) - len(str(tmp_path)) < 1500


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", b"[" * 100_000),
        ("b.json", b'[{"prompt": ' + DIGITS.encode() + b"}]"),
        ("c.json", b"[\xff]"),
        ("d.json", b"[" + GOOD.encode() * 2 + b"]"),
        ("e.json.gz", b"[1"),
        ("f.json.gz", gzip.compress(b"[1", mtime=0)),
        ("g.csv", b'"' * 99_999),
        ("h.csv", b"\xff\xfea,b"),
        ("i.csv", b"," * 10_000 + b"\n" + b"," * 9_999),
        ("j.parquet", b"PAR1" + b"\x00" * 100 + b"PAR1"),
        ("k.parquet", b""),
        ("l.jsonl.zst", b"\x28\xb5\x2f\xfd"),
        ("m.zip", b"PK\x03\x04"),
        ("n.jsonl", b"\x00" * 1000),
        ("o", b"{}"),
    ],
)  # fmt: skip
def test_a_hostile_file_is_refused_in_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_source(DatasetEntry(path=name), "ranking", tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / name}:")
    assert len(str(caught.value).splitlines()) == 1


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(UserError, match=r"rows\.jsonl: is no regular file"):
        read_source(DatasetEntry(path="rows.jsonl"), "ranking", tmp_path)


# ------------------------------------------------------------------------------------------------ cards

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(9)
)


def card(folder: Path, head: str, **files: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_text(f"---\n{head}\n---\n# A card\n", encoding="utf-8")
    for name in ("a.jsonl", "b.jsonl"):
        (folder / name).write_text(GOOD)
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data" / "train-0.jsonl").write_text(GOOD)
    return folder


def config(data_files: str) -> str:
    return f"configs:\n- config_name: default\n  data_files: {data_files}"


@pytest.mark.parametrize(
    ("data_files", "names"),
    [
        ("a.jsonl", ["a.jsonl"]),
        ("[a.jsonl, b.jsonl]", ["a.jsonl", "b.jsonl"]),
        ('"*.jsonl"', ["a.jsonl", "b.jsonl"]),
        ("[{split: train, path: a.jsonl}]", ["a.jsonl"]),
        ("[{split: train, path: [a.jsonl, 'data/*']}]", ["a.jsonl", "train-0.jsonl"]),
        ("{train: a.jsonl, test: b.jsonl}", ["a.jsonl"]),
        ("{train: [a.jsonl, b.jsonl]}", ["a.jsonl", "b.jsonl"]),
        ('"data/train-*"', ["train-0.jsonl"]),
        ('"**/*.jsonl"', ["a.jsonl", "b.jsonl", "train-0.jsonl"]),
    ],
)
def test_data_files_of_every_shape_that_the_hub_allows(tmp_path: Path, data_files: str, names: list[str]) -> None:
    folder = card(tmp_path / "card", config(data_files))
    assert sorted(file.name for file in split_files(folder, "train")) == names


CARDS: dict[str, tuple[str, str]] = {
    "absolute path": (config("/etc/passwd"), "lies outside the card's folder"),
    "path upwards": (config("../secret.jsonl"), "lies outside the card's folder"),
    "path upwards in the middle": (config("data/../../secret.jsonl"), "lies outside the card's folder"),
    "address": (config("https://example.org/a.jsonl"), "lies outside the card's folder"),
    "Hub address": (config("hf://datasets/x/y/a.jsonl"), "lies outside the card's folder"),
    "link out of the folder": (config("link.jsonl"), "is a link out of the card's folder"),
    "pipe": (config("pipe.jsonl"), "match no file"),
    "folder": (config("data"), "match no file"),
    "empty path": (config('""'), "must be {split, path}"),
    "NUL in a path": (config(r'"a\0b"'), "match no file"),
    "long path": (config("x" * 5000), "is no pattern of files"),
    "number": (config("3"), "must name files"),
    "list of numbers": (config("[1, 2]"), "must be {split, path}"),
    "list of lists": (config("[[a.jsonl]]"), "must be {split, path}"),
    "mixed list": (config("[a.jsonl, {split: test, path: b.jsonl}]"), "must be {split, path}"),
    "no path": (config("[{split: train}]"), "must be {split, path}"),
    "no split": (config("[{path: a.jsonl}]"), "must be {split, path}"),
    "split of a list": (config("[{split: [train], path: a.jsonl}]"), "must be {split, path}"),
    "path of an object": (config("[{split: train, path: {a: b}}]"), "must be {split, path}"),
    "null": (config("null"), "no split 'train'"),
    "configs of text": ("configs: default", "`configs` must be a list"),
    "configs of an object": ("configs: {config_name: x}", "`configs` must be a list"),
    "config of text": ("configs: [default]", "each must hold keys and values"),
    "no configs": ("license: mit", "no split 'train'"),
    "head of a list": ("- a\n- b", "expected keys and values"),
    "head of text": ("hello", "expected keys and values"),
    "Python tag": ("a: !!python/object/apply:os.system ['true']", "broken"),
    "unknown tag": ("a: !secret x", "broken"),
    "anchors that explode": (BOMB + config("a.jsonl"), "grow without bounds"),
    "anchor that holds itself": ("a: &a [*a]\n" + config("a.jsonl"), "grow without bounds"),
    "list as a key": ("? [a, b]\n: c\n" + config("a.jsonl"), "broken"),
    "integer of 5,000 digits": (f"a: {DIGITS}\n" + config("a.jsonl"), "broken"),
    "deep": ("a: " + deep(5000) + "\n" + config("a.jsonl"), "broken"),
    "tab": ("a:\n\t- b", "broken"),
    "unclosed": ("a: [b", "broken"),
    "two documents": ("a: b\n--- x\nc: d", "broken"),
    "date beyond dates": ("a: 2026-99-99\n" + config("a.jsonl"), "broken"),
}


@pytest.mark.parametrize("name", CARDS)
def test_a_hostile_card_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.jsonl").write_text(GOOD)
    folder = card(tmp_path / "card", CARDS[name][0])
    (folder / "link.jsonl").symlink_to(tmp_path / "secret.jsonl")
    os.mkfifo(folder / "pipe.jsonl")
    with pytest.raises(UserError) as caught:
        split_files(folder, "train")
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{folder / 'README.md'}: ")
    assert CARDS[name][1] in line
    assert len(line) - len(str(folder)) < 500


def test_a_column_map_of_a_card_is_text(tmp_path: Path) -> None:
    for columns in ("[a]", "{prompt: 3}", "{prompt: [a]}", "x"):
        with pytest.raises(UserError, match="must map our names to the file's"):
            card_columns(card(tmp_path / "card", f"columns: {columns}"))


def test_files_of_the_hubs_cache_are_links_to_its_blobs(tmp_path: Path) -> None:
    folder = tmp_path / "datasets--x" / "snapshots" / "abc"
    folder.parent.mkdir(parents=True)
    card(folder, config("linked.jsonl"))
    (tmp_path / "datasets--x" / "blobs").mkdir()
    (tmp_path / "datasets--x" / "blobs" / "123").write_text(GOOD)
    (folder / "linked.jsonl").symlink_to("../../blobs/123")
    assert [file.name for file in split_files(folder, "train")] == ["linked.jsonl"]

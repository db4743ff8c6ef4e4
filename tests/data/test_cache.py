"""The data cache: one writer, what is whole is read, everything else is built again or refused in one line."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.commands.cache import run as cache_command
from pipeline.data.cache import DataCache, open_entry
from pipeline.data.encoded import encode_documents
from pipeline.data.entries import DatasetEntry
from pipeline.data.notes import READING
from pipeline.data.sources import read_source
from pipeline.errors import UserError

import pytest


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prompts(count: int, mark: str = "") -> list[dict[str, Any]]:
    return [{"prompt": f"Where is parcel {mark}{n}?"} for n in range(count)]


def read(folder: Path, cache: Path, name: str = "a.jsonl", kind: str = "prompt", **entry: Any) -> Any:
    return read_source(DatasetEntry(path=name, **entry), kind, folder, str(cache))


def entries(cache: Path) -> list[str]:
    return [entry.what for entry in DataCache(cache).entries()]


def test_a_second_start_reads_the_cache_and_says_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, READING)
    rows = [{"prompt": "p", "response": "r END", "mood": 1}, {"messages": [{"role": "user", "content": ""}]}]
    write(tmp_path / "a.jsonl", rows)
    words = []
    for _ in range(2):
        caplog.clear()
        records = read(
            tmp_path, tmp_path / "cache", kind="demonstration", problems="drop", response_suffix="END"
        ).records
        words.append([r.getMessage() for r in caplog.records if r.name.startswith(READING)])
        assert [record["messages"][-1]["content"] for record in records] == ["r"]
        (tmp_path / "a.jsonl").touch()  # the name and the content count, not the time
    assert words[0] == words[1]
    assert any("1 rows left out" in text for text in words[0])
    assert any("columns that are not read" in text for text in words[0])


def test_a_moved_file_is_read_from_the_cache_under_its_new_name(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", prompts(3))
    read(tmp_path, tmp_path / "cache")
    (tmp_path / "new").mkdir()
    (tmp_path / "a.jsonl").rename(tmp_path / "new" / "a.jsonl")
    assert read(tmp_path / "new", tmp_path / "cache").records[2]["file"] == str(tmp_path / "new" / "a.jsonl")
    assert len(entries(tmp_path / "cache")) == 1


def test_what_decides_the_rows_decides_the_entry(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [{"question": "q", "prompt": "p"}, {"question": "q2", "prompt": "p2"}])
    for options in ({}, {"columns": {"prompt": "question"}}, {"max_rows": 1}):
        read(tmp_path, tmp_path / "cache", **options)
    write(tmp_path / "a.jsonl", prompts(2))
    read(tmp_path, tmp_path / "cache")
    assert len(entries(tmp_path / "cache")) == 4


def test_a_broken_row_in_the_last_file_keeps_the_cache_of_the_others(tmp_path: Path) -> None:
    folder = tmp_path / "card"
    folder.mkdir()
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: '*.jsonl'\n---\n")
    for n in range(5):
        write(folder / f"{n}.jsonl", [*prompts(3, f"{n}-"), *([{"prompt": 5}] if n == 4 else [])])
    with pytest.raises(UserError, match=r"4\.jsonl:4: "):
        read(tmp_path, tmp_path / "cache", "card")
    assert [what.rsplit("/", 1)[-1] for what in sorted(entries(tmp_path / "cache"))] == [f"{n}.jsonl" for n in range(4)]
    assert not list((tmp_path / "cache").glob("*.building"))
    write(folder / "4.jsonl", prompts(1))
    assert len(read(tmp_path, tmp_path / "cache", "card").records) == 13


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path, source = tmp_path / "a.jsonl", threading.Event()

    def grow() -> None:  # another process writes while the rows are read
        while not list((tmp_path / "cache").glob("*.building")) and not source.is_set():
            pass
        with path.open("a") as file:
            file.write(json.dumps({"prompt": "one more"}) + "\n")

    write(path, prompts(20_000))
    writer = threading.Thread(target=grow)
    writer.start()
    try:
        with pytest.raises(UserError, match=r"a\.jsonl: changed while it was read; start again"):
            read(tmp_path, tmp_path / "cache")
    finally:
        source.set()
        writer.join()
    assert entries(tmp_path / "cache") == []
    assert len(read(tmp_path, tmp_path / "cache").records) == 20_001


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    def build(folder: Path) -> dict[str, Any]:
        (folder / "rows.arrow").symlink_to("/dev/full")
        with (folder / "rows.arrow").open("wb") as file:
            file.write(b"x" * 100_000)
        return {}

    with pytest.raises(
        UserError, match=r"disk of the data cache .* is full; free some space there or name another folder"
    ):
        DataCache(tmp_path / "cache").entry("rows", {}, build)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["locks"]


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", prompts(1))
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"data cache '.*cache' cannot be written \(Not a directory\); .*RLHF_DATA_CACHE"
    ):
        read(tmp_path, tmp_path / "file" / "cache")


def test_a_cache_that_may_only_be_read_is_read(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", prompts(2))
    read(tmp_path, tmp_path / "cache")
    for path in [tmp_path / "cache", *(tmp_path / "cache").rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    assert len(read(tmp_path, tmp_path / "cache").records) == 2


def test_a_damaged_entry_is_built_again(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", prompts(50))
    folder = read(tmp_path, tmp_path / "cache").records.files[0].entry.folder
    os.truncate(folder / "rows.arrow", 100)
    assert open_entry(folder) is None
    assert len(list(read(tmp_path, tmp_path / "cache").records)) == 50


def test_two_builders_at_once_build_once(tmp_path: Path) -> None:
    built = []

    def build(folder: Path) -> dict[str, Any]:
        built.append(threading.get_ident())
        (folder / "rows").write_text("x" * 1000)
        return {"rows": 1}

    def ask() -> None:
        assert DataCache(tmp_path).entry("rows", {"a": 1}, build).facts == {"rows": 1}

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1


@pytest.mark.parametrize("when", ["reading", "encoding"])
def test_what_a_killed_process_leaves_is_never_read(tmp_path: Path, when: str, tokenizer: Any) -> None:
    """Killed while it reads, or while its processes encode: the next start has the same rows as an undisturbed one."""
    write(tmp_path / "a.jsonl", [{"text": f"A wool hat, number {n}. " * 5} for n in range(6000)])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    code = f"""
import os, signal, pathlib
from pipeline.data import encoded, stored_records
from pipeline.data.entries import DatasetEntry
from pipeline.data.sources import read_source
from transformers import AutoTokenizer
import pyarrow as pa
write = pa.ipc.new_file
class Killing:
    def __init__(self, *args): self.writer, self.count = write(*args), 0
    def __enter__(self): return self
    def __exit__(self, *error): return self.writer.__exit__(*error)
    def write_batch(self, batch):
        self.writer.write_batch(batch)
        self.count += 1
        if self.count == 2 and ("ids" in batch.schema.names) == ({when!r} == "encoding"): os.kill(os.getpid(), signal.SIGKILL)
pa.ipc.new_file = Killing
source = read_source(DatasetEntry(path="a.jsonl"), "document", pathlib.Path({str(tmp_path)!r}), {str(tmp_path / "cache")!r})
encoded.encode_documents(source.records, AutoTokenizer.from_pretrained({str(tmp_path / "tokenizer")!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert list((tmp_path / "cache").glob("*.building"))
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    rows = []
    for cache in ("cache", "undisturbed"):
        records = read(tmp_path, tmp_path / cache, kind="document").records
        rows.append([ids.tolist() for ids in encode_documents(records, loaded)])
    assert len(rows[0]) == 6000
    assert rows[0] == rows[1]
    assert not list((tmp_path / "cache").glob("*.building"))


WRITES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.utime", "shutil.rmtree"}


def killed_at(operation: int, cache: Path, body: Callable[[], object]) -> bool:
    """Whether `body` came in a forked process to its operation of this number on files of the cache, and was killed there."""

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal operation
        writes = event in WRITES or (event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR))
        if writes and isinstance(arguments[0], str | os.PathLike) and os.fspath(arguments[0]).startswith(str(cache)):
            if operation == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            operation -= 1

    child = os.fork()
    if child == 0:
        code = 1
        try:
            sys.addaudithook(audit)
            body()
            code = 0
        finally:
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


def test_killed_at_any_file_operation_the_next_start_has_the_same_rows(tmp_path: Path, tokenizer: Any) -> None:
    write(tmp_path / "a.jsonl", [{"text": f"A wool hat, number {n}."} for n in range(20)])

    def rows(cache: Path) -> list[list[int]]:
        records = read(tmp_path, cache, kind="document").records
        return [ids.tolist() for ids in encode_documents(records, tokenizer)]

    expected = rows(tmp_path / "undisturbed")
    kills = 0
    while killed_at(kills, cache := tmp_path / f"cache-{kills}", lambda: rows(cache)):
        assert rows(cache) == expected, f"operation {kills}"
        assert not list(cache.glob("*.building"))
        assert len(entries(cache)) == 2
        kills += 1
    assert rows(cache) == expected
    assert kills >= 12, "folder, lock, building folder, rows, seal and rename of two entries at least"


def test_a_second_start_does_not_tokenise(tmp_path: Path, tokenizer: Any) -> None:
    write(tmp_path / "a.jsonl", [{"text": f"A wool hat, number {n}."} for n in range(50)])
    records = read(tmp_path, tmp_path / "cache", kind="document").records
    first = encode_documents(records, tokenizer)
    calls = []

    class Counting(type(tokenizer)):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            calls.append(args)
            return super().__call__(*args, **kwargs)

    Counting.__name__ = type(tokenizer).__name__
    before, tokenizer.__class__ = tokenizer.__class__, Counting
    try:
        second = encode_documents(records, tokenizer)
    finally:
        tokenizer.__class__ = before
    assert [ids.tolist() for ids in first] == [ids.tolist() for ids in second]
    assert calls == []


def test_another_template_is_another_entry(tmp_path: Path, tokenizer: Any) -> None:
    import copy

    from pipeline.data.encoded import encode_prompts
    from pipeline.data.encoding import PLAIN_TEMPLATE, ROLE_TEMPLATE, ChatEncoder

    write(tmp_path / "a.jsonl", prompts(3))
    records = read(tmp_path, tmp_path / "cache").records
    rows = []
    for template in (ROLE_TEMPLATE, PLAIN_TEMPLATE):
        changed = copy.deepcopy(tokenizer)
        changed.chat_template = template
        encoder = ChatEncoder(changed)
        rows.append([ids.tolist() for ids in encode_prompts(records, encoder)])
        assert rows[-1] == [encoder.prompt_ids(record["prompt"]) for record in records]
    assert rows[0] != rows[1]


def test_the_cache_is_listed_and_cleared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from types import SimpleNamespace

    write(tmp_path / "a.jsonl", prompts(12))
    read(tmp_path, tmp_path / "cache")
    options = {"data_cache": str(tmp_path / "cache")}

    def command(action: str, older_than: float = 0.0) -> str:
        assert cache_command(SimpleNamespace(action=action, older_than=older_than, **options)) == 0  # type: ignore[arg-type]
        return capsys.readouterr().out

    assert "12" in command("list")
    assert command("clear", older_than=1).startswith("0 entries removed")
    assert command("clear").startswith("1 entries removed")
    assert "0 entries" in command("list")

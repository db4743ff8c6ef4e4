"""Streamed Hub datasets: the blocks of the cached path, exact positions, rows that are wrong, held-out documents, refusals.

`datasets` takes a folder as it takes an id of the Hub.
"""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

from pipeline.config.pretrain import PretrainArguments
from pipeline.data.encoding import document_ids
from pipeline.data.entries import DatasetEntry
from pipeline.data.packing import Block, pack_documents
from pipeline.data.sources import read_source
from pipeline.data.splits import is_held_out
from pipeline.data.streaming import HubStream, StreamedBlocks
from pipeline.errors import UserError

import pytest

FRACTION = 0.2
TEXTS = [" ".join(random.Random(n).choices(["a", "cat", "sat", "on", "mats"], k=5 + n % 60)) for n in range(300)]


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data.streaming.WINDOW_CHARACTERS", 3000)


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """Three files of a hundred rows."""
    return write_hub(tmp_path / "hub", [{"text": text, "url": "x"} for text in TEXTS])


def write_hub(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    for number, part in enumerate([rows[:100], rows[100:200], rows[200:]]):
        (folder / f"train-{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


def streamed(hub: Path, tokenizer: Any, isolated: bool = True, **entry: Any) -> StreamedBlocks:
    stream = HubStream(DatasetEntry(hub=str(hub), streaming=True, **entry), FRACTION)
    return StreamedBlocks(stream, tokenizer, 32, isolated=isolated, seed=3, ahead=8)


def key(block: Block) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(i) for i in block[name]) for name in ("input_ids", "position_ids", "labels"))


def first(blocks: StreamedBlocks, number: int) -> list[Any]:
    keys = [key(block) for block in itertools.islice(blocks, number)]
    blocks.close()
    assert blocks.error is None
    return keys


@pytest.mark.parametrize("isolated", [True, False])
def test_a_pass_holds_the_blocks_of_the_cached_path(hub: Path, tokenizer: Any, isolated: bool) -> None:
    training = [text for text in TEXTS if not is_held_out({"text": text}, FRACTION)]
    packed = pack_documents(document_ids(tokenizer, training), 32, isolated=isolated)
    expected = [key(block) for block in packed][:-1]  # the last one goes on in the next pass
    found = first(streamed(hub, tokenizer, isolated), len(expected))
    assert Counter(found) == Counter(expected)
    assert found != expected, "shuffled within windows"


def test_a_stream_goes_on_exactly_from_any_block(hub: Path, tokenizer: Any) -> None:
    number = 1300  # two passes and more
    whole = streamed(hub, tokenizer)
    keys, positions = [], {}
    for count, block in enumerate(itertools.islice(whole, number), 1):
        keys.append(key(block))
        positions[count] = json.loads(json.dumps(whole.position(count)))
    assert whole.seen(number).passes == 2
    whole.close()
    for count in (1, 2, 17, 150, 533, 534, 1299):
        resumed = streamed(hub, tokenizer)
        resumed.go_to(positions[count])
        assert first(resumed, number - count) == keys[count:]
        assert resumed.position(number) == positions[number], "a run that was resumed saves the same"


def test_the_last_asked_for_positions_are_kept(hub: Path, tokenizer: Any) -> None:
    """A trainer has asked for up to `ahead` blocks beyond those that it saves."""
    blocks = streamed(hub, tokenizer)
    for count, _ in enumerate(itertools.islice(blocks, 300), 1):
        assert blocks.position(max(count - 8, 0))["blocks"] == max(count - 8, 0)
    assert len(blocks._recent) < 8
    blocks.close()


def test_rows_and_tokens_that_were_seen_are_counted(hub: Path, tokenizer: Any) -> None:
    blocks = streamed(hub, tokenizer)
    keys = first(blocks, 40)
    seen = blocks.seen(40)
    assert seen.tokens == sum(len(ids) for ids, _, _ in keys)
    assert 0 < seen.rows < 300


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": None, "url": "x", "split": "train"}, "no column `text`; columns are: split, url"),
        ({"text": "  ", "url": "x"}, "`text` is empty; fill it or remove the row"),
        ({"text": "fine", "url": "x", "split": "odd"}, "`split` 'odd' is of neither side"),
    ],
)
def test_a_wrong_row_is_one_line_with_its_number(
    tmp_path: Path, tokenizer: Any, row: dict[str, Any], message: str
) -> None:
    rows = [{"text": text, "url": "x", "split": "train"} for text in TEXTS]
    hub = write_hub(tmp_path / "hub", [*rows[:149], row, *rows[149:]])
    blocks = streamed(hub, tokenizer)
    for _ in zip(range(2000), blocks, strict=False):
        if blocks.error:
            break
    assert str(blocks.error).startswith(f"{hub} (train):150: {message}")
    assert len(str(blocks.error).splitlines()) == 1


def test_wrong_rows_are_left_out_and_counted_where_the_recipe_says_so(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rows: list[dict[str, Any]] = [{"text": text} for text in TEXTS]
    hub = write_hub(tmp_path / "hub", [*rows[:150], {"text": None}, *rows[150:200], {"text": ""}, *rows[200:]])
    without = first(streamed(write_hub(tmp_path / "clean", rows), tokenizer), 700)
    blocks = streamed(hub, tokenizer, problems="drop")
    assert first(blocks, 700) == without
    assert blocks.seen(700).left_out == 2
    assert f"{hub} (train): 1 rows left out" in caplog.text


def test_a_file_that_breaks_in_between_is_one_line(hub: Path, tokenizer: Any) -> None:
    (hub / "train-2.jsonl").write_text('{"text": "fine", "url": "x"}\n{"text": broken\n')
    blocks = streamed(hub, tokenizer)
    for _ in zip(range(2000), blocks, strict=False):
        if blocks.error:
            break
    assert str(blocks.error).startswith(f"{hub} (train):20")
    assert "cannot be read: " in str(blocks.error)
    assert str(blocks.error).endswith("start the same command again to go on from the last checkpoint")


def test_held_out_documents_are_the_first_by_hash_and_never_trained_on(
    hub: Path, tokenizer: Any, tmp_path: Path
) -> None:
    stream = HubStream(DatasetEntry(hub=str(hub), streaming=True), FRACTION)
    source = stream.held_out(10, str(tmp_path / "cache"))
    expected = [text for text in TEXTS if is_held_out({"text": text}, FRACTION)][:10]
    assert [record["text"] for record in source.records] == expected
    assert source.streamed
    with pytest.raises(UserError, match="no document was held out; raise held_out_fraction"):
        HubStream(DatasetEntry(hub=str(hub), streaming=True), 1e-6).held_out(1, str(tmp_path / "cache"))


def test_a_stream_of_held_out_documents_alone_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    hub = write_hub(tmp_path / "hub", [{"text": text, "split": "test"} for text in TEXTS])
    blocks = streamed(hub, tokenizer)
    next(iter(blocks))
    assert str(blocks.error) == f"{hub} (train): no document is left to train on; lower held_out_fraction"


def test_max_rows_ends_a_pass(hub: Path, tokenizer: Any) -> None:
    blocks = streamed(hub, tokenizer, max_rows=50)
    first(blocks, 200)
    assert blocks.seen(200).rows > 100, "several passes"
    assert blocks.seen(200).passes == blocks.seen(200).rows // 50 - (blocks.seen(200).rows % 50 == 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": None}, "a streamed dataset has no known length; say `max_steps:`"),
        ({"datasets": [DatasetEntry(hub="a/b", streaming=True), DatasetEntry(path="c")]}, "not mixed with others"),
        ({"datasets": [DatasetEntry(path="c", streaming=True)]}, "`streaming: true` reads a `hub:` dataset"),
        ({"tokenizer": None, "train_tokenizer": {"vocab_size": 300}}, "name one as `tokenizer:`"),
        ({"held_out_fraction": 0.0}, "leaves no document of a streamed dataset to evaluate"),
        ({"trainer_options": {"dataloader_num_workers": 2}}, "drop `dataloader_num_workers`"),
    ],
)
def test_what_cannot_be_streamed_is_refused(changes: dict[str, Any], message: str) -> None:
    recipe: dict[str, Any] = {
        "output_dir": "out", "tokenizer": "t", "max_steps": 5, "datasets": [DatasetEntry(hub="a/b", streaming=True)],
    }  # fmt: skip
    PretrainArguments(**recipe)
    with pytest.raises(ValueError, match=message):
        PretrainArguments(**{**recipe, **changes})


def test_other_stages_refuse_a_stream() -> None:
    with pytest.raises(
        UserError, match=r"^dataset 'a/b': `streaming: true` works for the `datasets:` of pretrain alone"
    ):
        read_source(DatasetEntry(hub="a/b", streaming=True), "demonstration", Path())


def test_a_stream_that_cannot_be_had_is_one_line(tmp_path: Path, hub: Path) -> None:
    for entry, message in [
        (DatasetEntry(hub=str(hub), split="nope"), "Bad split: nope"),
        (DatasetEntry(hub="nobody/nothing-at-all"), "cannot be had from the Hub"),
    ]:
        with pytest.raises(UserError, match=message) as refusal:
            HubStream(entry, FRACTION)
        assert len(str(refusal.value).splitlines()) == 1

"""`rlhf check` on comparisons: counts by hand, agreement against a textbook, samples that are what they say."""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from helpers.launches import rlhf_here
from pipeline.commands.check_data import check_data, is_data
from pipeline.data.comparison_statistics import ComparisonStatistics, Reservoir
from pipeline.data.comparisons import find_invalid_rankings, summary
from pipeline.data.near_duplicates import near_pairs, normalized
from pipeline.data.records import parse_ranking
from pipeline.data.sources import digest_of, iter_file, read_source
from pipeline.errors import UserError

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


def statistics(rows: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    made = ComparisonStatistics(**options)
    for line, row in enumerate(rows, 1):
        made.add({**parse_ranking(row), "row": row, "line": line})
    return made.result()


def ranking(prompt: str, responses: str, ranks: list[int], labeler: str | None = None) -> dict[str, Any]:
    row: dict[str, Any] = {"prompt": prompt, "responses": list(responses), "ranks": ranks}
    return row | ({"labeler": labeler} if labeler else {})


def test_counts_by_hand() -> None:
    rows = [
        ranking("p", "abc", [1, 2, 2], "ana"),
        ranking("p", "abc", [1, 2, 2], "ana"),  # duplicate
        ranking("p", "abc", [2, 1, 1], "ana"),  # contradicts line 1
        ranking("p", "abc", [1, 2, 3], "ben"),
        ranking("q", "ab", [1, 1], "ben"),  # all tie
        {"prompt": "r", "chosen": "long answer", "rejected": "short"},
        {"prompt": "r", "chosen": "same", "rejected": "same"},
        {"prompt": "r", "chosen": "", "rejected": "b"},
        {"prompt": [{"role": "user", "content": "s"}, {"role": "assistant", "content": "t"}, {"role": "user", "content": "u"}],
         "chosen": "x", "rejected": "longer", "confidence": 0.8},
    ]  # fmt: skip
    found = statistics(rows)
    assert (found["rows"], found["prompts"], found["trainable"], found["multi_turn"]) == (9, 4, 4, 1)
    assert found["labelers"] == {"ana": 3, "ben": 2}
    assert found["unnamed_labeler_rows"] == 4
    assert found["responses_per_row"] == {"2": 5, "3": 4}
    assert (found["pairs"], found["tied_pairs"], found["rows_with_ties"]) == (17, 4, 4)
    assert found["problems"] == {
        "all responses tie": {"rows": 1, "lines": [5]},
        "an empty response": {"rows": 1, "lines": [8]},
        "chosen and rejected are identical": {"rows": 1, "lines": [7]},
        "contradicts": {"rows": 1, "lines": [3]},
        "duplicate": {"rows": 1, "lines": [2]},
    }
    assert found["longer_wins"] == {"share": pytest.approx(1 / 3), "pairs": 3}
    assert found["confidence"] == {"rows": 1, "lowest": 0.8, "median": 0.8, "highest": 0.8}
    assert found["best_position"]["1"] == {"rows": 3, "expected": 1.0}


def test_agreement_of_two_who_judge_alike_and_at_random() -> None:
    rng = random.Random(0)
    rows = []
    for n in range(600):
        first = rng.choice([[1, 2], [2, 1]])
        rows.append(ranking(f"prompt {n}", "ab", first, "ana"))
        rows.append(ranking(f"prompt {n}", "ab", first, "twin"))
        rows.append(ranking(f"prompt {n}", "ab", rng.choice([[1, 2], [2, 1]]), "coin"))
    agreement = statistics(rows)["agreement"]
    pairs = {tuple(item["labelers"]): item for item in agreement["by_labelers"]}
    assert pairs["ana", "twin"]["agreement"] == 1.0
    assert pairs["ana", "coin"]["agreement"] == pytest.approx(0.5, abs=0.06)
    assert agreement["judged_pairs"] == 600
    assert agreement["pairwise"] == pytest.approx(2 / 3, abs=0.04)
    assert agreement["krippendorff_alpha"] == pytest.approx(1 / 3, abs=0.08)


def test_agreement_does_not_hang_on_the_order_of_responses() -> None:
    """The same judgement written the other way round is the same; a tie agrees with a tie alone."""
    same = statistics([ranking("p", "ab", [1, 2], "x"), ranking("p", "ba", [2, 1], "y")])["agreement"]
    assert same["pairwise"] == 1.0
    tied = statistics([ranking("p", "ab", [1, 2], "x"), ranking("p", "ba", [1, 1], "y")])["agreement"]
    assert (tied["pairwise"], tied["pairwise_without_ties"]) == (0.0, None)
    assert statistics([ranking("p", "ab", [1, 2], "x"), ranking("q", "ab", [1, 2], "y")])["agreement"] is None
    # One labeler who says the same twice does not agree with himself.
    assert statistics([ranking("p", "abc", [1, 2, 3], "x"), ranking("p", "ab", [1, 2], "x")])["agreement"] is None


def test_agreement_on_a_sample_of_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data.labeler_agreement.MAX_PAIRS", 100)
    rows = [ranking(f"prompt {n}", "ab", [1, 2], who) for n in range(1000) for who in ("x", "y")]
    agreement = statistics(rows)["agreement"]
    assert 0 < agreement["prompt_share"] <= 0.125
    assert 20 < agreement["judged_pairs"] <= 100
    assert agreement["pairwise"] == 1.0, "a sampled prompt keeps all its judgements"


def test_near_duplicates() -> None:
    text = "Please tell me in a few short words how I can send my broken desk lamp back to your shop this week"
    assert normalized("Héllo,  WORLD!") == "héllo world"
    assert near_pairs([text, text.upper() + "!!", "Something else entirely, about the weather and the sea"]) == [(0, 1)]
    assert near_pairs([text], ["nothing alike here at all, my friend", text + " please"]) == [(0, 1)]
    rows = [{"prompt": f"{text} {'x' * n}", "chosen": "a", "rejected": "b", "split": split} for n, split in enumerate(("train", "test"))]  # fmt: skip
    near = statistics(rows)["near_duplicates"]
    assert (near["pairs"], near["across_splits"], near["lines"]) == (1, 1, [[1, 2]])


def test_leaks_are_found_however_large_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts that stand in the other file to the letter are found among all, not among the sample."""
    monkeypatch.setattr("pipeline.data.comparison_statistics.PROMPT_SAMPLE", 5)
    made = ComparisonStatistics(remember_prompts=True)
    for line in range(1, 201):
        row = {"prompt": f"What is the number {line}?", "chosen": "a", "rejected": "b"}
        made.add({**parse_ranking(row), "row": row, "line": line})
    found = made.against(
        "sft.jsonl", [(1, "what is the number 150"), (2, "Who are you?"), (3, "What is the number 7?")]
    )
    assert (found["rows"], found["same_prompt"], found["lines"]) == (3, 2, [[150, 1], [7, 3]])


def test_a_reservoir_is_uniform() -> None:
    counts = [0] * 20
    for seed in range(2000):
        reservoir = Reservoir(5, seed)
        for item in range(20):
            reservoir.add(item)
        for item in reservoir.items:
            counts[item] += 1
    assert max(abs(count - 500) for count in counts) < 90  # 4.6 standard deviations


def test_every_form_of_a_file_reads_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [ranking(f"Prompt {n}", "abc", [1, 2, 2], "ana") for n in range(30)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    plain, zipped, table = tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz", tmp_path / "c.parquet"
    plain.write_text(text)
    zipped.write_bytes(gzip.compress(text.encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    card = tmp_path / "card"
    card.mkdir()
    renamed = [{"question": row["prompt"], **{k: v for k, v in row.items() if k != "prompt"}} for row in rows]
    (card / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in renamed))
    (card / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: rows.jsonl\n"
        "columns:\n  prompt: question\n---\n"
    )
    found = []
    for target in (plain, zipped, table, card):
        assert is_data(str(target))
        assert check_data(str(target), as_json=True) == 0
        found.append({k: v for k, v in json.loads(capsys.readouterr().out).items() if k != "file"})
    assert found[0] == found[1] == found[2] == found[3]
    assert found[0]["rows"] == 30
    assert check_data(str(card / "rows.jsonl"), columns=["prompt=question"]) == 0
    assert "30, 30 of them trainable" in capsys.readouterr().out
    with pytest.raises(UserError, match="write OURS=THEIRS"):
        check_data(str(plain), columns=["prompt"])
    with pytest.raises(UserError, match="does not exist"):
        check_data(str(tmp_path / "none.jsonl"))


def test_records_may_wait_on_disk(tmp_path: Path) -> None:
    from pipeline.data.entries import DatasetEntry

    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps(ranking(f"p{n}", "ab", [1, 2])) + "\n" for n in range(100)))
    memory = list(iter_file(path, "ranking"))
    disk = read_source(DatasetEntry(path="r.jsonl"), "ranking", tmp_path)
    assert list(disk.records) == memory
    assert disk.sha256 == digest_of([path])
    part = disk.records.select([3, 5])
    assert [r["line"] for r in part] == [4, 6]
    assert disk.records[10:12][1] == memory[11]
    path.write_text(json.dumps(ranking("p", "ab", [1, 2])) + "\n{}\n")
    with pytest.raises(UserError, match=r"r\.jsonl:2: "):
        read_source(DatasetEntry(path="r.jsonl"), "ranking", tmp_path)


def test_control_tokens_and_odd_text_stay_text(tmp_path: Path, tokenizer: Any) -> None:
    from pipeline.data.encoding import ROLE_TEMPLATE, ChatEncoder

    if not tokenizer.chat_template:
        tokenizer.chat_template = ROLE_TEMPLATE
    encoder = ChatEncoder(tokenizer)
    for name in tokenizer.all_special_tokens:
        ids = encoder.response_ids(f"a {name} b")
        assert ids.count(tokenizer.convert_tokens_to_ids(name)) == (name == tokenizer.eos_token)


def test_unnamed_duplicates_are_dropped_and_unnamed_doubts_are_not() -> None:
    rows = [{"prompt": "p", "chosen": a, "rejected": b} for a, b in ("ab", "ab", "ba")]
    records = [{**parse_ranking(row), "line": line} for line, row in enumerate(rows, 1)]
    kept, problems = find_invalid_rankings(records, "drop")
    assert kept == [0, 2]
    assert problems == [(2, "duplicate of line 1")]
    assert summary(problems, "f.jsonl") == "f.jsonl: dropped 1 rankings (1 × duplicate; lines 2)"


@pytest.mark.parametrize("card", ["hh_rlhf", "ultrafeedback", "tldr_comparisons", "demo_comparisons"])
def test_check_counts_a_card(card: str) -> None:
    said, _ = rlhf_here("check", ROOT / "data_cards" / card)
    assert "length bias" in said


def test_trees_of_messages_become_rankings(tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    source = ROOT / "data_cards" / "oasst" / "rows.jsonl"
    command = [sys.executable, str(ROOT / "scripts" / "oasst_rankings.py"), str(source), str(out), "--lang", "en"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("2 rankings in")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["ranks"] for row in rows] == [[1, 2, 3], [1, 2]]
    assert [m["role"] for m in rows[1]["prompt"]] == ["user", "assistant", "user"]
    for row in rows:
        parse_ranking(row)

"""`rlhf score` on files that people have, with a reward model of a few thousand parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helpers.launches import rlhf_here
from helpers.runs import make_run

import pytest
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    return make_run(tmp_path_factory.mktemp("scored") / "run", tokenizer) / "reward"


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_demonstrations_and_rankings_are_scored_beside_their_rows(reward: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "Where?", "response": "Here.", "id": 7}\n', encoding="utf-8")
    assert "score: 1 rows" in rlhf_here("score", tmp_path / "a.jsonl", "--reward", reward)[0]
    (row,) = rows(tmp_path / "a.scored.jsonl")
    assert row["id"] == 7
    (tmp_path / "b.json").write_text(
        json.dumps([{"prompt": "Where?", "responses": ["Here.", "There.", "Here."], "ranks": [1, 2, 1]}]),
        encoding="utf-8",
    )
    rlhf_here("score", tmp_path / "b.json", "--reward", reward)
    (ranked,) = rows(tmp_path / "b.scored.jsonl")
    assert ranked["scores"][0] == pytest.approx(row["score"], abs=1e-5)
    assert ranked["scores"][0] == pytest.approx(ranked["scores"][2], abs=1e-5) != ranked["scores"][1]


def test_parquet_is_scored(reward: Path, tmp_path: Path) -> None:
    import datasets

    data = datasets.Dataset.from_list([{"prompt": "Where?", "response": "Here."}] * 3)
    data.to_parquet(str(tmp_path / "c.parquet"))
    rlhf_here("score", tmp_path / "c.parquet", "--reward", reward)
    assert len(rows(tmp_path / "c.scored.jsonl")) == 3


def test_scores_that_are_not_finite_are_refused(reward: Path, tmp_path: Path, tokenizer: Any) -> None:
    broken = make_run(tmp_path / "broken", tokenizer) / "reward"
    (broken / "lineage.json").unlink()
    weights = load_file(broken / "model.safetensors")
    name = next(iter(weights))
    weights[name][..., 0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "a.jsonl").write_text('{"prompt": "Where?", "response": "Here."}\n', encoding="utf-8")
    assert "finite" in rlhf_here("score", tmp_path / "a.jsonl", "--reward", broken, code=2)[1]


@pytest.mark.parametrize("content", ["", "\n\n", "[]", '{"text": "no prompt"}\n', '{"prompt": 3, "response": "a"}\n'])
def test_files_without_rows_to_score_are_one_line(reward: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "bad.jsonl").write_text(content, encoding="utf-8")
    assert "bad.jsonl" in rlhf_here("score", tmp_path / "bad.jsonl", "--reward", reward, code=2)[1]
    assert not (tmp_path / "bad.scored.jsonl").exists()

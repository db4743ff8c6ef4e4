"""Every dataset card loads with the Hub's own tools and says what the folder holds."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.data.cards import read_card, split_files
from pipeline.data.entries import DatasetEntry
from pipeline.data.sources import read_source
from pipeline.errors import UserError

import datasets
import pytest
from huggingface_hub import DatasetCard, ModelCard

CARDS = sorted(path.parent for path in (Path(__file__).resolve().parents[2] / "data_cards").glob("*/README.md"))


@pytest.mark.parametrize("folder", CARDS, ids=lambda p: p.name)
def test_a_card_loads(folder: Path, tmp_path: Path) -> None:
    card = DatasetCard.load(folder / "README.md")
    head = read_card(folder)
    assert head["license"]
    assert head["language"]
    splits = {entry["split"] for config in head["configs"] for entry in config["data_files"]}
    assert splits
    for split in splits:
        table = datasets.load_dataset(str(folder), split=split, cache_dir=str(tmp_path))
        lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in split_files(folder, split))
        assert table.num_rows == lines > 0
    text = " ".join(card.text.lower().split())
    assert "synthetic" in text or ("**written for this project**" in text and "revision:" in text)
    assert folder.name.startswith("demo_") == ("## known problems" not in card.text.lower())


KINDS = {"hh_rlhf": "ranking", "ultrafeedback": "ranking", "tldr_comparisons": "ranking", "dolly": "demonstration",
         "fineweb_edu": "document", "wikitext": "document"}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_rows_of_a_card_are_records(name: str) -> None:
    """The published schema, read by its card's own column map."""
    folder = CARDS[0].parent / name
    records = read_source(DatasetEntry(path=str(folder)), KINDS[name], Path()).records
    assert len(records) >= 3
    if KINDS[name] == "demonstration":
        assert records[0]["messages"][0]["content"].startswith("Give me two reasons")


def test_a_folder_without_a_card_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs a README"):
        split_files(tmp_path, "train")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: a.jsonl\n---\n"
    )
    with pytest.raises(UserError, match="has no split 'test'; it has: train"):
        split_files(tmp_path, "test")
    with pytest.raises(UserError, match="match no file"):
        split_files(tmp_path, "train")


@pytest.mark.parametrize(
    ("stage", "metric"), [("pretrain", "perplexity"), ("sft", "perplexity"), ("reward", "accuracy"), ("ppo", "kl")]
)
def test_a_models_card_reads_as_the_hub_reads_it(chain: Path, stage: str, metric: str) -> None:
    card = ModelCard.load(chain / stage / "README.md")
    metrics = json.loads((chain / stage / "metrics.json").read_text(encoding="utf-8"))
    results = {result.metric_type: result for result in card.data.eval_results or []}
    assert results[metric].metric_value == pytest.approx(metrics[metric])
    assert results[metric].dataset_name.startswith("held-out part of demo_")
    assert card.data.library_name == "transformers"
    for heading in ("## Metrics", "## Data", "## Parents", "## Limits", "## Settings"):
        assert heading in card.text

"""The report's perplexity of pretraining text: what pretraining itself measured, also where documents need a block each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from helpers.launches import ROOT, launch, tiny_flags
from pipeline.evaluation.alignment_tax import alignment_tax
from pipeline.evaluation.run_folder import read_run

import pytest

MODELS: dict[str, dict[str, Any]] = {
    "LlamaConfig": {"hidden_size": 16, "intermediate_size": 32},
    # It derives positions from the attention mask, so documents of one block see each other.
    "OPTConfig": {"hidden_size": 16, "ffn_dim": 32, "word_embed_proj_dim": 16},
}


@pytest.mark.parametrize("name", MODELS)
def test_the_reports_perplexity_is_that_of_pretraining(name: str, recipes: Path, tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 128, **MODELS[name]}
    model = {"config_class": name, "model_config": json.dumps(sizes)}
    config = recipes / "pretrain.yaml"
    flags = tiny_flags("pretrain", tmp_path, config=config, max_steps=60, learning_rate=1e-2, **model)
    said = launch("pretrain", flags).stderr
    assert ("see each other" in said) == (name == "OPTConfig")
    found = alignment_tax(read_run(tmp_path), {}, str(ROOT))
    measured = json.loads((tmp_path / "pretrain" / "metrics.json").read_text())
    assert found is not None
    assert found["tokens"] == measured["held_out_tokens"]
    assert found["perplexity"]["pretrain"] == pytest.approx(measured["perplexity"], rel=1e-4)


def test_a_stage_that_cannot_be_loaded_is_a_note(chain: Path, tmp_path: Path) -> None:
    """Pretraining's, too, whose text the others are measured on."""
    for stage in ("pretrain", "sft"):
        shutil.copytree(chain / stage, tmp_path / stage)
    run = read_run(tmp_path)
    whole = alignment_tax(run, {}, str(ROOT))
    (tmp_path / "pretrain" / "model.safetensors").unlink()
    found = alignment_tax(run, {}, str(ROOT))
    assert whole is not None
    assert found is not None
    assert found["tokens"] == whole["tokens"]
    assert found["perplexity"] == {"sft": whole["perplexity"]["sft"]}
    assert any("pretrain: its perplexity was not measured" in note for note in run.notes)

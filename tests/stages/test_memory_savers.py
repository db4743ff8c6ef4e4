"""LoRA, 4-/8-bit bases and 8-bit AdamW on the CPU, in SFT and in the reward stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helpers.launches import lineage, tiny_flags
from pipeline import reward, sft
from pipeline.config.stages import STAGES
from pipeline.models.loading import load_causal_lm
from pipeline.models.reward_model import load_scalar_model
from pipeline.training.stage import launch

import pytest
import torch

OPTIONS = {
    "lora": "",
    "4bit": "quantization: 4bit\n",
    "8bit": "quantization: 8bit\n",
    "adamw_8bit": "optimizer: adamw_8bit\n",
}
LORA = "lora:\n  r: 4\n  alpha: 8\n"


def run(stage: str, chain: Path, recipes: Path, tmp_path: Path, extra: str) -> Path:
    """One short run of a stage in this process, its recipe extended by `extra`."""
    recipe = tmp_path / f"{stage}.yaml"
    recipe.write_text((recipes / f"{stage}.yaml").read_text() + extra)
    changes: dict[str, Any] = {
        "parent": chain / ("pretrain" if stage == "sft" else "sft"),
        "max_steps": 8,
        "eval_steps": 4,
        "save_steps": 4,
        "logging_steps": 2,
    }
    flags = tiny_flags(stage, tmp_path, config=recipe, report_to=None, **changes)
    launch(stage, STAGES[stage], {"sft": sft.main, "reward": reward.main}[stage], flags)
    return tmp_path / stage


@pytest.mark.parametrize(
    ("stage", "option"),
    [
        pytest.param(stage, option, marks=[] if option == "lora" or stage == "sft" else pytest.mark.full)
        for stage in ("sft", "reward")
        for option in OPTIONS
    ],
)
def test_a_run_learns_and_leaves_plain_folders(
    stage: str, option: str, chain: Path, recipes: Path, tmp_path: Path
) -> None:
    lora = option != "adamw_8bit"
    folder = run(stage, chain, recipes, tmp_path, OPTIONS[option] + (LORA if lora else ""))
    load = load_causal_lm if stage == "sft" else load_scalar_model
    parent, trained = (
        load(str(chain / ("pretrain" if stage == "sft" else "sft"))).state_dict(),
        load(str(folder)).state_dict(),
    )
    assert trained.keys() == parent.keys()
    changed = {
        name for name in trained if not torch.equal(trained[name], parent[name]) and not name.startswith("score")
    }
    if lora:
        assert (folder / "adapter" / "adapter_model.safetensors").is_file()
        assert changed, "the merged weights hold what was learnt"
        assert not {name for name in changed if "embed" in name or "norm" in name}, "LoRA trains linear layers alone"
        largest = max((trained[name] - parent[name]).abs().max().item() for name in changed)
        assert largest < 0.1, "the fp32 base was merged, not its 4-/8-bit rounding"
    else:
        assert any("embed" in name for name in changed)
        assert not (folder / "adapter").exists()
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert lineage(folder)["status"] == "complete"


@pytest.mark.parametrize("stage", ["sft", pytest.param("reward", marks=pytest.mark.full)])
def test_merged_weights_answer_like_the_adapter(stage: str, chain: Path, recipes: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    folder = run(stage, chain, recipes, tmp_path, LORA)
    load = load_causal_lm if stage == "sft" else load_scalar_model
    base = load(str(chain / ("pretrain" if stage == "sft" else "sft")))
    adapted: Any = PeftModel.from_pretrained(base, str(folder / "adapter")).eval()
    ids = torch.arange(10, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(load(str(folder)).eval()(ids).logits, adapted(ids).logits, atol=1e-4, rtol=1e-4)


def test_eight_bit_states_are_in_eight_bit(
    chain: Path, recipes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The optimizer's key is read: bitsandbytes' AdamW makes the steps."""
    import bitsandbytes

    steps = []
    original = bitsandbytes.optim.AdamW.step
    monkeypatch.setattr(
        bitsandbytes.optim.AdamW,
        "step",
        lambda self, *a, **k: steps.append(self.args.optim_bits) or original(self, *a, **k),
    )
    run("sft", chain, recipes, tmp_path, "optimizer: adamw_8bit\n")
    assert steps == [8] * 8

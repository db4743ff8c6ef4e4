"""What makes a model, a tokenizer or a run another one."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from helpers.outputs import finished
from pipeline.errors import UserError
from pipeline.training.identity import model_identity, same_tokenizer, tokenizer_hashes
from pipeline.training.lineage import LINEAGE, verify_parent

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder with everything that identifies it."""
    (tmp_path / "adapter").mkdir()
    for place in (tmp_path, tmp_path / "adapter"):
        save_file({"w": torch.zeros(2)}, place / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"score_offset": 0.5, "_name_or_path": "here"}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 1], "temperature": 0.7}))
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"r": 4, "base_model_name_or_path": "here"}))
    return tmp_path


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_everything_that_changes_a_models_results_changes_its_identity(folder: Path) -> None:
    seen = [model_identity(folder)]
    change(folder / "config.json", score_offset=5.5)
    seen.append(model_identity(folder))
    change(folder / "generation_config.json", eos_token_id=[2, 1, 7])
    seen.append(model_identity(folder))
    change(folder / "adapter" / "adapter_config.json", r=8)
    seen.append(model_identity(folder))
    save_file({"w": torch.ones(2)}, folder / "adapter" / "model.safetensors")
    seen.append(model_identity(folder))
    save_file({"w": torch.ones(2)}, folder / "model.safetensors")
    seen.append(model_identity(folder))
    assert len(set(seen)) == len(seen)


def test_where_and_by_which_version_a_model_was_saved_does_not(folder: Path) -> None:
    before = model_identity(folder)
    change(folder / "config.json", _name_or_path="/there", transformers_version="6")
    change(folder / "adapter" / "adapter_config.json", base_model_name_or_path="/there")
    change(folder / "generation_config.json", eos_token_id=[1, 2], temperature=1.0)
    (folder / "README.md").write_text("a card")
    assert model_identity(folder) == before


@pytest.mark.parametrize("what", ["config.json", "adapter", "stop tokens"])
def test_a_changed_parent_is_refused(tmp_path: Path, what: str) -> None:
    """Other scores without other weights: an offset, an adapter. And other ends of a response."""
    folder = tmp_path / "reward"
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    (folder / "generation_config.json").write_text('{"eos_token_id": 1}')
    finished(folder)
    files = {"adapter": "adapter/adapter_config.json", "stop tokens": "generation_config.json"}
    change(folder / files.get(what, what), score_offset=5.0, eos_token_id=[1, 2])
    with pytest.raises(UserError, match=rf"its {what}.* changed after the stage finished"):
        verify_parent(str(folder), ("sft",))


# ---------------------------------------------------------------------------------------------- tokenizers


def test_tokenizer_hashes_see_what_matters(tokenizer: Any) -> None:
    same, other = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    same.padding_side = "left"
    assert tokenizer_hashes(same) == tokenizer_hashes(tokenizer)
    other.chat_template = "{{ messages }}"
    assert tokenizer_hashes(other)[0] == tokenizer_hashes(tokenizer)[0]
    assert tokenizer_hashes(other)[1] != tokenizer_hashes(tokenizer)[1]
    other.add_tokens(["new"])
    assert tokenizer_hashes(other)[0] != tokenizer_hashes(tokenizer)[0]


def test_a_tokenizers_hash_survives_saving(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_hashes(AutoTokenizer.from_pretrained(tmp_path)) == tokenizer_hashes(tokenizer)


def word_level(**changes: Any) -> PreTrainedTokenizerFast:
    """A tokenizer built from its stored JSON, with entries of the whole or of its model replaced."""
    words = {"<unk>": 0, "hello": 1, "world": 2, "<eos>": 3}
    stored: dict[str, Any] = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"},
    }  # fmt: skip
    core = Tokenizer.from_str(json.dumps({**stored, **changes}))
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<unk>")


def test_what_a_tokenizer_does_is_its_identity_not_how_it_is_stored() -> None:
    """The same behaviour in other JSON (a sequence of one normalizer) has the same hash; another behaviour another."""
    plain = word_level()
    wrapped = word_level(normalizer={"type": "Sequence", "normalizers": [{"type": "Lowercase"}]})
    assert plain.backend_tokenizer.to_str() != wrapped.backend_tokenizer.to_str()
    assert tokenizer_hashes(wrapped) == tokenizer_hashes(plain)
    others = [
        word_level(normalizer=None),
        word_level(pre_tokenizer={"type": "WhitespaceSplit"}),
        word_level(model={"type": "WordLevel", "vocab": {"<unk>": 0, "hello": 2, "world": 1, "<eos>": 3}, "unk_token": "<unk>"}),
    ]  # fmt: skip
    stripped = word_level()
    stripped.add_tokens([AddedToken("<turn>", lstrip=True)])
    kept = word_level()
    kept.add_tokens([AddedToken("<turn>", lstrip=False)])
    special = word_level()
    special.add_tokens([AddedToken("<turn>", lstrip=False)], special_tokens=True)
    hashes = [tokenizer_hashes(t)[0] for t in (plain, *others, stripped, kept, special)]
    assert len(set(hashes)) == len(hashes)


def test_lineages_with_the_former_hash_still_verify(tokenizer: Any, tmp_path: Path) -> None:
    """The hash that lineages held until now, over the JSON that a tokenizer is stored in."""
    from pipeline.data.hashing import sha256_json

    stored = json.loads(tokenizer.backend_tokenizer.to_str())
    stored.pop("padding"), stored.pop("truncation")
    former = sha256_json([stored, {name: str(value) for name, value in tokenizer.special_tokens_map.items()}])
    assert same_tokenizer(tokenizer, former)
    finished(tmp_path)
    change(tmp_path / LINEAGE, tokenizer_sha256=former)
    parent = verify_parent(str(tmp_path), ("sft",))
    parent.check_tokenizer(tokenizer)
    other = copy.deepcopy(tokenizer)
    other.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(UserError, match="its tokenizer changed after the stage finished"):
        parent.check_tokenizer(other)


# ---------------------------------------------------------------------------------------------- runs


def test_other_scores_of_the_same_weights_are_another_run(tmp_path: Path, tokenizer: Any) -> None:
    """Another `center_on` moves the offset in config.json alone: PPO on it is another run, not one that is complete."""
    from helpers.runs import make_run
    from pipeline.config.rewards import RewardSource
    from pipeline.rollout.rewards import identity
    from pipeline.training.output_folder import StageOutput

    reward = make_run(tmp_path / "run", tokenizer) / "reward"
    recipe = {"reward": [{"model": str(reward), "function": None, "weight": 1.0}]}
    sources = [RewardSource(model=str(reward), function=None, weight=1.0)]
    change(reward / LINEAGE, config_sha256=None)

    def ppo() -> StageOutput:
        return StageOutput(tmp_path / "ppo", "ppo", recipe, {"reward": identity(sources)})

    (tmp_path / "ppo").mkdir()
    save_file({"w": torch.zeros(2)}, tmp_path / "ppo" / "model.safetensors")
    (tmp_path / "ppo" / "config.json").write_text("{}")
    ppo().finish({"parents": [], "datasets": []}, {})
    assert ppo().finished()
    change(reward / "config.json", score_offset=5.0)
    with pytest.raises(UserError, match="with other reward model 0 config_sha256; nothing was overwritten"):
        ppo().finished()

"""Folders that people give as parents: whole ones load in fp32; what is missing, damaged or of another kind is said in a line."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
from pathlib import Path
from typing import Any

from helpers.chat_templates import spaced_tokenizer
from helpers.worlds import make_policy
from pipeline.data.encoding import document_ids
from pipeline.errors import UserError
from pipeline.models.loading import (
    check_batched_length,
    disable_noise,
    load_causal_lm,
    load_classifier,
    new_causal_lm,
    read_config,
)
from pipeline.models.reward_model import load_scalar_model, score_ids
from pipeline.models.tokenizers import add_missing_rows, assign_pad, load_tokenizer, require_rows

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    CohereConfig,
    FalconConfig,
    FalconH1Config,
    Gemma3nTextConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    Phi3Config,
    Qwen3MoeConfig,
)

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=50, **SIZES)).save_pretrained(tmp_path)
    return tmp_path


def change_weights(folder: Path, change: Any) -> None:
    file = folder / "model.safetensors"
    save_file({k: v for k, v in change(load_file(file)).items() if v is not None}, file, metadata={"format": "pt"})


def change_config(folder: Path, name: str = "config.json", **values: Any) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("load", [load_causal_lm, load_scalar_model])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: {k: v for k, v in w.items() if ".layers.1." not in k},
            r"lacks 9 of the \d+ weights .*model.layers.1",
        ),
        (lambda w: {k.replace("layers", "blocks"): v for k, v in w.items()}, r"lacks 18 of"),
        (lambda w: {"x" + k: v for k, v in w.items()}, "lacks .* of"),
        (
            lambda w: {**w, "model.norm.weight": torch.ones(7)},
            r"has 1 weights of other shapes .*model.norm.weight is \(7,\)",
        ),
    ],
    ids=["a missing layer", "renamed", "nothing fits", "another shape"],
)
def test_weights_that_a_folder_lacks_are_never_drawn_at_random(
    load: Any, change: Any, message: str, folder: Path
) -> None:
    change_weights(folder, change)
    with pytest.raises(UserError, match=message):
        load(str(folder))


def test_more_layers_in_the_config_than_in_the_file_are_refused_and_fewer_are_said(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change_config(folder, num_hidden_layers=3, layer_types=None)
    with pytest.raises(UserError, match="lacks 9 of the"):
        load_causal_lm(str(folder))
    change_config(folder, num_hidden_layers=1)
    with caplog.at_level(logging.WARNING, "pipeline"):
        load_causal_lm(str(folder))
    assert "9 weights are not used by its config (model.layers.1." in caplog.text


def test_a_language_model_gets_a_new_head_and_a_reward_model_keeps_its_own(folder: Path, tmp_path: Path) -> None:
    model = load_scalar_model(str(folder))
    model.config.architectures = None
    target = tmp_path / "reward"
    model.save_pretrained(target)
    assert load_classifier(str(target)).num_labels == 1
    change_weights(target, lambda w: {k: v for k, v in w.items() if "score" not in k})
    with pytest.raises(UserError, match=r"lacks 1 of the \d+ weights .*score.weight"):
        load_scalar_model(str(target))


LLAMA4 = {"head_dim": 8, "intermediate_size_mlp": 16, "num_local_experts": 2}


@pytest.mark.parametrize("kind", [CohereConfig, MambaConfig, Llama4TextConfig], ids=lambda c: c.model_type)
def test_an_architecture_without_a_classifier_gets_one(kind: Any, tmp_path: Path) -> None:
    """transformers has none for them; the folder loads again with the same scores. Llama 4's body is not named as its class says."""
    mamba = {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
    sizes: dict[str, Any] = mamba if kind is MambaConfig else SIZES | (LLAMA4 if kind is Llama4TextConfig else {})
    AutoModelForCausalLM.from_config(kind(vocab_size=50, pad_token_id=0, **sizes)).save_pretrained(tmp_path / "lm")
    model = load_scalar_model(str(tmp_path / "lm")).eval()
    model.save_pretrained(tmp_path / "reward")
    again = load_scalar_model(str(tmp_path / "reward")).eval()
    ids = [[5, 6, 7], [8, 9]]
    assert torch.equal(score_ids(model, ids, 0), score_ids(again, ids, 0))
    change_weights(tmp_path / "reward", lambda w: {k: v for k, v in w.items() if "score" not in k})
    with pytest.raises(UserError, match="lacks 1 of"):
        load_scalar_model(str(tmp_path / "reward"))


def test_a_classifier_without_a_class_in_transformers_is_the_text_model_whole(tmp_path: Path) -> None:
    """Buffers that no file holds are set, and the family's configuration with pictures is not built from its defaults."""
    mamba = {
        "mamba_d_ssm": 16,
        "mamba_n_heads": 2,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 8,
    }
    gemma = {
        "head_dim": 8,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 50,
        "laurel_rank": 4,
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": None,
    }
    for kind, sizes in ((FalconH1Config, mamba), (Gemma3nTextConfig, gemma)):
        whole = AutoModelForCausalLM.from_config(kind(vocab_size=50, pad_token_id=0, **SIZES, **sizes))
        folder = tmp_path / kind.model_type
        whole.save_pretrained(folder)
        model = load_scalar_model(str(folder)).eval()
        assert type(model.config) is kind
        held, expected = dict(model.model.named_buffers()), dict(whole.model.named_buffers())
        assert all(torch.equal(held[name], expected[name]) for name in expected)


def test_a_classifier_of_two_labels_is_no_reward_model(tmp_path: Path) -> None:
    AutoModelForSequenceClassification.from_config(LlamaConfig(vocab_size=50, num_labels=2, **SIZES)).save_pretrained(
        tmp_path
    )
    with pytest.raises(UserError, match="has 2 labels; a reward model has one"):
        load_scalar_model(str(tmp_path))


def test_adapters_and_quantised_folders_are_refused_with_the_remedy(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="is a LoRA adapter without its base; merge it"):
        load_causal_lm(str(tmp_path / "adapter"))
    change_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(UserError, match=r"holds quantised weights \(bitsandbytes\).*full precision"):
        load_causal_lm(str(folder))


@pytest.mark.parametrize(
    "values",
    [
        {"hidden_size": "wide"}, {"hidden_size": -4}, {"num_attention_heads": 0}, {"vocab_size": None}, {"model_type": "lama"},
        {"num_hidden_layers": 2.5}, {"hidden_act": "no"}, {"rope_parameters": 7}, {"num_attention_heads": 3},
    ],
)  # fmt: skip
def test_a_config_of_wrong_types_or_sizes_is_one_line(values: dict[str, Any], folder: Path) -> None:
    change_config(folder, **values)
    with pytest.raises(UserError) as caught:
        load_causal_lm(str(folder))
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_config_that_is_no_json_is_one_line(folder: Path) -> None:
    for text in ("{", "[]", "7", ""):
        (folder / "config.json").write_text(text)
        with pytest.raises(UserError, match="no model can be loaded"):
            read_config(str(folder))


@pytest.mark.parametrize(
    ("values", "sampling"),
    [
        ({"do_sample": False, "temperature": 0.9, "top_p": 0.6, "eos_token_id": 0}, False),
        ({"temperature": 0.9, "top_k": 5, "eos_token_id": [0, 3]}, True),
        ({"do_sample": False, "num_beams": 1, "early_stopping": True, "eos_token_id": 0}, False),
    ],
)
def test_a_generation_config_that_cannot_be_saved_is_mended(
    values: dict[str, Any], sampling: bool, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "generation_config.json").write_text(json.dumps(values))
    with caplog.at_level(logging.WARNING, "pipeline"):
        model = load_causal_lm(str(folder))
    model.save_pretrained(tmp_path / "again")
    assert bool(model.generation_config.do_sample) == sampling
    assert model.generation_config.eos_token_id == values["eos_token_id"]
    assert "early_stopping" in values or "generation_config.json has values" in caplog.text


def test_tokens_beyond_the_embedding_get_rows_or_are_refused(tiny_lm: Any, tokenizer: Any) -> None:
    changed, model = copy.deepcopy(tokenizer), copy.deepcopy(tiny_lm)
    assert add_missing_rows(changed, model) is None
    require_rows(changed, model, "here")
    changed.add_tokens(["kettle"])
    changed.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(UserError, match=r"2 tokens that the model has no rows for \('\[PAD\]', 'kettle'\); run SFT"):
        require_rows(changed, model, "here")
    assert "rows were added" in str(add_missing_rows(changed, model))
    assert assign_pad(changed, model) is None
    assert model(torch.tensor([[changed.pad_token_id]])).logits.isfinite().all()


def test_a_tokenizer_without_eos_cannot_end_documents() -> None:
    changed = spaced_tokenizer()
    changed.eos_token = None
    with pytest.raises(UserError, match="has no EOS token; documents could not end"):
        document_ids(changed, ["x"])


def test_a_model_smaller_than_its_tokenizer_is_refused(tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"vocab_size \(100\) is less than the tokenizer's 400 tokens"):
        new_causal_lm("LlamaConfig", {**SIZES, "vocab_size": 100}, tokenizer, 16)
    assert new_causal_lm("LlamaConfig", {**SIZES, "vocab_size": 512}, tokenizer, 16).config.vocab_size == 512


@pytest.mark.parametrize(
    "wrong",
    [
        {"hidden_size": "x"},
        {"hidden_size": 17},
        {"hidden_size": 10**30},
        {"num_attention_heads": 0},
        {"initializer_range": "1e25"},  # what YAML reads where the decimal point is missing
        {"hidden_act": "nope"},
        {"pad_token_id": 10**6},
        {"rope_parameters": 3},
    ],
    ids=str,
)
def test_whatever_a_library_raises_at_a_model_config_is_one_line(wrong: dict[str, Any], tokenizer: Any) -> None:
    with pytest.raises(UserError, match="LlamaConfig refuses these sizes: ") as raised:
        new_causal_lm("LlamaConfig", {**SIZES, **wrong}, tokenizer, 16)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("config_class", ["EncoderDecoderConfig", "RagConfig", "PreTrainedConfig", "CLIPConfig"])
def test_a_config_class_without_a_causal_lm_is_one_line(config_class: str, tokenizer: Any) -> None:
    with pytest.raises(UserError, match=f"model_config: {config_class} refuses these sizes: ") as raised:
        new_causal_lm(config_class, {}, tokenizer, 16)
    assert "\n" not in str(raised.value)


def test_router_logits_are_never_left_on(tmp_path: Path) -> None:
    config = Qwen3MoeConfig(vocab_size=50, num_experts=2, moe_intermediate_size=8, output_router_logits=True, **SIZES)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["output_router_logits"]
    assert not load_causal_lm(str(tmp_path)).config.output_router_logits
    assert not load_scalar_model(str(tmp_path)).config.output_router_logits


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(vocab_size=50, attention_dropout=0.5, **SIZES),
        MixtralConfig(vocab_size=50, num_local_experts=2, router_jitter_noise=0.5, **SIZES),
        FalconConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, attention_dropout=0.5, hidden_dropout=0.5
        ),
    ],
    ids=lambda c: c.model_type,
)  # fmt: skip
def test_nothing_is_random_in_training_mode(config: Any) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).train()
    ids = torch.arange(20)[None]
    assert not torch.equal(model(ids).logits, model(ids).logits)
    disable_noise(model)
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_positions_that_switch_with_the_longest_sequence_are_said(caplog: pytest.LogCaptureFixture) -> None:
    """The states of a short sequence beside a long one, in Phi-3 with longrope, are other than alone."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 16,
        "factor": 4.0,
        **factors,
    }
    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=50,
        original_max_position_embeddings=16,
        max_position_embeddings=64,
        rope_parameters=rope,
        pad_token_id=0,
        initializer_range=0.4,
        **SIZES,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.arange(1, 41)[None].repeat(2, 1)
    with torch.no_grad():
        alone, beside = model(ids[:1, :8]).logits[0], model(ids).logits[0, :8]
    assert not torch.allclose(alone, beside, atol=1e-4)
    for tokens, said in ((16, False), (17, True)):
        caplog.clear()
        check_batched_length(config, tokens, "max_tokens")
        assert ("more than 16 tokens changes the positions" in caplog.text) == said


class _Payload:
    """Unpickled, it writes a file."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> Any:
        return Path.write_text, (self.target, "executed")


@pytest.mark.parametrize("load", [load_causal_lm, load_scalar_model, load_tokenizer])
def test_no_code_of_a_folder_is_run(load: Any, tmp_path: Path) -> None:
    """Neither a pickle in place of the weights, nor a module that a config names."""
    folder, executed = make_policy(tmp_path / "theirs", "abcd"), tmp_path / "executed"
    (folder / "theirs.py").write_text(f"from pathlib import Path\nPath({str(executed)!r}).write_text('code')\n")
    auto = {"AutoConfig": "theirs.C", "AutoModelForCausalLM": "theirs.M", "AutoTokenizer": ["theirs.T", None]}
    for name in ("config.json", "tokenizer_config.json"):
        change_config(folder, name, auto_map=auto)
    with contextlib.suppress(UserError):
        load(str(folder))
    assert not executed.exists()
    if load is not load_tokenizer:
        (folder / "model.safetensors").unlink()
        torch.save({"model.norm.weight": _Payload(executed)}, folder / "pytorch_model.bin")
        with pytest.raises(UserError, match=r"holds more than tensors, .* convert the weights to safetensors"):
            load(str(folder))
        assert not executed.exists()
        torch.load(folder / "pytorch_model.bin", weights_only=False)
        assert executed.exists(), "the file would have done it"

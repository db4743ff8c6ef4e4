"""LoRA: which layers it trains on any architecture, and that what is saved is what was trained."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from helpers.tiny_models import DEEPSEEK4, SMALL
from pipeline.config.trainer import LoraOptions
from pipeline.errors import UserError
from pipeline.models.loading import load_causal_lm
from pipeline.models.lora import linear_module_names, lora_config, read_adapter, save_merged
from pipeline.models.reward_model import load_scalar_model
from pipeline.models.tokenizers import add_missing_rows, assign_pad, assign_template

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

IDS = torch.arange(5, 25)[None]
ARCHITECTURES = {
    "LlamaConfig": SMALL,
    "Qwen3Config": {**SMALL, "head_dim": 8, "num_key_value_heads": 2},
    "GPT2Config": {"vocab_size": 60, "n_embd": 16, "n_layer": 2, "n_head": 2},
    "GPTNeoXConfig": SMALL,
    "FalconConfig": {k: v for k, v in SMALL.items() if k != "intermediate_size"},
    "BloomConfig": {"vocab_size": 60, "hidden_size": 16, "n_layer": 2, "n_head": 2},
    "OPTConfig": {**SMALL, "ffn_dim": 16, "word_embed_proj_dim": 16},
    "MptConfig": {"vocab_size": 60, "d_model": 16, "n_layers": 2, "n_heads": 2},
    "Qwen3MoeConfig": {**SMALL, "num_experts": 2, "moe_intermediate_size": 8, "head_dim": 8, "num_key_value_heads": 2, "num_experts_per_tok": 2},
    "MambaConfig": {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
    "JambaConfig": {**SMALL, "num_experts": 2, "mamba_d_state": 4, "use_mamba_kernels": False, "attn_layer_period": 2, "attn_layer_offset": 1, "num_key_value_heads": 2},
    "GptOssConfig": {**SMALL, "num_local_experts": 2, "num_experts_per_tok": 2, "head_dim": 8, "num_key_value_heads": 1},
    "XGLMConfig": {"vocab_size": 60, "d_model": 16, "ffn_dim": 16, "num_layers": 2, "attention_heads": 2},
    "StableLmConfig": {**SMALL, "num_key_value_heads": 2},
    "DeepseekV3Config": {**SMALL, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "moe_intermediate_size": 8, "num_key_value_heads": 2},
}  # fmt: skip


def trained(model: Any, config: Any) -> Any:
    """A few steps that move every adapter weight."""
    adapted = get_peft_model(model, config).train()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    for _ in range(3):
        out = adapted(input_ids=IDS)
        (-torch.log_softmax(out.logits, -1)[..., 7].mean() if out.logits.ndim == 3 else out.logits.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapted.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def same(one: Any, other: Any) -> None:
    torch.testing.assert_close(logits(one), logits(other), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_default_targets_are_linear_layers_that_learn(name: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, name)(**ARCHITECTURES[name]))
    targets = linear_module_names(model)
    assert targets
    assert not {"", "0", "lm_head", "embed_out"} & set(targets)
    modules = dict(model.named_modules())
    hit = {n for n in modules if any(n == t or n.endswith("." + t) for t in targets)}
    assert all(hasattr(modules[n], "weight") and modules[n].weight.ndim == 2 for n in hit)
    adapted = get_peft_model(model, lora_config(model, LoraOptions(r=2, alpha=4), "CAUSAL_LM")).train()
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    silent = [n for n, p in adapted.named_parameters() if "lora_B" in n and (p.grad is None or not p.grad.abs().sum())]
    assert len(silent) <= len(hit) // 2, f"these never learn: {silent}"


def test_a_layer_whose_weights_are_read_without_a_call_is_no_target() -> None:
    """Jamba's `dt_proj`: its adapter changed nothing in training and everything when merged."""
    model = AutoModelForCausalLM.from_config(transformers.JambaConfig(**ARCHITECTURES["JambaConfig"]))
    assert "dt_proj" not in linear_module_names(model)
    with pytest.raises(UserError, match="reads the weights of 'dt_proj' without calling the layer"):
        lora_config(model, LoraOptions(target_modules=["dt_proj"]), "CAUSAL_LM")
    assert "router" not in linear_module_names(model)


def test_a_layer_that_is_several_products_at_once_is_no_target() -> None:
    """DeepSeek V4's `o_a_proj` is a linear layer by its type, with a product of its own for each group of heads."""
    model = AutoModelForCausalLM.from_config(transformers.DeepseekV4Config(**DEEPSEEK4))
    adapted: Any = get_peft_model(model, lora_config(model, LoraOptions(r=2, alpha=4), "CAUSAL_LM"))
    assert any("o_b_proj.lora_B" in name for name, _ in adapted.named_parameters())
    adapted(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    with pytest.raises(UserError, match="'o_a_proj' without calling the layer as a linear one"):
        lora_config(model, LoraOptions(target_modules=["o_a_proj"]), "CAUSAL_LM")


def test_targets_that_the_model_lacks_are_named_with_what_it_has(tiny_lm: Any) -> None:
    has = "down_proj" if "Llama" in type(tiny_lm).__name__ else "c_fc"
    with pytest.raises(UserError, match=rf"has no linear layer 'query_key_value'; it has .*{has}"):
        lora_config(tiny_lm, LoraOptions(target_modules=["query_key_value"]), "CAUSAL_LM")
    every = lora_config(tiny_lm, LoraOptions(target_modules=["all-linear"]), "CAUSAL_LM")
    assert set(every.target_modules or ()) == set(linear_module_names(tiny_lm))


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def base(request: pytest.FixtureRequest, tokenizer: Any, tmp_path: Path) -> Path:
    config = transformers.LlamaConfig(**{**SMALL, "vocab_size": len(tokenizer)}, tie_word_embeddings=request.param)
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("added", ["nothing", "pad", "words", "chatml and pad"])
@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_what_is_saved_is_what_was_trained(base: Path, added: str, task: str, tokenizer: Any, tmp_path: Path) -> None:
    load: Any = load_causal_lm if task == "CAUSAL_LM" else load_scalar_model
    model, changed = load(str(base)), copy.deepcopy(tokenizer)
    changed.chat_template = None
    if "words" in added:
        changed.add_tokens(["kettle", "parcel"])
    if "pad" in added:
        changed.pad_token = changed.eos_token
        changed.add_tokens(["<|pad|>x"])  # the vocabulary's own pad is not unused here
    assign_template(changed, model, "chatml" if "chatml" in added else None)
    add_missing_rows(changed, model)
    if "pad" in added:
        changed.add_special_tokens({"pad_token": "<|new pad|>"})
        add_missing_rows(changed, model)
    assign_pad(changed, model)
    adapted = trained(model, lora_config(model, LoraOptions(r=2, alpha=4), task, changed))
    new = sorted(i for i in changed.get_vocab().values() if i >= len(tokenizer) and i != changed.pad_token_id)
    expected = logits(adapted)
    save_merged(adapted, load(str(base)), changed, tmp_path / "out")
    torch.testing.assert_close(logits(load(str(tmp_path / "out"))), expected, atol=2e-5, rtol=2e-5)

    weights = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    embeddings = [w for n, w in weights.items() if "embed" in n or "lm_head" in n]
    assert all(len(w) == len(new) for w in embeddings), "new rows only, never a whole table"
    assert bool(embeddings) == bool(new)
    plain = load(str(base))
    if new:  # the base has no such rows yet
        plain.resize_token_embeddings(len(changed), mean_resizing=False)
    again = PeftModel.from_pretrained(plain, tmp_path / "out" / "adapter")
    shown = logits(again)
    torch.testing.assert_close(shown[..., : len(tokenizer)], expected[..., : len(tokenizer)], atol=2e-5, rtol=2e-5)


def test_a_tied_table_is_no_target(base: Path) -> None:
    model = load_causal_lm(str(base))
    for name in ("embed_tokens", "lm_head"):
        if model.config.tie_word_embeddings:
            with pytest.raises(UserError, match=f"'{name}' is tied in this model"):
                lora_config(model, LoraOptions(target_modules=[name]), "CAUSAL_LM")
        else:
            lora_config(model, LoraOptions(target_modules=[name]), "CAUSAL_LM")


def test_an_adapter_keeps_the_names_of_its_model(tokenizer: Any, tmp_path: Path) -> None:
    """peft renamed Laguna's `shared_experts` as in an older checkpoint; the merged model lacked their adapters."""
    sizes = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 8,
    }
    config = transformers.LagunaConfig(
        **{**SMALL, **sizes, "vocab_size": len(tokenizer)},
        num_key_value_heads=2,
        head_dim=8,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0),
    )
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    model = load_causal_lm(str(tmp_path / "base"))
    adapted = trained(model, lora_config(model, LoraOptions(r=2, alpha=4), "CAUSAL_LM"))
    assert any("shared_experts" in name and "lora_B" in name for name, _ in adapted.named_parameters())
    expected = logits(adapted)
    save_merged(adapted, load_causal_lm(str(tmp_path / "base")), tokenizer, tmp_path / "out")
    torch.testing.assert_close(logits(load_causal_lm(str(tmp_path / "out"))), expected, atol=2e-5, rtol=2e-5)


ZAMBA2 = {"num_key_value_heads": 2, "n_mamba_heads": 4, "mamba_d_state": 4, "chunk_size": 8, "num_mem_blocks": 1}


def test_a_weight_that_layers_share_is_no_target() -> None:
    """Zamba 2 has one attention block in several places: each place's adapter, merged, would change all the others."""
    layers = ["mamba", "hybrid", "mamba", "hybrid"]
    sizes = {**SMALL, **ZAMBA2, "num_hidden_layers": 4}
    model: Any = AutoModelForCausalLM.from_config(transformers.Zamba2Config(**sizes, layers_block_type=layers)).eval()
    adapted: Any = get_peft_model(model, lora_config(model, LoraOptions(r=2, alpha=4), "CAUSAL_LM")).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    expected = logits(adapted)
    torch.testing.assert_close(logits(adapted.merge_and_unload()), expected, atol=2e-5, rtol=2e-5)
    with pytest.raises(UserError, match="'q_proj' is one weight that several layers of Zamba2ForCausalLM share"):
        lora_config(model, LoraOptions(target_modules=["q_proj"]), "CAUSAL_LM")


def test_a_small_copy_without_attention_layers_tries_its_layers() -> None:
    """It is tried without a cache, which counts no tokens where no layer attends."""
    layers = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1, "mamba_chunk_size": 8}
    sizes = {**SMALL, **layers, "num_local_experts": 2, "num_experts_per_tok": 1, "shared_intermediate_size": 8}
    config = transformers.GraniteMoeHybridConfig(**sizes, num_key_value_heads=2, layer_types=["mamba"] * 2)
    model = AutoModelForCausalLM.from_config(config)
    assert lora_config(model, LoraOptions(r=2, alpha=4), "CAUSAL_LM").target_modules


def test_a_reward_adapter_is_read_back(base: Path, tokenizer: Any, tmp_path: Path) -> None:
    model = load_scalar_model(str(base))
    adapted = trained(model, lora_config(model, LoraOptions(r=2, alpha=4), "SEQ_CLS", tokenizer))
    save_merged(adapted, load_scalar_model(str(base)), tokenizer, tmp_path / "out")
    found = read_adapter(str(tmp_path / "out"))
    assert found is not None
    config, weights, head = found
    assert config.task_type == "CAUSAL_LM"
    assert head.shape == (1, 16)
    assert all("lora_" in name for name in weights)


def test_an_encoders_pooler_is_saved_with_its_head(tokenizer: Any, tmp_path: Path) -> None:
    """A language model's folder has no pooler: the adapter must bring the one that it was trained with."""
    config = transformers.BertConfig(**{**SMALL, "vocab_size": len(tokenizer)}, pad_token_id=tokenizer.pad_token_id)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    model = load_scalar_model(str(tmp_path / "bert"))
    adapted = trained(model, lora_config(model, LoraOptions(r=2, alpha=4), "SEQ_CLS", tokenizer))
    save_merged(adapted, load_scalar_model(str(tmp_path / "bert")), tokenizer, tmp_path / "out")
    same(load_scalar_model(str(tmp_path / "out")), adapted)

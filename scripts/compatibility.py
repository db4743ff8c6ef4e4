"""Which templates and architectures work, tried on tiny models: writes docs/compatibility.md.

    python scripts/compatibility.py [--output docs/compatibility.md]

A cell is "exact", or says how another way was taken ("slower: …"), or why it is refused ("refused: …"). A cell is never
assumed: each is computed by the functions that the stages call.
"""

# ruff: noqa: E402 - families of templates are shared with the tests

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

from helpers.chat_templates import FAMILIES, spaced_tokenizer, with_family
from pipeline.config.trainer import LoraOptions
from pipeline.data.encoding import IGNORE, ChatEncoder
from pipeline.errors import UserError
from pipeline.models.loading import load_causal_lm
from pipeline.models.lora import lora_config, save_merged
from pipeline.models.reward_model import init_head, load_scalar_model, score_ids
from pipeline.models.tokenizer_training import train_tokenizer
from pipeline.models.tokenizers import assign_template, forbidden_token_ids, stop_token_ids
from pipeline.models.trials import enable_packed_attention, isolates_packed_documents
from pipeline.rollout.engine import (
    CachedDecoder,
    LocalEngine,
    SamplingSettings,
    WholeBatchDecoder,
    decoder_of,
    per_row_uniforms,
)

import torch
import transformers
import trl
from peft import get_peft_model
from transformers import AutoModelForCausalLM

PACKAGES = ("torch", "transformers", "trl", "peft", "tokenizers")
EXACT = "exact"

# ------------------------------------------------------------------------------------------------ templates

TEMPLATE_COLUMNS = ("SFT", "multi-turn", "stop", "ids at serving")
DIALOGUE = [
    {"role": "user", "content": "My kettle 12 is broken.\nWhat now?"},
    {"role": "assistant", "content": "Sorry, we send a new one."},
    {"role": "user", "content": "  Thanks! Straße 日本 🙂"},
    {"role": "assistant", "content": "You are welcome."},
]


def templates() -> dict[str, Any]:
    """Tokenizers with every template that is tried, by name."""
    texts = [f"My kettle number {i} is broken. We will send a new one, customer {i}." for i in range(200)]
    base = train_tokenizer(texts, 400)
    tokenizers = {name: with_family(base, name) for name in FAMILIES}
    tokenizers["plain, for models without a template"] = _without_template(base)
    spaced = spaced_tokenizer()
    spaced.chat_template = FAMILIES["mistral"].template
    tokenizers["mistral on a SentencePiece tokenizer"] = spaced
    for path in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja")):
        tokenizer = copy.deepcopy(base)
        tokenizer.chat_template = path.read_text(encoding="utf-8")
        _add_control_tokens(tokenizer)
        tokenizers[f"trl: {path.stem}"] = tokenizer
    return tokenizers


def _without_template(base: Any) -> Any:
    tokenizer = copy.deepcopy(base)
    tokenizer.chat_template = None
    assign_template(tokenizer)
    return tokenizer


def _add_control_tokens(tokenizer: Any) -> None:
    """The tokens that a template writes, as the models that it belongs to have them: thoughts and tools are not special."""
    import re

    names = set(
        re.findall(
            r"<[|｜][^<>{}'\"+ ]*?[|｜]>|<[a-z_]+\|>|<\|[a-z_]+>|</?[a-z_]+>|\[/?INST\]", tokenizer.chat_template
        )
    )
    ordinary = {
        name for name in names if re.fullmatch(r"</?[a-z_]+>", name) and "turn" not in name and "utterance" not in name
    }
    new = sorted(names - ordinary - set(tokenizer.get_vocab()))
    tokenizer.add_special_tokens({"extra_special_tokens": new}, replace_extra_special_tokens=False)
    tokenizer.add_tokens(sorted(ordinary))


def template_row(tokenizer: Any) -> list[str]:
    """The cells of one template."""
    if note := assign_template(copy.deepcopy(tokenizer)):
        assign_template(tokenizer)
    dated = "date frozen" if note and "date" in note else ""
    try:
        encoder = ChatEncoder(tokenizer)
    except UserError as error:
        return [f"refused: {error}"] * len(TEMPLATE_COLUMNS)
    return [_sft(encoder), _multi_turn(encoder), _stop(encoder), _serving(encoder, dated)]


def _sft(encoder: ChatEncoder) -> str:
    ids, labels = encoder.dialogue(DIALOGUE[:2])
    prompt = encoder.prompt_ids(DIALOGUE[:1])
    response = encoder.response_ids(DIALOGUE[1]["content"])
    right = ids == prompt + response and labels == [IGNORE] * len(prompt) + response
    return EXACT if right else "wrong"


def _multi_turn(encoder: ChatEncoder) -> str:
    examples = encoder.examples(DIALOGUE)
    trained = "".join(encoder.texts([[i for i in labels if i != IGNORE]])[0] for _, labels in examples)
    if "".join(trained.split()) != "".join((DIALOGUE[1]["content"] + DIALOGUE[3]["content"]).split()):
        return "wrong"
    return EXACT if encoder.trains_earlier else "slower: one example per answer, since history opens answers otherwise"


def _stop(encoder: ChatEncoder) -> str:
    stops = stop_token_ids(encoder)
    forbidden = forbidden_token_ids(encoder.tokenizer, len(encoder.tokenizer), stops)
    names = [repr(name).strip("'") for name in encoder.tokenizer.convert_ids_to_tokens(stops)]
    if encoder.end_id not in stops or set(stops) & set(forbidden) or encoder.tokenizer.pad_token_id not in forbidden:
        return "wrong"
    return "exact: " + ", ".join(f"`{name}`" for name in names)


def _serving(encoder: ChatEncoder, dated: str) -> str:
    shown: Any = DIALOGUE[:3]
    if encoder.template.as_parts:
        shown = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in shown]
    served = encoder.tokenizer.apply_chat_template(shown, add_generation_prompt=True, tokenize=True, return_dict=False)
    if list(served) != encoder.prompt_ids(DIALOGUE[:3]):
        return "wrong" if not encoder.notes else f"differs, said: {encoder.notes[-1]}"
    merged = "system text goes into the first user turn" if encoder.template.merges_system else ""
    return ": ".join(part for part in (EXACT, ", ".join(p for p in (dated, merged) if p)) if part)


# ------------------------------------------------------------------------------------------------ architectures

ARCHITECTURE_COLUMNS = ("packed documents", "packed PPO", "batch sampling", "save, reload", "LoRA", "reward head")
BASE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
KV = {**BASE, "num_key_value_heads": 2}
HEAD = {**KV, "head_dim": 8}
OLD = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
WINDOW = {"sliding_window": 4}
MLA = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "LlamaConfig": KV,
    "MistralConfig": {**HEAD, **WINDOW},
    "Qwen2Config": KV,
    "Qwen3Config": HEAD,
    "GemmaConfig": HEAD,
    "Gemma2Config": {**HEAD, **WINDOW},
    "Gemma3TextConfig": {**HEAD, **WINDOW},
    "PhiConfig": KV,
    "Phi3Config": {**KV, "pad_token_id": 0},
    "CohereConfig": KV,
    "Cohere2Config": {**HEAD, **WINDOW},
    "OlmoConfig": KV,
    "Olmo2Config": KV,
    "Olmo3Config": {**KV, **WINDOW},
    "GraniteConfig": {**KV, "logits_scaling": 4.0},
    "StableLmConfig": KV,
    "Starcoder2Config": KV,
    "SmolLM3Config": {**KV, "pad_token_id": 0},
    "NemotronConfig": HEAD,
    "GlmConfig": {**HEAD, "pad_token_id": 0},
    "Glm4Config": {**HEAD, "pad_token_id": 0},
    "HeliumConfig": HEAD,
    "Exaone4Config": {**KV, **WINDOW},
    "ArceeConfig": KV,
    "Ernie4_5Config": HEAD,
    "SeedOssConfig": HEAD,
    "GPT2Config": OLD,
    "GPTNeoConfig": {"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 4, "max_position_embeddings": 64},
    "GPTNeoXConfig": BASE,
    "GPTJConfig": {**OLD, "rotary_dim": 4},
    "GPTBigCodeConfig": OLD,
    "CodeGenConfig": {**OLD, "rotary_dim": 4},
    "OPTConfig": {**BASE, "ffn_dim": 32, "word_embed_proj_dim": 32},
    "BloomConfig": {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "FalconConfig": {k: v for k, v in BASE.items() if k != "intermediate_size"},
    "MptConfig": {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "XGLMConfig": {"vocab_size": 64, "d_model": 32, "ffn_dim": 32, "num_layers": 2, "attention_heads": 4, "max_position_embeddings": 64},
    "MixtralConfig": {**KV, "num_local_experts": 4},
    "Qwen2MoeConfig": {**KV, **EXPERTS, "shared_expert_intermediate_size": 16},
    "Qwen3MoeConfig": {**HEAD, **EXPERTS},
    "OlmoeConfig": {**KV, "num_experts": 4, "num_experts_per_tok": 2},
    "GraniteMoeConfig": {**KV, "num_local_experts": 4, "num_experts_per_tok": 2},
    "GptOssConfig": {**HEAD, **WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
    "PhimoeConfig": {**KV, "num_local_experts": 4},
    "DeepseekV3Config": {**KV, **MLA, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "moe_intermediate_size": 16},
    "MambaConfig": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "Mamba2Config": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    "RecurrentGemmaConfig": {**HEAD, "attention_window_size": 4, "num_hidden_layers": 3, "lru_width": 32},
    "Qwen3NextConfig": {**HEAD, **EXPERTS, **LINEAR, "shared_expert_intermediate_size": 16, "layer_types": ["linear_attention", "full_attention"]},
    "Lfm2Config": {**KV, "layer_types": ["conv", "full_attention"]},
    "JambaConfig": {**KV, "num_experts": 2, "mamba_d_state": 4, "use_mamba_kernels": False, "attn_layer_period": 2, "attn_layer_offset": 1},
}  # fmt: skip
IDS = torch.tensor([[5 + (7 * i) % 50 for i in range(12)]])
PROMPTS = [[9, 8], [5, 6, 7, 11, 12, 13, 14, 15], [20, 21, 22]]
CHECK_ERRORS = (UserError, RuntimeError, ValueError, TypeError, AttributeError, LookupError, NotImplementedError)


def build(name: str) -> Any:
    """A tiny random model; gains near one, so that every layer shows in the output."""
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    known = set(cls().to_dict()) | set(getattr(cls, "attribute_map", {}))
    sizes = {key: value for key, value in ARCHITECTURES[name].items() if key in known or key == "vocab_size"}
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    model = AutoModelForCausalLM.from_config(cls(**{**ids, **sizes}), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(max(1.0, 0.5 / (parameter.shape[-1] ** 0.5 * max(parameter.std().item(), 1e-6))))
    return model


def architecture_row(name: str) -> list[str]:
    """The cells of one architecture."""
    try:
        model = build(name)
    except (AttributeError, *CHECK_ERRORS) as error:
        return [f"refused: this transformers makes no tiny one ({_line(error)})"] * len(ARCHITECTURE_COLUMNS)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        checks: list[Callable[[], str]] = [
            lambda: _isolation(copy.deepcopy(model)),
            lambda: _packed(copy.deepcopy(model)),
            lambda: _sampling(model),
            lambda: _reload(model, folder),
            lambda: _lora(folder),
            lambda: _reward(folder),
        ]
        return [_cell(check) for check in checks]


def _cell(check: Callable[[], str]) -> str:
    try:
        return check()
    except CHECK_ERRORS as error:
        return f"refused: {_line(error)}"


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160].replace("|", "/")


def _isolation(model: Any) -> str:
    return EXACT if isolates_packed_documents(model) else "slower: one document per row"


def _packed(model: Any) -> str:
    return EXACT if enable_packed_attention(model) else "slower: padded sequences"


def _sampling(model: Any) -> str:
    decoder = decoder_of(model)
    settings = SamplingSettings(max_new_tokens=6, stop_ids=[0, 3, 4, 5], forbidden_ids=[], pad_id=0)
    uniforms = per_row_uniforms(0, range(len(PROMPTS)), 6)
    engine = LocalEngine(settings)
    together = [sample.ids for sample in engine.sample(model, PROMPTS, uniforms)]
    alone = [engine.sample(model, [p], uniforms[i : i + 1])[0].ids for i, p in enumerate(PROMPTS)]
    if together != alone:
        return "wrong"
    if decoder is CachedDecoder:
        return EXACT
    return "slower: finished rows are computed on" if decoder is WholeBatchDecoder else "slower: without a cache"


def _reload(model: Any, folder: str) -> str:
    again = load_causal_lm(folder).eval()
    with torch.no_grad():
        same = torch.equal(model(input_ids=IDS, use_cache=False).logits, again(input_ids=IDS, use_cache=False).logits)
    return EXACT if same else "wrong"


def _lora(folder: str) -> str:
    """Adapters learn, and the merged folder gives the logits that were trained."""
    model: Any = load_causal_lm(folder)
    adapted = get_peft_model(model, lora_config(model, LoraOptions(r=2, alpha=4), "CAUSAL_LM")).eval()
    adapted(input_ids=IDS, use_cache=False).logits.logsumexp(-1).sum().backward()
    named = {name: p for name, p in adapted.named_parameters() if "lora_B" in name}
    learning = [name for name, p in named.items() if p.grad is not None and p.grad.abs().sum() > 0]
    if not learning:
        return "refused: no adapter learns"
    with torch.no_grad():
        for p in named.values():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
        trained = adapted(input_ids=IDS, use_cache=False).logits
        target = Path(folder) / "merged"
        save_merged(adapted, load_causal_lm(folder), train_tokenizer(["a b"], 300), target)
        saved = load_causal_lm(str(target)).eval()(input_ids=IDS, use_cache=False).logits
    if not torch.allclose(trained, saved[..., : trained.shape[-1]], atol=1e-3, rtol=1e-3):
        return "wrong"
    silent = len(named) - len(learning)
    return EXACT if not silent else f"exact: {silent} of {len(named)} adapters get no gradient on this text"


def _reward(folder: str) -> str:
    """A new head, saved and read again: the same scores, whatever the batch."""
    model: Any = load_scalar_model(folder).eval()
    model.config.get_text_config().pad_token_id = 1
    init_head(model, 1.0, 0)
    together = score_ids(model, PROMPTS, 1)
    alone = torch.cat([score_ids(model, [ids], 1) for ids in PROMPTS])
    target = Path(folder) / "reward"
    model.save_pretrained(target)
    again = score_ids(load_scalar_model(str(target)).eval(), PROMPTS, 1)
    if not (torch.allclose(together, alone, atol=1e-3, rtol=1e-3) and torch.allclose(together, again, atol=1e-4)):
        return "wrong"
    return EXACT


# ------------------------------------------------------------------------------------------------ the page


def table(title: str, first: str, columns: tuple[str, ...], rows: dict[str, list[str]]) -> str:
    """A Markdown table."""
    lines = [f"## {title}", "", f"| {first} | " + " | ".join(columns) + " |", "|" + " --- |" * (len(columns) + 1)]
    lines += [
        f"| {name} | " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for name, cells in rows.items()
    ]
    return "\n".join(lines) + "\n"


INTRODUCTION = """# Compatibility

Made by `python scripts/compatibility.py` with {versions}. Each cell was computed on a tiny random model or on a tokenizer of
the family's shape, by the functions that the stages call. *exact*: as the model or template defines it. *slower*: right, by
another way than the fastest. *refused*: the stage says so in one line before it trains.

A base model without a template is given a plain one: `User:` and `Assistant:` lines, each content behind a line break, so that its
ids are the same alone and in the whole, after BOS where the tokenizer starts texts with it, answers ended by EOS. It needs no
new token. `chat_template: chatml` in the recipe takes ChatML instead: two tokens that the model learns, and that other tools know.
`chat_template:` also takes a file or the text of a template.

"""
TEMPLATE_LEGEND = """
SFT: a dialogue is its prompt and its response, labels on the response. Multi-turn: every answer is trained, with its end. Stop: the
tokens at which sampling stops. Ids at serving: prompts have the ids of `apply_chat_template(tokenize=True)`.
"""
ARCHITECTURE_LEGEND = """
Packed documents: several per row, each with the states that it has alone. Packed PPO: sequences without padding. Batch sampling: a
row samples in a batch what it samples alone. Save, reload: the same logits to the bit. LoRA: default targets learn, and the merged
model gives the logits that were trained. Reward head: scores do not depend on the batch, and survive saving.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default=str(ROOT / "docs" / "compatibility.md"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    page = INTRODUCTION.format(versions=versions)
    page += table("Templates", "template", TEMPLATE_COLUMNS, {n: template_row(t) for n, t in templates().items()})
    page += TEMPLATE_LEGEND + "\n"
    rows = {}
    for name in ARCHITECTURES:
        rows[name.removesuffix("Config")] = architecture_row(name)
        print(name, rows[name.removesuffix("Config")], flush=True)
    page += table("Architectures", "architecture", ARCHITECTURE_COLUMNS, rows) + ARCHITECTURE_LEGEND
    Path(options.output).write_text(page, encoding="utf-8")
    print(f"{options.output}: {page.count(' wrong')} cells wrong")


if __name__ == "__main__":
    main()

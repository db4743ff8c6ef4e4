"""Worlds small enough to be solved exactly: a tiny language model whose every response can be enumerated."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipeline import ppo, reward
from pipeline.algorithms.logprobs import tempered_logits
from pipeline.config.stages import STAGES
from pipeline.data.encoding import ROLE_TEMPLATE, ROLE_TOKENS, ChatEncoder
from pipeline.models.loading import load_causal_lm
from pipeline.models.reward_model import init_head, load_scalar_model, set_offset
from pipeline.models.tokenizers import forbidden_token_ids, load_tokenizer
from pipeline.training.stage import launch

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

Distribution = dict[tuple[int, ...], float]


def make_policy(
    folder: Path, symbols: str, seed: int = 0, prompts: str = "ab", layers: int = 1, head_size: int = 8
) -> Path:
    """A random Llama over `symbols`, with pad, eos and role tokens of its own; prompts are single symbols."""
    words = ["<|pad|>", "<|eos|>", "<|unk|>", *ROLE_TOKENS, *symbols]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<|unk|>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|pad|>",
        eos_token="<|eos|>",
        unk_token="<|unk|>",
        additional_special_tokens=list(ROLE_TOKENS),
        chat_template=ROLE_TEMPLATE,
    )
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=2 * head_size,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.4,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    folder.mkdir(parents=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder.parent / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts * 8))
    return folder


def make_reward(folder: Path, policy: Path, scale: float = 1.0) -> Path:
    """A reward model on the policy's backbone with a random head; its raw scores and its offset are about as large as `scale`."""
    model: Any = load_scalar_model(str(policy))
    init_head(model, scale, seed=0)
    set_offset(model, scale)
    tokenizer = load_tokenizer(str(policy))
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train_reward(folder: Path, parent: Path, lora: bool | dict[str, Any]) -> Path:
    """Run the real reward stage in this process, for six steps; returns its output folder."""
    data = folder / "rankings.jsonl"
    folder.mkdir()
    data.write_text(
        "".join(
            json.dumps(
                {"prompt": "abcd"[i % 4] * (1 + i % 3), "chosen": "b" * (1 + i % 3), "rejected": "ca"[: 1 + i % 2]}
            )
            + "\n"
            for i in range(64)
        )
    )
    recipe: dict[str, Any] = {
        "parent": str(parent), "output_dir": str(folder / "out"), "datasets": [{"path": str(data)}], "held_out_fraction": 0.3,
        "precision": "fp32", "threads": 1, "quiet": True, "max_tokens": 32, "examples_per_step": 8, "max_steps": 6,
        "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 100,
    }  # fmt: skip
    path = folder / "reward.yaml"
    path.write_text(
        yaml.safe_dump(
            recipe | ({"lora": lora} if isinstance(lora, dict) else {"lora": {"r": 4, "alpha": 8}} if lora else {})
        )
    )
    launch("reward", STAGES["reward"], reward.main, ["--config", str(path)])
    return folder / "out"


def write_recipe(folder: Path, policy: Path, body: str, **changes: Any) -> Path:
    """A PPO recipe, and beside it the module of its reward: `body` is that of score(prompt, response)."""
    name = f"world_{hashlib.sha256(body.encode()).hexdigest()[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.py").write_text(
        "import math\n\n\ndef one(prompt, response):\n    "
        + body
        + "\n\n\ndef score(prompts, responses, rows):\n"
        + "    return [one(p, r.replace(' ', '')) for p, r in zip(prompts, responses, strict=True)]\n"
    )
    values: dict[str, Any] = {
        "parent": str(policy), "reward": f"{name}:score", "output_dir": str(folder / "out"),
        "datasets": [{"path": str(policy.parent / "prompts.jsonl")}], "eval_datasets": [{"path": str(policy.parent / "prompts.jsonl")}],
        "precision": "fp32", "threads": 1, "quiet": True, "total_rollouts": 150, "prompts_per_rollout": 256, "minibatches": 2,
        "ppo_epochs": 2, "max_prompt_tokens": 8, "max_response_tokens": 1, "missing_eos": "none", "kl_coef": 1.0,
        "learning_rate": 1e-2, "value_learning_rate": 2e-2, "gae_lambda": 1.0, "save_steps": 1000, "generation_rows": 512,
        "micro_batch_tokens": 100_000, "value_clip_range": 10.0,
    }  # fmt: skip
    recipe = folder / "ppo.yaml"
    recipe.write_text(yaml.safe_dump({**values, **changes}))
    return recipe


def train(folder: Path, policy: Path, body: str, **changes: Any) -> dict[str, Any]:
    """Run the real stage in this process; returns its lineage."""
    recipe = write_recipe(folder, policy, body, **changes)
    launch("ppo", STAGES["ppo"], ppo.main, ["--config", str(recipe)])
    return json.loads((folder / "out" / "lineage.json").read_text())  # type: ignore[no-any-return]


@torch.no_grad()
def distribution(folder: Path, prompt: str, max_tokens: int, temperature: float = 1.0) -> Distribution:
    """Every response that may be sampled (through EOS, or cut at `max_tokens`) and its exact probability."""
    model, tokenizer = load_causal_lm(str(folder)).double().eval(), load_tokenizer(str(folder))
    encoder = ChatEncoder(tokenizer)
    start = encoder.prompt_ids([{"role": "user", "content": prompt}])
    forbidden = torch.tensor(forbidden_token_ids(tokenizer, model.config.vocab_size, [encoder.eos_id]))
    open_rows: Distribution = {(): 1.0}
    finished: Distribution = {}
    for _ in range(max_tokens):
        rows = list(open_rows)
        ids = torch.tensor([[*start, *row] for row in rows])
        logits = model(input_ids=ids).logits[:, -1]
        probabilities = torch.softmax(tempered_logits(logits, temperature, forbidden).double(), -1)
        grown: Distribution = {}
        for row, chances in zip(rows, probabilities.tolist(), strict=True):
            for token, chance in enumerate(chances):
                if chance > 0:
                    target = finished if token == encoder.eos_id else grown
                    target[(*row, token)] = open_rows[row] * chance
        open_rows = grown
    return finished | open_rows


def texts(folder: Path, responses: Distribution) -> dict[tuple[int, ...], str]:
    encoder = ChatEncoder(load_tokenizer(str(folder)))
    return {ids: encoder.texts([ids])[0].replace(" ", "") for ids in responses}


def optimum(reference: Distribution, scores: Mapping[tuple[int, ...], float], beta: float) -> Distribution:
    """π*(y) ∝ π_ref(y) · exp(score(y) / β): what PPO with a KL penalty must reach."""
    top = max(scores.values())
    weights = {ids: p * math.exp((scores[ids] - top) / beta) for ids, p in reference.items()}
    total = sum(weights.values())
    return {ids: weight / total for ids, weight in weights.items()}


def total_variation(one: Distribution, other: Distribution) -> float:
    return 0.5 * sum(abs(one.get(ids, 0.0) - other.get(ids, 0.0)) for ids in one.keys() | other.keys())


def distance(
    run: Path,
    policy: Path,
    score: Callable[[str, str, bool], float],
    beta: float,
    max_tokens: int,
    prompts: str = "ab",
    **options: Any,
) -> float:
    """Largest total variation, over the prompts, between a trained policy and the optimum.

    Args:
        score: (prompt, text, stopped) -> score
    """
    eos = load_tokenizer(str(policy)).eos_token_id
    worst = 0.0
    for prompt in prompts:
        reference = distribution(policy, prompt, max_tokens, **options)
        said = texts(policy, reference)
        scores = {ids: score(prompt, said[ids], ids[-1] == eos) for ids in reference}
        found = distribution(run, prompt, max_tokens, **options)
        worst = max(worst, total_variation(found, optimum(reference, scores, beta)))
    return worst

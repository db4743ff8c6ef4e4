"""Compute of each stage: tokens, steps and floating-point operations, from its recipe and a sample of its data.

6 operations per parameter and trained token, 4 where the base is frozen, 2 where nothing is trained (Kaplan et al. 2020). In a
mixture of experts the parameters are those that a token passes through. Attention is counted apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.config.stages import SUPPORT
from pipeline.data.encoding import ChatEncoder, document_ids
from pipeline.data.packing import Joined
from pipeline.data.sources import read_sources
from pipeline.data.splits import shuffle_by_hash
from pipeline.errors import UserError
from pipeline.models.tokenizer_training import train_tokenizer
from pipeline.models.tokenizers import assign_template
from pipeline.planning.attention import attention_flops
from pipeline.planning.parameters import Parameters, has_experts, share_of_experts

SAMPLE = 300  # rows of a source whose tokens are counted
DOCUMENT_CHARACTERS = 20_000  # of a document, of which tokens per character are counted
LIMITS = {"pretrain": "block_tokens", "ppo": "max_prompt_tokens"}  # else max_tokens
BACKWARD = 2  # passes that a backward pass counts as


@dataclass
class Model:
    """A stage's model, known by its config."""

    config: Any
    size: Parameters
    tokenizer: Any = None


@dataclass(frozen=True)
class PPOModels:
    """The networks of a PPO stage; reward: the largest reward model, None with functions only."""

    policy: Model
    value: Model
    reward: Model | None


@dataclass(frozen=True)
class Data:
    """Rows and their mean tokens, or what the recipe's limits allow where no data is there."""

    rows: int | None
    tokens: float
    responses: float = 1.0
    counted: bool = True


@dataclass
class Work:
    """Compute of a stage: floating-point operations by phase, and tokens."""

    steps: int
    tokens: float
    flops: dict[str, float]
    attention_flops: float = 0.0
    recomputed_flops: float = 0.0
    notes: list[str] = field(default_factory=list)


# ------------------------------------------------------------------------------------------------ data


def count_data(name: str, recipe: Any, model: Model) -> Data:
    """Rows of the datasets, and the mean tokens of a sample of them.

    Raises:
        UserError: no data, and no `max_steps:` that would do without; no row fits.
    """
    limit = float(getattr(recipe, LIMITS.get(name, "max_tokens")))
    if name == "pretrain" and recipe.datasets[0].streaming:
        return Data(None, limit, counted=False)
    try:
        sources = read_sources(recipe.datasets, SUPPORT[name].rows, recipe.data_root, recipe.data_cache)
    except UserError as error:
        if name != "ppo" and recipe.max_steps is None:
            raise UserError(f"{name}: {error}; or say `max_steps:` to plan without data") from error
        return Data(None, limit, counted=False)
    records = Joined([source.records for source in sources])
    if name == "pretrain":
        return _documents(recipe, model, records)
    rows = round(len(records) * (1 - recipe.held_out_fraction))
    if model.tokenizer is None:
        return Data(rows, limit, counted=False)
    assign_template(model.tokenizer)
    encoder, sample = ChatEncoder(model.tokenizer), _sample(records)
    if name == "reward":
        return _rankings(recipe, encoder, records, sample)
    lengths = [
        len(encoder.dialogue(r["messages"])[0]) if name == "sft" else len(encoder.prompt_ids(r["prompt"]))
        for r in sample
    ]
    return Data(rows, _mean([n for n in lengths if n <= limit]))


def _documents(recipe: Any, model: Model, records: Sequence[Any]) -> Data:
    """Blocks of the text, by the tokens per character of a sample."""
    if model.tokenizer is None:
        model.tokenizer = train_tokenizer((r["text"] for r in records), recipe.train_tokenizer.vocab_size)
    sample = [r["text"][:DOCUMENT_CHARACTERS] for r in _sample(records)]
    per_character = sum(map(len, document_ids(model.tokenizer, sample))) / max(sum(map(len, sample)), 1)
    tokens = per_character * sum(len(r["text"]) for r in records) * (1 - recipe.held_out_fraction)
    return Data(max(1, int(tokens // recipe.block_tokens)), float(recipe.block_tokens))


def _rankings(recipe: Any, encoder: ChatEncoder, records: Sequence[Any], sample: Sequence[Any]) -> Data:
    """Rankings by training labelers, their responses and tokens, of those that fit into max_tokens."""
    texts = [[len(encoder.response_ids(text)) for text in r["responses"]] for r in sample]
    prompts = [len(encoder.prompt_ids(r["prompt"])) for r in sample]
    fitting = [(p, t) for p, t in zip(prompts, texts, strict=True) if p + max(t) <= recipe.max_tokens]
    if not fitting:
        raise UserError(f"reward: no row fits into max_tokens ({recipe.max_tokens}); raise it")
    held_out = sum(r.get("labeler") in recipe.held_out_labelers for r in records) / len(records)
    return Data(
        rows=round(round(len(records) * (1 - recipe.held_out_fraction)) * (1 - held_out)),
        tokens=_mean([sum(p + n for n in t) for p, t in fitting]),
        responses=_mean([len(t) for _, t in fitting]),
    )


def _sample(records: Sequence[Any]) -> list[Any]:
    """A sample that hashes choose."""
    return shuffle_by_hash(records[:: max(1, len(records) // (4 * SAMPLE))])[:SAMPLE]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)


# ------------------------------------------------------------------------------------------------ work


def trainer_work(name: str, recipe: Any, model: Model, data: Data) -> Work:
    """Of pretrain, sft or reward."""
    row_tokens = data.tokens
    if name == "sft" and recipe.packing and data.rows is not None:
        steps = math.ceil(data.rows * data.tokens / recipe.max_tokens * recipe.epochs / recipe.examples_per_step)
        row_tokens = float(recipe.max_tokens)
    else:
        steps = math.ceil((data.rows or 0) * recipe.epochs / recipe.examples_per_step)
    steps = recipe.max_steps or steps
    tokens = steps * recipe.examples_per_step * row_tokens
    # A frozen base needs no gradients of its weights; attention has no weights and always needs its whole backward pass.
    per_parameter = 4 if getattr(recipe, "lora", None) is not None else 6
    length = row_tokens / data.responses
    recomputed = 1 if recipe.gradient_checkpointing else 0
    work = Work(
        steps=steps,
        tokens=tokens,
        flops={"train": per_parameter * model.size.active * tokens},
        attention_flops=attention_flops(model.config, tokens, length, 1 + BACKWARD + recomputed),
        recomputed_flops=2.0 * model.size.active * tokens * recomputed,
        notes=_notes_on_experts(model),
    )
    if not data.counted:
        streamed = [str(entry.hub) for entry in recipe.datasets if entry.streaming]
        what = f"{streamed[0]} is streamed and was not read" if streamed else "no data counted"
        work.notes.append(f"{what}: every row is taken to be as long as the recipe allows")
    return work


def ppo_work(
    recipe: Any, models: PPOModels, data: Data, prompt_tokens: float | None = None, response_tokens: float | None = None
) -> Work:
    """Of PPO.

    Args:
        prompt_tokens, response_tokens: means that the user expects; default: of the data, and the longest allowed.
    """
    prompt = prompt_tokens or data.tokens
    response = response_tokens or float(recipe.max_response_tokens)
    episodes = recipe.total_rollouts * recipe.prompts_per_rollout
    tokens = episodes * (prompt + response)
    passes = ppo_passes(recipe, models)
    per_parameter = 4 if recipe.roles == "adapters" else 6
    policy, value = models.policy.size.active, models.value.size.active
    own_value = 0 if recipe.roles == "shared_trunk" else value
    scored = 2 * policy + own_value + (models.reward.size.active if models.reward else 0)
    flops = {
        "generate": 2.0 * policy * tokens,
        "score": 2.0 * scored * tokens,
        "update": float(per_parameter) * recipe.ppo_epochs * (policy + own_value) * tokens,
    }
    work = Work(recipe.total_rollouts * recipe.ppo_epochs * recipe.minibatches, tokens, flops)
    if recipe.gradient_checkpointing:
        work.recomputed_flops = 2.0 * recipe.ppo_epochs * (policy + own_value) * tokens
    work.attention_flops = sum(
        attention_flops(model.config, tokens, prompt + response, number) for model, number in passes if number
    )
    work.notes += _notes_on_experts(models.policy)
    if recipe.ptx_coef:
        blocks = episodes * recipe.ppo_epochs * recipe.ptx_ratio
        flops["ptx"] = float(per_parameter) * policy * blocks * recipe.ptx_block_tokens
        ptx_tokens = blocks * recipe.ptx_block_tokens
        work.attention_flops += attention_flops(models.policy.config, ptx_tokens, recipe.ptx_block_tokens, 1 + BACKWARD)
        work.notes.append(f"ptx: {blocks:,.0f} blocks of {recipe.ptx_block_tokens} tokens")
    counted = "given" if prompt_tokens else "measured" if data.counted else "taken"
    work.notes.append(
        f"{episodes:,} episodes of {prompt:.0f} prompt tokens ({counted}) and {response:.0f} response tokens "
        f"({'given' if response_tokens else 'the most allowed'})"
    )
    return work


def ppo_passes(recipe: Any, models: PPOModels) -> list[tuple[Model, int]]:
    """Forward passes of each network over an episode, a backward pass counted as two.

    The policy generates, is measured, and is trained in every epoch; the reference and the reward model are measured once;
    the value network is measured and trained, or comes with the policy where they share a backbone.
    """
    trained = recipe.ppo_epochs * (1 + BACKWARD + int(recipe.gradient_checkpointing))
    own_value = 0 if recipe.roles == "shared_trunk" else 1 + trained
    passes = [(models.policy, 2 + trained), (models.policy, 1), (models.value, own_value)]  # the second: the reference
    return [*passes, (models.reward, 1)] if models.reward else passes


def _notes_on_experts(model: Model) -> list[str]:
    if not has_experts(model.config):
        return []
    share = share_of_experts(model.config)
    if share == 1.0:
        return ["mixture of experts: its config does not say how many experts a token takes; all are counted"]
    return [
        f"mixture of experts: computes with {model.size.active / model.size.total:.0%} of its parameters, holds them all"
    ]

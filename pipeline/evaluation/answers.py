"""The answers of every stage to the same held-out prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.data.encoding import ChatEncoder, Message
from pipeline.data.records import Record
from pipeline.errors import UserError
from pipeline.evaluation.text import distinct_n, repetition
from pipeline.models.loading import load_causal_lm
from pipeline.models.precision import accelerator_type
from pipeline.models.tokenizers import forbidden_token_ids, load_tokenizer, stop_token_ids
from pipeline.rollout.engine import LocalEngine, SamplingSettings, per_row_uniforms
from pipeline.rollout.rewards import Answers
from pipeline.rollout.vllm_folders import Engine, ServedFolders

import numpy as np
import torch

SEED = 2**30  # of the report's samples, apart from those of training


@dataclass(frozen=True)
class ModelAnswers:
    """One model's answer to each prompt, as rewards take them, in the tokens of its `encoder`.

    stop_ids: the tokens that end its responses.
    """

    answers: Answers
    encoder: ChatEncoder
    stop_ids: Sequence[int]

    @property
    def texts(self) -> Sequence[str]:
        return self.answers.texts

    @property
    def lengths(self) -> np.ndarray:
        """(prompts,) tokens of each response."""
        return np.array([len(ids) for ids in self.answers.response_ids], float)

    @property
    def finished(self) -> list[bool]:
        """(prompts,) whether each response ended at a stop token."""
        return [len(ids) > 0 and ids[-1] in self.stop_ids for ids in self.answers.response_ids]


@dataclass(frozen=True)
class Sampler:
    """A model ready to answer prompts."""

    model: Any
    encoder: ChatEncoder
    engine: Engine

    @property
    def settings(self) -> SamplingSettings:
        return self.engine.settings


def sampling_settings(model: Any, encoder: ChatEncoder, ppo_recipe: dict[str, Any]) -> SamplingSettings:
    """As the PPO recipe samples: its length, temperature, stop and forbidden tokens."""
    stop_ids = stop_token_ids(encoder, model.generation_config, ppo_recipe.get("stop_tokens", []))
    logits_size = model.get_output_embeddings().weight.shape[0]
    return SamplingSettings(
        max_new_tokens=ppo_recipe.get("max_response_tokens", 64),
        stop_ids=stop_ids,
        forbidden_ids=forbidden_token_ids(encoder.tokenizer, logits_size, stop_ids),
        pad_id=encoder.tokenizer.pad_token_id,
        temperature=ppo_recipe.get("temperature", 1.0),
        rows=ppo_recipe.get("generation_rows", 64),
    )


def load_sampler(folder: Path, ppo_recipe: dict[str, Any], served: ServedFolders | None = None) -> Sampler:
    """Load a stage's model.

    Args:
        served: samples in place of this process.

    Raises:
        UserError: no model, no template, or weights that are not finite.
    """
    encoder = ChatEncoder(load_tokenizer(str(folder)))
    model = load_finite_model(folder)
    settings = sampling_settings(model, encoder, ppo_recipe)
    engine = LocalEngine(settings) if served is None else served.engine(folder, encoder.tokenizer, settings)
    return Sampler(model, encoder, engine)


def load_finite_model(folder: Path) -> Any:
    """A causal LM in evaluation mode on the device that stages run on.

    Raises:
        UserError: it cannot be loaded, or its weights hold NaN or infinities.
    """
    model: Any = load_causal_lm(str(folder)).eval()
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise UserError(f"its weights are not finite ({name}); the stage diverged, train it again")
    return model.to(accelerator_type())


def sample_answers(sampler: Sampler, prompts: Sequence[Record]) -> ModelAnswers:
    """One sampled answer to each prompt, with the same random numbers for every model."""
    ids = [sampler.encoder.prompt_ids(record["prompt"]) for record in prompts]
    uniforms = per_row_uniforms(SEED, range(len(ids)), sampler.settings.max_new_tokens)
    sampled = sampler.engine.sample(sampler.model, ids, uniforms)
    return as_answers(sampler, prompts, [response.ids for response in sampled])


def as_answers(sampler: Sampler, prompts: Sequence[Record], response_ids: Sequence[Sequence[int]]) -> ModelAnswers:
    """Responses to prompts, with what judges need."""
    answers = Answers(
        prompts=[record["prompt"] for record in prompts],
        prompt_ids=[sampler.encoder.prompt_ids(record["prompt"]) for record in prompts],
        response_ids=response_ids,
        texts=sampler.encoder.texts(response_ids),
        rows=[record["row"] for record in prompts],
    )
    return ModelAnswers(answers, sampler.encoder, sampler.settings.stop_ids)


def variety(answers: ModelAnswers) -> dict[str, float]:
    """Metrics of a model's answers: variety within and among them, length, share that ended."""
    lengths = answers.lengths
    return {
        "distinct_2": distinct_n(answers.texts, 2),
        "repetition_3": repetition(answers.texts, 3),
        "stopped": float(np.mean(answers.finished)),
        "mean_tokens": float(lengths.mean()),
        "shortest": int(lengths.min()),
        "longest": int(lengths.max()),
    }


def dialogue_text(messages: Sequence[Message]) -> str:
    """A prompt as one text: its content, or every turn with its role where it is more than one user's turn."""
    if len(messages) == 1 and messages[0]["role"] == "user":
        return messages[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)

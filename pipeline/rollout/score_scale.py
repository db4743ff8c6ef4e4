"""The scale and offset of a trained reward model's scores: variance 1 over the parent's answers, 0 over demonstrations."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.config.reward import RewardArguments
from pipeline.data.comparisons import digest
from pipeline.data.encoding import ChatEncoder
from pipeline.data.messages import Message
from pipeline.data.records import at_row
from pipeline.data.sources import Source
from pipeline.errors import UserError
from pipeline.models.loading import fit_embeddings, load_causal_lm
from pipeline.models.lora import scale_adapter_head
from pipeline.models.reward_model import scale_head, score_ids, set_offset
from pipeline.models.tokenizers import forbidden_token_ids, stop_token_ids
from pipeline.rollout.engine import LocalEngine, SamplingSettings, per_row_uniforms

import numpy as np

logger = logging.getLogger("pipeline.reward")


def distinct_prompts(sources: Sequence[Source], positions: Sequence[np.ndarray], number: int) -> list[list[Message]]:
    """The first `number` different prompts at some positions in each source."""
    prompts: dict[bytes, list[Message]] = {}
    if number == 0:
        return []
    for source, part in zip(sources, positions, strict=True):
        for position in part:
            prompt = source.records[int(position)]["prompt"]
            prompts.setdefault(digest(repr(prompt)), prompt)
            if len(prompts) == number:
                return list(prompts.values())
    return list(prompts.values())


def scale_to_unit_variance(
    model: Any, encoder: ChatEncoder, prompts: Sequence[list[Message]], args: RewardArguments
) -> float:
    """Scale the head so that scores of the parent's own answers have variance 1 (Ziegler et al. 2019); returns the factor.

    The scaled head is saved to `args.output_dir`, in the adapter too.
    """
    ids = [encoder.prompt_ids(prompt) for prompt in prompts]
    scores = score_ids(model, sample_answers(model, encoder, ids, args), encoder.tokenizer.pad_token_id)
    std = scores.std().item()
    if not std > 0:
        raise UserError("unit_variance_samples: all answers of the parent score alike; leave the key out")
    scale_head(model, 1 / std)
    model.save_pretrained(args.output_dir)
    if args.lora is not None:
        scale_adapter_head(Path(args.output_dir) / "adapter", 1 / std)
    logger.info("reward: scores divided by %.3f, their deviation over %d answers of the parent", std, len(ids))
    return 1 / std


def sample_answers(
    model: Any, encoder: ChatEncoder, prompt_ids: list[list[int]], args: RewardArguments
) -> list[list[int]]:
    """Token ids of prompts with answers that the parent samples, as the reward model reads them."""
    room = args.max_tokens - max(map(len, prompt_ids))
    if room < 1:
        raise UserError("unit_variance_samples: the prompts leave no room under max_tokens for an answer")
    policy = load_causal_lm(args.parent).to(next(model.parameters()).device).eval()
    tokenizer = encoder.tokenizer
    fit_embeddings(policy, len(tokenizer))
    stop_ids = stop_token_ids(encoder, policy.generation_config)
    settings = SamplingSettings(
        max_new_tokens=room,
        stop_ids=stop_ids,
        forbidden_ids=forbidden_token_ids(tokenizer, policy.config.get_text_config().vocab_size, stop_ids),
        pad_id=tokenizer.pad_token_id,
    )
    uniforms = per_row_uniforms(args.seed, range(len(prompt_ids)), room)
    answers = LocalEngine(settings).sample(policy, prompt_ids, uniforms)
    return [p + encoder.finished_ids(a.ids, stop_ids) for p, a in zip(prompt_ids, answers, strict=True)]


def mean_demonstration_score(
    model: Any, encoder: ChatEncoder, demonstrations: Sequence[Source], max_tokens: int
) -> float:
    """Mean raw score of demonstrations: what the offset must take off. Longer ones than `max_tokens` are left out."""
    rows: list[list[int]] = []
    too_long = 0
    for record in (record for source in demonstrations for record in source.records):
        with at_row(record):
            prompt, answer = record["messages"][:-1], record["messages"][-1]["content"]
            ids = encoder.prompt_ids(prompt) + encoder.response_ids(answer)
        if len(ids) <= max_tokens:
            rows.append(ids)
        else:
            too_long += 1
    if too_long:
        logger.warning("reward: center_on: %d demonstrations over max_tokens (%d) are left out", too_long, max_tokens)
    if not rows:
        logger.warning("reward: no demonstrations to centre scores on (`center_on:`); the offset is 0")
        return 0.0
    set_offset(model, 0.0)
    return float(score_ids(model, rows, encoder.tokenizer.pad_token_id).double().mean())

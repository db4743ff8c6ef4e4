"""The scale and offset of a trained reward model's scores: variance 1 over the parent's answers, 0 over demonstrations."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
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
from pipeline.models.reward_model import ScoreReader, load_scalar_model, scale_head, score_ids, set_offset
from pipeline.models.sharding import Sharding, gathered, save_whole
from pipeline.models.tokenizers import forbidden_token_ids, stop_token_ids
from pipeline.rollout.engine import LocalEngine, SamplingSettings, per_row_uniforms
from pipeline.training.processes import Processes
from pipeline.training.run import Run

import numpy as np
import torch
from torch import Tensor

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


@dataclass(frozen=True)
class TrainedScores:
    """A trained reward model that all processes score with, each its share of the passes.

    Called by every process with the same sequences: centred scores, (sequences,) fp32, in all of them.
    """

    reader: ScoreReader
    encoder: ChatEncoder
    processes: Processes
    sharding: Sharding | None
    device: torch.device

    @classmethod
    def load(cls, run: Run[RewardArguments], encoder: ChatEncoder) -> TrainedScores:
        """The model that the stage has just saved."""
        from accelerate import PartialState

        device = PartialState().device
        reader = ScoreReader(load_scalar_model(run.args.output_dir)).eval()
        sharding = None
        if run.sharding is None:
            reader.to(device)
        else:
            sharding = Sharding(run.sharding, run.processes.count, device, bf16=False)
            sharding.shard(reader)
        return cls(reader, encoder, run.processes, sharding, device)

    @property
    def model(self) -> Any:
        return self.reader.model

    def __call__(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        share = (self.processes.rank, self.processes.count)
        return self.processes.sum(score_ids(self.reader, sequences, self.encoder.tokenizer.pad_token_id, share=share))


def scale_to_unit_variance(scores: TrainedScores, prompts: Sequence[list[Message]], args: RewardArguments) -> float:
    """Scale the head so that scores of the parent's own answers have variance 1 (Ziegler et al. 2019); returns the factor.

    The scaled head is saved to `args.output_dir`, in the adapter too.
    """
    ids = [scores.encoder.prompt_ids(prompt) for prompt in prompts]
    std = scores(sample_answers(scores, ids, args)).std().item()
    if not std > 0:
        raise UserError("unit_variance_samples: all answers of the parent score alike; leave the key out")
    scale_head(scores.model, 1 / std)
    save_whole(scores.model, Path(args.output_dir))
    if args.lora is not None and scores.processes.is_main:
        scale_adapter_head(Path(args.output_dir) / "adapter", 1 / std)
    logger.info("reward: scores divided by %.3f, their deviation over %d answers of the parent", std, len(ids))
    return 1 / std


def sample_answers(scores: TrainedScores, prompt_ids: list[list[int]], args: RewardArguments) -> list[list[int]]:
    """Token ids of prompts with answers that the parent samples, as the reward model reads them."""
    encoder, processes = scores.encoder, scores.processes
    room = args.max_tokens - max(map(len, prompt_ids))
    if room < 1:
        raise UserError("unit_variance_samples: the prompts leave no room under max_tokens for an answer")
    policy = load_causal_lm(args.parent).eval()
    tokenizer = encoder.tokenizer
    fit_embeddings(policy, len(tokenizer))
    if scores.sharding is None:
        policy.to(scores.device)  # type: ignore[arg-type]
    else:
        scores.sharding.shard(policy)
    stop_ids = stop_token_ids(encoder, policy.generation_config)
    settings = SamplingSettings(
        max_new_tokens=room,
        stop_ids=stop_ids,
        forbidden_ids=forbidden_token_ids(tokenizer, policy.config.get_text_config().vocab_size, stop_ids),
        pad_id=tokenizer.pad_token_id,
    )
    uniforms = per_row_uniforms(args.seed, range(len(prompt_ids)), room)
    with gathered(policy):
        own = processes.share(range(len(prompt_ids)))
        answers = LocalEngine(settings).sample(policy, [prompt_ids[i] for i in own], uniforms[own])
    answered = processes.gather(lambda: [(i, answer.ids) for i, answer in zip(own, answers, strict=True)])
    return [prompt_ids[i] + encoder.finished_ids(ids, stop_ids) for i, ids in sorted(answered)]


def mean_demonstration_score(scores: TrainedScores, demonstrations: Sequence[Source], max_tokens: int) -> float:
    """Mean raw score of demonstrations: what the offset must take off. Longer ones than `max_tokens` are left out."""
    encoder = scores.encoder
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
    set_offset(scores.model, 0.0)
    return float(scores(rows).double().mean())

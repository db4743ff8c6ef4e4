"""Sampling, scoring and measuring responses, each process its share of the prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.algorithms.ppo import RunningMoments, missing_eos_scores
from pipeline.data.batching import microbatches
from pipeline.data.encoding import ChatEncoder
from pipeline.models.networks import Networks, response_batch
from pipeline.models.precision import DevicePlan
from pipeline.rollout.engine import Engine, SampledResponse, per_row_uniforms
from pipeline.rollout.prompts import Prompt
from pipeline.rollout.rewards import Answers, Scorer
from pipeline.rollout.rollout import Sample
from pipeline.training.processes import Processes

import torch
from torch import Tensor

MEASURED_TOKENS = 4  # times micro_batch_tokens fit into a forward pass without gradients


@dataclass(frozen=True)
class Collector:
    """Answers prompts, scores the answers, and computes their log-probabilities and values.

    args: the recipe's lengths, positions and rules for scores. stop_ids: tokens that end a response.
    """

    args: Any
    processes: Processes
    encoder: ChatEncoder
    networks: Networks
    engine: Engine
    scorer: Scorer
    stop_ids: Sequence[int]
    plan: DevicePlan
    device: torch.device

    def collect(
        self, prompts: Sequence[Prompt], seed: int, network: str = "policy", *, values: bool = True
    ) -> list[Sample]:
        """A sample per prompt, in their order, the same in every process.

        Args:
            seed: with a prompt's position it determines the sample, whatever the number of processes.
            network: "policy" or "reference".
            values: compute values too.
        """
        own_rows = self.processes.share(range(len(prompts)))
        responses = self._responses(prompts, own_rows, seed, network)
        samples = self.processes.gather(lambda: self._samples(prompts, own_rows, responses, values))
        return sorted(samples, key=lambda sample: sample.prompt)

    def _responses(
        self, prompts: Sequence[Prompt], rows: Sequence[int], seed: int, network: str
    ) -> list[SampledResponse]:
        if not rows:
            return []
        uniforms = per_row_uniforms(seed, rows, self.args.max_response_tokens)
        with self.plan.sampling(), self.networks.sampler(network) as model:
            return self.engine.sample(model, [prompts[i].ids for i in rows], uniforms)

    @torch.no_grad()
    def _samples(
        self, prompts: Sequence[Prompt], rows: Sequence[int], responses: Sequence[SampledResponse], values: bool
    ) -> list[Sample]:
        if not rows:
            return []
        own_prompts = [prompts[i] for i in rows]
        ids = [response.ids for response in responses]
        answers = Answers(
            [p.messages for p in own_prompts],
            [p.ids for p in own_prompts],
            ids,
            self.encoder.texts(ids),
            [p.row for p in own_prompts],
        )
        scored = self.scorer(answers)
        samples: list[Sample] = []
        lengths = [len(prompt.ids) + len(response) for prompt, response in zip(own_prompts, ids, strict=True)]
        for group in microbatches(lengths, list(range(len(rows))), MEASURED_TOKENS * self.args.micro_batch_tokens):
            batch = self.batch([own_prompts[k].ids for k in group], [ids[k] for k in group])
            measured = self.networks.compute_logprobs_and_values(batch, with_values=values)
            counts = [len(ids[k]) for k in group]
            logprobs, ref_logprobs = (_split(x, counts) for x in (measured.logprobs, measured.ref_logprobs))
            extra = int(self.args.score_position == "after")
            parts = None if measured.values is None else _split(measured.values, [n + extra for n in counts])
            samples += [
                Sample(
                    prompt=rows[k],
                    prompt_ids=own_prompts[k].ids,
                    ids=ids[k],
                    finished=ids[k][-1] in self.stop_ids,
                    score=scored.scores[k].item(),
                    score_parts={name: part[k].item() for name, part in scored.parts.items()},
                    logprobs=logprobs[position],
                    ref_logprobs=ref_logprobs[position],
                    values=None if parts is None else parts[position],
                    sampled_logprobs=torch.tensor(responses[k].logprobs),
                )
                for position, k in enumerate(group)
            ]
        return samples

    def batch(self, prompt_ids: Sequence[Sequence[int]], response_ids: Sequence[Sequence[int]]) -> Any:
        """Prompts and responses as the networks' input, on the device."""
        return response_batch(
            prompt_ids,
            response_ids,
            pad_id=self.encoder.tokenizer.pad_token_id,
            packed=self.networks.packed,
            score_after_response=self.args.score_position == "after",
            device=self.device,
        )


def _split(values: Tensor, counts: Sequence[int]) -> list[Tensor]:
    return list(values.cpu().split(list(counts)))


def ruled_scores(samples: Sequence[Sample], args: Any) -> Tensor:
    """(samples,) scores after the rule for responses without a stop token, in the reward's own units."""
    scores = torch.tensor([sample.score for sample in samples])
    finished = torch.tensor([sample.finished for sample in samples])
    return missing_eos_scores(scores, finished, args.missing_eos, args.missing_eos_score)


def scaled_scores(scores: Tensor, args: Any, moments: RunningMoments) -> Tensor:
    """(samples,) scores as they enter the rewards: divided by their running deviation and clipped where the recipe says so."""
    if args.scale_scores == "running":
        scores = scores / moments.std
    return scores if args.score_clip is None else scores.clamp(-args.score_clip, args.score_clip)


def score_metrics(samples: Sequence[Sample], args: Any) -> dict[str, float]:
    """Means of the scores after the missing-EOS rule, before it, and of each part; differences of sampling's log-probabilities from training's."""
    drift = [(s.logprobs - s.sampled_logprobs).abs() for s in samples]
    metrics = {
        "score": ruled_scores(samples, args).mean().item(),
        "score_before_eos_rule": sum(sample.score for sample in samples) / len(samples),
        "sampling_drift": torch.cat(drift).mean().item(),
        "sampling_drift_worst_response": max(d.mean().item() for d in drift),
    }
    for name in samples[0].score_parts:
        metrics[f"score_{name}"] = sum(sample.score_parts[name] for sample in samples) / len(samples)
    return metrics

"""Sampling, scoring and measuring responses, each process its share of the prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from pipeline.algorithms.ppo import RunningMoments, missing_eos_scores
from pipeline.data.batching import microbatches
from pipeline.data.encoding import ChatEncoder
from pipeline.models.networks import Measurements, Networks, ResponseBatch, response_batch
from pipeline.models.precision import DevicePlan
from pipeline.rollout.engine import LocalEngine, SampledResponse, per_row_uniforms
from pipeline.rollout.prompts import Prompt
from pipeline.rollout.rewards import Answers, Scorer
from pipeline.rollout.rollout import Sample
from pipeline.rollout.vllm_engine import VLLMEngine
from pipeline.training.processes import Processes

import torch
from torch import Tensor

MEASURED_TOKENS = 4  # times micro_batch_tokens fit into a forward pass without gradients


@dataclass(frozen=True)
class Collector:
    """Answers prompts, scores the answers, and computes their log-probabilities and values.

    args: the recipe's lengths, positions and rules for scores. stop_ids: tokens that end a response.
    offloaded: "reference" and "reward", where these networks are on the device inside `with` only.
    server: samples in place of `engine`; a reference of another size than the policy does not go there.
    """

    args: Any
    processes: Processes
    encoder: ChatEncoder
    networks: Networks
    engine: LocalEngine
    scorer: Scorer
    stop_ids: Sequence[int]
    plan: DevicePlan
    device: torch.device
    offloaded: Mapping[str, AbstractContextManager[None]] = field(default_factory=dict)
    server: VLLMEngine | None = None

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
        prompt_ids = [prompts[i].ids for i in rows]
        uniforms = per_row_uniforms(seed, rows, self.args.max_response_tokens)
        if self.server is not None and (network == "policy" or self.server.takes_reference):
            return self.server.sample(prompt_ids, uniforms, network)
        # All processes enter, since gathering a sharded network is an exchange.
        with self._on_device(network), self.plan.sampling(), self.networks.sampler(network) as model:
            return self.engine.sample(model, prompt_ids, uniforms)

    def _on_device(self, network: str) -> AbstractContextManager[None]:
        return self.offloaded.get(network, nullcontext())

    @torch.no_grad()
    def _samples(
        self, prompts: Sequence[Prompt], rows: Sequence[int], responses: Sequence[SampledResponse], values: bool
    ) -> list[Sample]:
        own_prompts = [prompts[i] for i in rows]
        ids = [response.ids for response in responses]
        answers = Answers(
            [p.messages for p in own_prompts],
            [p.ids for p in own_prompts],
            ids,
            self.encoder.texts(ids),
            [p.row for p in own_prompts],
        )
        with self._on_device("reward"):
            scored = self.scorer(answers)
        with self._on_device("reference"):
            measured = self._measure([p.ids for p in own_prompts], ids, values)
        return [
            Sample(
                prompt=row,
                prompt_ids=own_prompts[k].ids,
                ids=ids[k],
                finished=ids[k][-1] in self.stop_ids,
                score=scored.scores[k].item(),
                score_parts={name: part[k].item() for name, part in scored.parts.items()},
                logprobs=measured[k].logprobs,
                ref_logprobs=measured[k].ref_logprobs,
                values=measured[k].values,
                sampled_logprobs=torch.tensor(responses[k].logprobs),
            )
            for k, row in enumerate(rows)
        ]

    def _measure(
        self, prompt_ids: Sequence[Sequence[int]], response_ids: Sequence[Sequence[int]], values: bool
    ) -> dict[int, Measurements]:
        """Of each response by its position, on the CPU."""
        measured: dict[int, Measurements] = {}
        lengths = [len(prompt) + len(response) for prompt, response in zip(prompt_ids, response_ids, strict=True)]
        groups = microbatches(lengths, list(range(len(lengths))), MEASURED_TOKENS * self.args.micro_batch_tokens)
        for group in self.processes.equally_many(groups) if self.networks.sharded else groups:
            if group is None:  # another process has one more
                self.networks.compute_logprobs_and_values(self.filler(), with_values=values)
                continue
            batch = self.batch([prompt_ids[k] for k in group], [response_ids[k] for k in group])
            of_group = self.networks.compute_logprobs_and_values(batch, with_values=values)
            counts = [len(response_ids[k]) for k in group]
            logprobs, ref_logprobs = (_split(x, counts) for x in (of_group.logprobs, of_group.ref_logprobs))
            extra = int(self.args.score_position == "after")
            parts = None if of_group.values is None else _split(of_group.values, [n + extra for n in counts])
            for i, k in enumerate(group):
                measured[k] = Measurements(logprobs[i], ref_logprobs[i], None if parts is None else parts[i])
        return measured

    def filler(self) -> ResponseBatch:
        """A batch that counts for nothing, for a pass in which other processes need this one."""
        pad_id = self.encoder.tokenizer.pad_token_id
        return self.batch([[pad_id]], [[pad_id]])

    def batch(self, prompt_ids: Sequence[Sequence[int]], response_ids: Sequence[Sequence[int]]) -> ResponseBatch:
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

"""Held-out prompts answered by policy and reference: scores, KL, judges, samples; which rollout is best, and when to end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.config.functions import import_function
from pipeline.rollout.collect import Collector, ruled_scores
from pipeline.rollout.prompts import Prompt
from pipeline.rollout.rewards import call_function
from pipeline.rollout.rollout import Sample
from pipeline.training.ppo_state import PPOState
from pipeline.training.random_states import seeded

import torch

SEED = 2**31  # samples of evaluations are drawn apart from those of training
SAMPLES = 32  # answers that are written to file


@dataclass(frozen=True)
class Evaluation:
    """metrics: by their names in the history, `eval_…`; samples: prompts with both answers, as plain data."""

    metrics: dict[str, float]
    samples: list[dict[str, Any]]


@dataclass
class HeldOutEvaluation:
    """Evaluates the policy on held-out prompts with the same random numbers each time, and training's are left as they were.

    A reward function or judge that draws random numbers sees the same ones too, whenever it is asked: a resumed run asks
    about the reference again and must get the same scores.

    judges: names of Python judges (module:function) by their labels; rank 0 alone calls them, so that a judge that draws
        random numbers cannot make the processes differ.
    """

    collector: Collector
    judges: dict[str, str]
    _reference: dict[int, list[Sample]] = field(default_factory=dict)  # by number of prompts; it never changes

    def evaluate(self, prompts: Sequence[Prompt]) -> Evaluation:
        args = self.collector.args
        policy = self._collect(prompts, "policy")
        if len(prompts) not in self._reference:
            self._reference[len(prompts)] = self._collect(prompts, "reference")
        reference = self._reference[len(prompts)]
        texts = {
            s: self.collector.encoder.texts([x.ids for x in part])
            for s, part in (("policy", policy), ("reference", reference))
        }
        scores, reference_scores = ruled_scores(policy, args), ruled_scores(reference, args)
        metrics = _metrics(policy, reference, args)
        with seeded(SEED + args.seed):
            metrics |= self.collector.processes.from_main(lambda: self._verdicts(prompts, texts["policy"]))
        samples = [
            {
                "prompt": prompts[i].messages[-1]["content"],
                "messages": prompts[i].messages,
                "response": texts["policy"][i],
                "reference_response": texts["reference"][i],
                "score": scores[i].item(),
                "score_before_eos_rule": policy[i].score,
                "finished": policy[i].finished,
                "reference_score": reference_scores[i].item(),
            }
            for i in range(min(SAMPLES, len(prompts)))
        ]
        return Evaluation(metrics, samples)

    def _collect(self, prompts: Sequence[Prompt], network: str) -> list[Sample]:
        seed = SEED + self.collector.args.seed
        with seeded(seed):
            return self.collector.collect(prompts, seed, network, values=False)

    def _verdicts(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> dict[str, float]:
        """Mean and standard error of each judge's scores."""
        messages, rows = [prompt.messages for prompt in prompts], [prompt.row for prompt in prompts]
        verdicts: dict[str, float] = {}
        for label, name in self.judges.items():
            scores = call_function(import_function(name), name, messages, texts, rows)
            values = torch.tensor(scores, dtype=torch.float64)
            verdicts |= {f"eval_{label}": values.mean().item(), f"eval_{label}_se": standard_error(values)}
        return verdicts


def standard_error(values: torch.Tensor) -> float:
    """Standard error of the mean of `values` (n,); 0 for one value."""
    return (values.double().std() / math.sqrt(len(values))).item() if len(values) > 1 else 0.0


def _metrics(policy: Sequence[Sample], reference: Sequence[Sample], args: Any) -> dict[str, float]:
    n = len(policy)
    scores = ruled_scores(policy, args)
    metrics = {
        "eval_score": scores.mean().item(),
        "eval_score_se": standard_error(scores),
        "eval_score_before_eos_rule": sum(sample.score for sample in policy) / n,
        "eval_reference_score": ruled_scores(reference, args).mean().item(),
        "eval_kl": sum(sample.kl for sample in policy) / n,
        "eval_response_tokens": sum(len(sample.ids) for sample in policy) / n,
        "eval_reference_response_tokens": sum(len(sample.ids) for sample in reference) / n,
        "eval_stopped": sum(sample.finished for sample in policy) / n,
        "eval_prompts": n,
    }
    for part in policy[0].score_parts:
        metrics[f"eval_score_{part}"] = sum(sample.score_parts[part] for sample in policy) / n
    return metrics


def record_if_best(metrics: dict[str, float], args: Any, state: PPOState) -> bool:
    """Record in `state` whether this evaluation is the best so far by the recipe's `best_metric`, and return it. NaN never is."""
    if args.best_metric is None:
        return False
    value = metrics[f"eval_{args.best_metric}"]
    if math.isfinite(value) and (state.best is None or value > state.best):
        state.best, state.best_rollout, state.evaluations_since_best = value, state.rollout, 0
        return True
    state.evaluations_since_best += 1
    return False


def reason_to_end(metrics: dict[str, float], args: Any, state: PPOState) -> str | None:
    if args.stop_kl is not None and metrics["eval_kl"] > args.stop_kl:
        return f"a KL of {metrics['eval_kl']:.2f} nats exceeds stop_kl ({args.stop_kl:g})"
    if args.patience is not None and state.evaluations_since_best >= args.patience:
        return f"{args.patience} evaluations without a better {args.best_metric}"
    return None

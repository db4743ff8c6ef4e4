"""Best-of-n: the highest-scored of n samples per prompt. PPO's reference point, and rejection sampling for another SFT.

Its KL from the model that samples is at most log n - (n - 1) / n nats per response (Stiennon et al. 2020; Gao et al. 2023).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.data.encoding import ChatEncoder
from pipeline.data.records import Record
from pipeline.rollout.engine import per_row_uniforms
from pipeline.rollout.rewards import Answers, Scores
from pipeline.rollout.vllm_folders import Engine

import torch
from torch import Tensor


def kl_bound(n: int) -> float:
    """Upper bound of the KL of best-of-n from the sampling model, nats per response: log n - (n - 1) / n."""
    return math.log(n) - (n - 1) / n


@dataclass(frozen=True)
class BestOfN:
    """The best response to each prompt, its score, and all samples.

    draws: all responses by draw and prompt; draw_scores: (draws, prompts) their scores.
    """

    response_ids: list[list[int]]
    scores: list[float]
    draws: list[list[list[int]]]
    draw_scores: Tensor

    @property
    def mean_score(self) -> float:
        """Of all samples."""
        return self.draw_scores.mean().item()


def best_of_each(judge: Tensor, proxy: Tensor) -> list[float]:
    """Mean of a judge's scores of the best of 1, 2, … n by the proxy, over all ways to draw them from n.

    Args:
        judge, proxy: (draws, prompts) scores of the same responses.

    Returns:
        n means: of best of k, each prompt's expectation without replacement (the order statistic's weights).
    """
    n = proxy.shape[0]
    order = torch.argsort(
        proxy, dim=0, stable=True
    )  # ascending: the i-th is the best of k with weight C(i, k-1) / C(n, k)
    sorted_judge = judge.gather(0, order).double().mean(1)
    return [
        sum(math.comb(i, k - 1) / math.comb(n, k) * sorted_judge[i].item() for i in range(k - 1, n))
        for k in range(1, n + 1)
    ]


@torch.no_grad()
def best_of_n(
    engine: Engine,
    model: Any,
    encoder: ChatEncoder,
    scorer: Callable[[Answers], Scores],
    records: Sequence[Record],
    *,
    n: int,
    seed: int,
    finished_first: bool = False,
) -> BestOfN:
    """Sample n responses to each record's prompt and take the one that scores highest (the first of equals).

    Args:
        records: with `prompt` and `row`.
        seed: of the samples; draw i of it is that of seed + i for n = 1.
        finished_first: take an unfinished response only where no finished one was sampled.
    """
    prompts = [record["prompt"] for record in records]
    ids = [encoder.prompt_ids(prompt) for prompt in prompts]
    rows = [record["row"] for record in records]
    draws, scores, preference = [], [], []
    for draw in range(n):
        uniforms = per_row_uniforms(seed + draw, range(len(ids)), engine.settings.max_new_tokens)
        responses = [sample.ids for sample in engine.sample(model, ids, uniforms)]
        drawn = scorer(Answers(prompts, ids, responses, encoder.texts(responses), rows)).scores
        finished = torch.tensor([response[-1] in engine.settings.stop_ids for response in responses])
        draws.append(responses)
        scores.append(drawn)
        preference.append(torch.where(finished, drawn, drawn - 1e9) if finished_first else drawn)
    every = torch.stack(scores)
    best = torch.stack(preference).argmax(0).tolist()
    return BestOfN(
        response_ids=[draws[draw][i] for i, draw in enumerate(best)],
        scores=[every[draw, i].item() for i, draw in enumerate(best)],
        draws=draws,
        draw_scores=every,
    )

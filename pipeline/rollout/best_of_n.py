"""Best-of-n: the highest-scored of n samples a prompt. PPO's reference point, and rejection sampling for another SFT.

Its KL from the model that samples is at most log n - (n - 1) / n nats a response (Stiennon et al. 2020; Gao et al. 2023).
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.rewards import RewardSource
from pipeline.data.encoding import ChatEncoder, forbidden_ids
from pipeline.data.records import PARSERS, Record, read_jsonl
from pipeline.errors import UserError
from pipeline.models.loading import load_causal_lm, load_tokenizer, require_pad
from pipeline.rollout.rewards import Scorer, build_scorer
from pipeline.rollout.rollout import LocalEngine, row_uniforms

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


def kl_bound(n: int) -> float:
    """Nats a response by which best-of-n may differ from the sampling model."""
    return math.log(n) - (n - 1) / n


@dataclass
class Best:
    """The best response to each prompt, its score, and the mean score of all n samples.

    draws: all responses by draw and prompt; draw_scores: (draws, prompts) their scores.
    """

    response_ids: list[list[int]]
    scores: list[float]
    mean_score: float
    draws: list[list[list[int]]]
    draw_scores: Tensor


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
    )  # ascending: the best of k is the i-th with weight C(i, k - 1) / C(n, k)
    sorted_judge = judge.gather(0, order).double().mean(1)
    return [
        sum(math.comb(i, k - 1) / math.comb(n, k) * sorted_judge[i].item() for i in range(k - 1, n))
        for k in range(1, n + 1)
    ]


@torch.no_grad()
def best_of_n(
    engine: LocalEngine,
    model: Any,
    encoder: ChatEncoder,
    scorer: Scorer,
    records: Sequence[Record],
    n: int,
    seed: int,
) -> Best:
    """Sample n responses to each record's prompt and keep the one that scores highest (the first of equals).

    Args:
        records: with `prompt` and `row`.
        seed: of the samples; draw i of it is that of seed + i for n = 1.
    """
    prompts = [record["prompt"] for record in records]
    ids = [encoder.prompt_ids(prompt) for prompt in prompts]
    best: list[list[int]] = [[] for _ in records]
    top = torch.full((len(best),), -math.inf)
    draws, found = [], []
    for draw in range(n):
        uniforms = row_uniforms(seed + draw, range(len(ids)), engine.max_new_tokens)
        responses = engine.responses(model, ids, uniforms)
        scores = scorer(prompts, ids, responses, [record["row"] for record in records]).scores
        draws.append(responses)
        found.append(scores)
        for i in (scores > top).nonzero()[:, 0].tolist():
            best[i] = responses[i]
        top = torch.maximum(top, scores)
    every = torch.stack(found)
    return Best(best, top.tolist(), every.mean().item(), draws, every)


def write_demonstrations(
    policy: str,
    reward: Sequence[RewardSource],
    prompts_file: str,
    output: str,
    n: int,
    max_response_tokens: int,
    temperature: float,
    seed: int,
) -> int:
    """Rejection sampling: demonstrations for SFT, each prompt with its best finished response; returns how many.

    Raises:
        UserError: no such model, reward or file; `output` exists already; no response ended.
    """
    target = Path(output)
    if target.exists():
        raise UserError(f"--output {output!r} exists; nothing was overwritten, name another file")
    records = read_jsonl(Path(prompts_file), PARSERS["prompt"])
    tokenizer = load_tokenizer(policy)
    require_pad(tokenizer, policy)
    encoder = ChatEncoder(tokenizer)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = load_causal_lm(policy).eval()
    model.to(device)
    forbidden = forbidden_ids(tokenizer, model.get_output_embeddings().weight.shape[0])
    engine = LocalEngine(max_response_tokens, [encoder.eos_id], tokenizer.pad_token_id, forbidden, temperature)
    scorer = build_scorer(reward, encoder, device)
    found = best_of_n(engine, model, encoder, scorer, records, n, seed)
    finished = [i for i, response in enumerate(found.response_ids) if response[-1] == encoder.eos_id]
    texts = encoder.texts(found.response_ids)
    kept = [i for i in finished if texts[i].strip()]
    if not kept:
        raise UserError(f"none of the best responses ended within {max_response_tokens} tokens; raise it")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        for i in kept:
            row = {"prompt": records[i]["prompt"], "response": texts[i], "score": round(found.scores[i], 4)}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(temporary, target)
    left_out = len(records) - len(kept)
    print(
        f"best-of: {len(kept)} demonstrations in {output}, mean score {sum(found.scores) / len(records):.3f} "
        f"(of all samples {found.mean_score:.3f})"
        + (f"; {left_out} prompts left out, their best response is empty or did not end" if left_out else "")
    )
    return len(kept)

"""`rlhf best-of`: rejection sampling: the best of n responses per prompt, as demonstrations for another SFT."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.rewards import RewardSource
from pipeline.data.encoding import ChatEncoder
from pipeline.data.records import PARSERS, read_records
from pipeline.errors import UserError
from pipeline.models.loading import load_causal_lm
from pipeline.models.precision import accelerator_type
from pipeline.models.tokenizers import forbidden_token_ids, load_tokenizer, require_pad, stop_token_ids
from pipeline.rollout.best_of_n import best_of_n
from pipeline.rollout.engine import LocalEngine, SamplingSettings
from pipeline.rollout.rewards import ScoringSetup, build_scorer
from pipeline.rollout.vllm_folders import ServedFolders

import torch


@dataclass(frozen=True, kw_only=True)
class BestOfOptions:
    """The flags of `rlhf best-of`."""

    policy: str
    reward: Sequence[RewardSource]
    prompts: str
    output: str
    n: int = 16
    max_response_tokens: int = 64
    temperature: float = 1.0
    seed: int = 0
    engine_url: str | None = None


def write_demonstrations(options: BestOfOptions) -> int:
    """Write each prompt with its best finished response; returns how many.

    Raises:
        UserError: no such model, reward, file or server; `output` exists already; no response ended.
    """
    target = Path(options.output)
    if target.exists():
        raise UserError(f"--output {options.output!r} exists; nothing was overwritten, name another file")
    records = read_records(Path(options.prompts), PARSERS["prompt"])
    served = ServedFolders.connect(options.engine_url) if options.engine_url else None
    tokenizer = load_tokenizer(options.policy)
    require_pad(tokenizer, options.policy)
    encoder = ChatEncoder(tokenizer)
    device = torch.device(accelerator_type())
    model: Any = load_causal_lm(options.policy).eval()
    model.to(device)
    stop_ids = stop_token_ids(encoder, model.generation_config)
    settings = SamplingSettings(
        max_new_tokens=options.max_response_tokens,
        stop_ids=stop_ids,
        forbidden_ids=forbidden_token_ids(tokenizer, model.get_output_embeddings().weight.shape[0], stop_ids),
        pad_id=tokenizer.pad_token_id,
        temperature=options.temperature,
    )
    engine = served.engine(Path(options.policy), tokenizer, settings) if served else LocalEngine(settings)
    scorer = build_scorer(options.reward, ScoringSetup(encoder, device, stop_ids))
    best = best_of_n(engine, model, encoder, scorer, records, n=options.n, seed=options.seed, finished_first=True)
    texts = encoder.texts(best.response_ids)
    usable = [i for i, ids in enumerate(best.response_ids) if ids[-1] in stop_ids and texts[i].strip()]
    if not usable:
        raise UserError(f"none of the best responses ended within {options.max_response_tokens} tokens; raise it")
    rows = [{"prompt": records[i]["prompt"], "response": texts[i], "score": round(best.scores[i], 4)} for i in usable]
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + ".tmp")
    temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(temporary, target)
    left_out = len(records) - len(usable)
    print(
        f"best-of: {len(usable)} demonstrations in {options.output}, mean score {sum(best.scores) / len(records):.3f} "
        f"(of all samples {best.mean_score:.3f})"
        + (f"; {left_out} prompts left out, no response that ended or had a text" if left_out else "")
    )
    return len(usable)

"""The mean score of greedy answers to held-out prompts, by which SFT can pick its checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.data.encoding import ChatEncoder
from pipeline.data.records import Record
from pipeline.models.tokenizers import forbidden_token_ids, stop_token_ids
from pipeline.rollout.engine import LocalEngine, SamplingSettings
from pipeline.rollout.rewards import Answers, Scorer


def greedy_engine(model: Any, encoder: ChatEncoder, max_new_tokens: int) -> LocalEngine:
    """An engine with the model's own stop tokens, for greedy decoding."""
    stop_ids = stop_token_ids(encoder, model.generation_config)
    rows = model.get_output_embeddings().weight.shape[0]
    return LocalEngine(
        SamplingSettings(
            max_new_tokens=max_new_tokens,
            stop_ids=stop_ids,
            forbidden_ids=forbidden_token_ids(encoder.tokenizer, rows, stop_ids),
            pad_id=encoder.tokenizer.pad_token_id,
        )
    )


@dataclass(frozen=True)
class GreedyScore:
    """The metric of `best_metric: score`; records: demonstrations, whose prompts are answered."""

    encoder: ChatEncoder
    scorer: Scorer
    records: Sequence[Record]
    max_response_tokens: int

    def measure(self, model: Any) -> float:
        """Mean score of the model's likeliest answers; InstructGPT selects by it, since the loss overfits first."""
        prompts = [record["messages"][:-1] for record in self.records]
        ids = [self.encoder.prompt_ids(prompt) for prompt in prompts]
        engine = greedy_engine(model, self.encoder, self.max_response_tokens)
        responses = [sample.ids for sample in engine.sample(model, ids, None)]
        rows = [record["row"] for record in self.records]
        answers = Answers(prompts, ids, responses, self.encoder.texts(responses), rows)
        return float(self.scorer(answers).scores.mean())

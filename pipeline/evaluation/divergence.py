"""KL of one model from another on its own answers, as sampled."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.errors import UserError
from pipeline.evaluation.answers import ModelAnswers, Sampler
from pipeline.models.language_model import LanguageModel
from pipeline.models.networks import response_batch

import numpy as np
import torch

ROWS = 32  # answers in one forward pass


@dataclass(frozen=True)
class Divergence:
    """kl: nats per response, summed over its tokens, a mean over answers; standard_error: of that mean."""

    kl: float
    standard_error: float


def divergence(policy: Sampler, reference: Sampler, answers: ModelAnswers) -> Divergence:
    """Monte-Carlo estimate of KL(policy ‖ reference): mean log-ratio of the policy's own answers (k1, as PPO measures it).

    Args:
        answers: sampled from the policy.

    Raises:
        UserError: the two have other tokens.
    """
    if policy.encoder.tokenizer.get_vocab() != reference.encoder.tokenizer.get_vocab():
        raise UserError("the policy has other tokens than the reference; a KL of the two does not exist")
    ratios = _logprobs(policy, policy, answers) - _logprobs(reference, policy, answers)
    error = float(ratios.std(ddof=1) / math.sqrt(len(ratios))) if len(ratios) > 1 else 0.0
    return Divergence(float(ratios.mean()), error)


@torch.no_grad()
def _logprobs(sampler: Sampler, settings_of: Sampler, answers: ModelAnswers) -> np.ndarray:
    """(answers,) log-probability of each response, nats, with the policy's temperature and forbidden tokens."""
    settings = settings_of.settings
    model = LanguageModel(sampler.model, settings.temperature, list(settings.forbidden_ids))
    device = next(sampler.model.parameters()).device
    model.to(device)
    sums: list[float] = []
    prompts, responses = answers.answers.prompt_ids, answers.answers.response_ids
    for start in range(0, len(responses), ROWS):
        part = responses[start : start + ROWS]
        batch = response_batch(
            prompts[start : start + ROWS],
            part,
            pad_id=settings.pad_id,
            packed=False,
            score_after_response=False,
            device=device,
        )
        logprobs, _ = model(batch.sequences, batch.token_positions, batch.tokens, with_entropy=False)
        sums += [values.sum().item() for values in logprobs.double().split([len(ids) for ids in part])]
    return np.array(sums)

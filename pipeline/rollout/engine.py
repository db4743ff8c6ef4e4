"""Sampling responses to prompts, with a key-value cache where the model has one that can be relied on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.algorithms.logprobs import sample_tokens, tempered_logits
from pipeline.algorithms.seeds import row_seed
from pipeline.data.collators import right_pad
from pipeline.models.shrink import small_copy
from pipeline.models.sizes import round_up, sampling_row_multiple

import torch
from torch import Tensor

logger = logging.getLogger("pipeline")


@dataclass(frozen=True)
class SamplingSettings:
    """The settings of sampling.

    stop_ids: a response ends with the first of these. forbidden_ids: never sampled.
    rows: prompts that are answered together.
    """

    max_new_tokens: int
    stop_ids: Sequence[int]
    forbidden_ids: Sequence[int]
    pad_id: int
    temperature: float = 1.0
    rows: int = 64


@dataclass(frozen=True)
class SampledResponse:
    """ids: through the stop token where one was sampled; logprobs: of each id when it was sampled, nats."""

    ids: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class LocalEngine:
    """Samples with transformers in this process."""

    settings: SamplingSettings

    @torch.no_grad()
    def sample(self, model: Any, prompt_ids: Sequence[Sequence[int]], uniforms: Tensor | None) -> list[SampledResponse]:
        """A response to each prompt; `uniforms` (prompts, tokens) in [0, 1) decide the samples, None takes the likeliest."""
        responses: list[SampledResponse | None] = [None] * len(prompt_ids)
        order = sorted(range(len(prompt_ids)), key=lambda i: len(prompt_ids[i]))  # like lengths together: less padding
        for start in range(0, len(order), self.settings.rows):
            rows = order[start : start + self.settings.rows]
            numbers = None if uniforms is None else uniforms[rows]
            answered = generate(model, [prompt_ids[i] for i in rows], numbers, self.settings)
            for i, response in zip(rows, answered, strict=True):
                responses[i] = response
        return [response for response in responses if response is not None]


def per_row_uniforms(seed: int, rows: Sequence[int], length: int) -> Tensor:
    """(rows, length) uniform numbers in [0, 1), each row's a function of `seed` and its own number alone.

    So what a row samples depends neither on its batch nor on the number of processes, and needs no random state.
    """
    numbers = torch.empty(len(rows), length, dtype=torch.float64)
    for position, row in enumerate(rows):
        generator = torch.Generator().manual_seed(row_seed(seed, row))
        numbers[position] = torch.rand(length, generator=generator, dtype=torch.float64)
    return numbers


@torch.no_grad()
def generate(
    model: Any, prompt_ids: Sequence[Sequence[int]], uniforms: Tensor | None, settings: SamplingSettings
) -> list[SampledResponse]:
    """Sample (or, without `uniforms`, decode greedily) a response to each prompt, through its first stop token.

    Args:
        uniforms: (rows, max_new_tokens) in [0, 1), one number per token.
    """
    device = next(model.parameters()).device
    forbidden = torch.tensor(list(settings.forbidden_ids), dtype=torch.long, device=device)
    stops = torch.tensor(list(settings.stop_ids), device=device)
    active = torch.arange(len(prompt_ids), device=device)
    numbers = None if uniforms is None else uniforms.to(device)
    ids: list[list[int]] = [[] for _ in prompt_ids]
    logprobs: list[list[float]] = [[] for _ in prompt_ids]
    decoder = decoder_of(model)(model, prompt_ids, settings.pad_id)
    for step in range(settings.max_new_tokens):
        logits = tempered_logits(decoder.logits(), settings.temperature, forbidden)
        tokens = logits.argmax(-1) if numbers is None else sample_tokens(logits, numbers[active, step])
        chosen = logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
        for row, token, logprob in zip(active.tolist(), tokens.tolist(), chosen.tolist(), strict=True):
            ids[row].append(token)
            logprobs[row].append(logprob)
        going = ~torch.isin(tokens, stops)
        if not going.any():
            break
        remaining = going.nonzero()[:, 0]
        active = active[remaining]
        decoder.append(tokens, remaining)
    return [SampledResponse(*pair) for pair in zip(ids, logprobs, strict=True)]


# ------------------------------------------------------------------------------------------------ decoders


class CachedDecoder:
    """Decodes one token at a time with the model's cache.

    Prompts are padded on the left, positions count from their first real token, and finished rows leave the batch if
    `drop_finished`, as soon as what remains fills fewer multiples of the rows that the device computes best.
    """

    drop_finished = True

    def __init__(self, model: Any, prompt_ids: Sequence[Sequence[int]], pad_id: int):
        self.model = model
        device = next(model.parameters()).device
        longest = max(len(ids) for ids in prompt_ids)
        self.input_ids = torch.tensor(
            [[pad_id] * (longest - len(ids)) + list(ids) for ids in prompt_ids], device=device
        )
        self.mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompt_ids], device=device)
        self.positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        self.rows = torch.arange(len(prompt_ids), device=device)  # of the batch, that still go on
        self.multiple = sampling_row_multiple(device.type)
        self.cache: Any = None

    def logits(self) -> Tensor:
        """(going rows, vocabulary) of the next token."""
        out = self.model(
            input_ids=self.input_ids,
            attention_mask=self.mask,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.cache = out.past_key_values
        if self.cache is None:
            raise ValueError("the model returned no cache")
        return out.logits[self.rows, -1]  # type: ignore[no-any-return]

    def append(self, tokens: Tensor, remaining: Tensor) -> None:
        """Append a token to each going row; `remaining` indexes those that go on."""
        batch = self.input_ids.new_zeros(len(self.mask))
        batch[self.rows] = tokens
        self.rows = self.rows[remaining]
        kept = round_up(len(self.rows), self.multiple)
        if self.drop_finished and kept < len(batch):
            finished = torch.ones_like(batch, dtype=torch.bool)
            finished[self.rows] = False
            chosen = torch.cat([self.rows, finished.nonzero()[: kept - len(self.rows), 0]])
            self.mask, self.positions, batch = self.mask[chosen], self.positions[chosen], batch[chosen]
            self.cache.batch_select_indices(chosen)
            self.rows = torch.arange(len(self.rows), device=batch.device)
        self.input_ids = batch[:, None]
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        self.positions = self.positions[:, -1:] + 1


class WholeBatchDecoder(CachedDecoder):
    """As `CachedDecoder`, for caches from which rows cannot be taken (recurrent states): finished rows are computed on."""

    drop_finished = False


class UncachedDecoder:
    """Recomputes every token of every row at each step: slow, and right for any causal model."""

    def __init__(self, model: Any, prompt_ids: Sequence[Sequence[int]], pad_id: int):
        self.model, self.pad_id = model, pad_id
        self.sequences = [list(ids) for ids in prompt_ids]

    def logits(self) -> Tensor:
        device = next(self.model.parameters()).device
        input_ids = right_pad(self.sequences, self.pad_id).to(device)
        last = torch.tensor([len(ids) - 1 for ids in self.sequences], device=device)
        logits = self.model(input_ids=input_ids, use_cache=False).logits
        return logits[torch.arange(len(last), device=device), last]  # type: ignore[no-any-return]

    def append(self, tokens: Tensor, remaining: Tensor) -> None:
        for ids, token in zip(self.sequences, tokens.tolist(), strict=True):
            ids.append(token)
        self.sequences = [self.sequences[i] for i in remaining.tolist()]


Decoder = CachedDecoder | UncachedDecoder
DECODERS: tuple[type[Decoder], ...] = (CachedDecoder, WholeBatchDecoder, UncachedDecoder)
PROMPT_LENGTHS, TOLERANCE = (2, 9, 5, 4), 1e-3
_decoders: dict[tuple[type, str], type[Decoder]] = {}


def decoder_of(model: Any) -> type[Decoder]:
    """The fastest way to decode that gives a batch the logits that each of its rows has alone.

    It is tried once per architecture and configuration, on a small copy of the model, whose attention windows are
    shorter than the sequences tried, or on the model itself where it cannot be made small.
    """
    key = (type(model), model.config.to_json_string())
    if key not in _decoders:
        candidate = small_copy(model.config) or model
        _decoders[key] = next(
            way for way in DECODERS if way is UncachedDecoder or _decodes_rows_as_alone(candidate, way)
        )
        if _decoders[key] is not CachedDecoder:
            how = "finished rows are computed on" if _decoders[key] is WholeBatchDecoder else "without a cache, slowly"
            logger.warning("%s samples %s: its cache does not keep rows apart otherwise", type(model).__name__, how)
    return _decoders[key]


@torch.no_grad()
def _decodes_rows_as_alone(model: Any, way: type[Decoder]) -> bool:
    vocabulary = int(model.config.get_text_config().vocab_size)
    prompts = {row: [(5 * i + n) % vocabulary for i in range(n)] for row, n in enumerate(PROMPT_LENGTHS)}
    training = model.training
    model.eval()
    exact = torch.autocast(next(model.parameters()).device.type, enabled=False)  # bf16 alone would exceed the tolerance
    try:
        with exact:
            together = _forced_logits(model, way, prompts)
            alone = [_forced_logits(model, UncachedDecoder, {row: ids})[row] for row, ids in prompts.items()]
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError):
        return False
    finally:
        model.train(training)
    pairs = [pair for row, logits in enumerate(alone) for pair in zip(together[row], logits, strict=True)]
    return all(bool((a - b).norm() <= TOLERANCE * b.norm()) for a, b in pairs)


def _forced_logits(model: Any, way: type[Decoder], prompts: dict[int, list[int]]) -> dict[int, list[Tensor]]:
    """Logits by row and step where tokens are given instead of sampled; row i ends after i + 2 steps."""
    device = next(model.parameters()).device
    decoder, active = way(model, list(prompts.values()), 0), list(prompts)
    logits: dict[int, list[Tensor]] = {row: [] for row in prompts}
    for step in range(len(PROMPT_LENGTHS) + 1):
        for row, values in zip(active, decoder.logits().float(), strict=True):
            logits[row].append(values)
        tokens = torch.tensor([(3 * step + 7 * row) % logits[row][0].numel() for row in active], device=device)
        remaining = [k for k, row in enumerate(active) if step < row + 1]
        if not remaining:
            break
        decoder.append(tokens, torch.tensor(remaining, device=device))
        active = [active[k] for k in remaining]
    return logits

"""Trials at a stage's start: forward passes that show whether this model does what the fast paths rely on.

They run on the model itself and on a small copy. The copy's attention windows are shorter than the sequences tried, which
the model's own may not be.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from pipeline.errors import UserError
from pipeline.models.loading import one_line
from pipeline.models.packed import PACKED, SequenceBatch, body, hidden_states, pack, pad
from pipeline.models.shrink import has_window, small_copy

import torch
from torch import Tensor
from transformers import PreTrainedConfig

LENGTHS = (3, 12, 7)
TOLERANCE = 1e-4  # relative, fp32
QUANTISED_TOLERANCE = 2e-2  # a quantised base computes in bf16
PAD_TOLERANCE = 1e-2  # relative, between copies whose weights are scaled with another row at zero


def enable_packed_attention(model: Any) -> bool:
    """Enable packed attention (`packed.pack`) if a test forward pass gives the same states as padded sequences.

    Returns:
        whether it does; if not (its attention is its own, or it carries a state along the sequence), the model is left
        as it was.
    """
    if not _can_switch_attention(model):
        return False
    small = small_copy(model.config)
    if small is None and has_window(model.config):
        return False
    if small is not None and not (_can_switch_attention(small) and _switch_if_equal(small)):
        return False
    return _switch_if_equal(model)


def _can_switch_attention(model: Any) -> bool:
    return bool(model._supports_sdpa and model._can_set_attn_implementation())


def _switch_if_equal(model: Any) -> bool:
    before = model.config._attn_implementation
    sequences = _sequences(model)
    padded = _states(model, sequences, pad(sequences, 0))
    model.set_attn_implementation(PACKED)
    try:
        equal = _close(_states(model, sequences, pack(sequences, 0)), padded, model)
    except (TypeError, ValueError, RuntimeError, IndexError):  # an architecture that does not take the layout
        equal = False
    if not equal:
        model.set_attn_implementation(before)
    return equal


ONE_PER_BLOCK = "documents that share a block would see each other in this model; one per block"


def isolates_packed_documents(model: Any) -> bool:
    """Whether documents that share a row, told apart by position ids that restart at 0, get the states that they get alone.

    Tried without an attention mask and without a cache, as packed rows are trained.
    """
    small = small_copy(model.config)
    if small is None and has_window(model.config):
        return False
    return all(_isolates(candidate) for candidate in (small, model) if candidate is not None)


def _isolates(model: Any) -> bool:
    sequences = _sequences(model)
    ids = torch.tensor([[token for row in sequences for token in row]])
    positions = torch.tensor([[position for row in sequences for position in range(len(row))]])
    device = next(model.parameters()).device
    with _evaluating(model), torch.no_grad():
        try:
            together = body(model)(
                input_ids=ids.to(device), position_ids=positions.to(device), use_cache=False
            ).last_hidden_state[0]
            alone = [body(model)(input_ids=torch.tensor([row], device=device), use_cache=False) for row in sequences]
        except (TypeError, ValueError, RuntimeError, IndexError):
            return False
    return _close(together, torch.cat([output.last_hidden_state[0] for output in alone]), model)


def require_causal(model: Any, name: str) -> None:
    """Require that logits do not depend on later tokens; a masked model loaded as a language model would see its answers.

    Tried on a small copy, or on the model itself where there is none.

    Raises:
        UserError: they do, or the forward pass fails.
    """
    candidate: Any = small_copy(model.config) or model
    device = next(candidate.parameters()).device
    one = torch.tensor([_sequences(candidate)[1]], device=device)
    two = one.clone()
    two[0, -1] = one[0, 0]
    with _evaluating(candidate), torch.no_grad():
        try:
            logits = [candidate(input_ids=ids, use_cache=False).logits[:, :-1] for ids in (one, two)]
        except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
            raise UserError(f"{name!r} fails on a row of tokens: {one_line(error)}; give another model") from error
    finite = bool(
        torch.isfinite(logits[0]).all() and torch.isfinite(logits[1]).all()
    )  # else training says that it diverged
    if finite and not _close(logits[0], logits[1], candidate):
        raise UserError(
            f"{name!r} predicts tokens from those that follow them (a masked or bidirectional model, `is_decoder: false`); "
            "give a causal language model"
        )


def require_token(model: Any, token: int) -> None:
    """Require that a model can read a token that was added to its tables.

    Raises:
        UserError: it has another table by token ids, such as DeepSeek V4's routers.
    """
    ids = torch.tensor([[token]], device=next(model.parameters()).device)
    with _evaluating(model), torch.no_grad():
        try:
            model(input_ids=ids)
        except IndexError as error:
            raise UserError(
                f"{type(model).__name__} cannot read an added token (id {token}): it has a table by token ids beside its "
                "embedding; take a parent whose tokenizer needs no new one (a pad apart from EOS, all tokens within the embedding)"
            ) from error


@torch.no_grad()
def positions_follow_pad(config: PreTrainedConfig) -> bool:
    """Whether an architecture counts positions from the id of its pad token, as RoBERTa does, which a new pad would move."""
    logits = []
    for pad_id in (1, 2):
        if (model := small_copy(config, pad_id=pad_id)) is None:
            return False
        logits.append(model(input_ids=torch.tensor([range(3, 12)])).logits)
    return bool((logits[0] - logits[1]).norm() > PAD_TOLERANCE * logits[0].norm())


def fused_head_gives_the_loss(model: Any) -> bool:
    """Whether `model(..., fused_lm_head=True)`, as TRL adds it to a model, gives the model's own loss.

    TRL reads scales and caps of logits from names in the configuration, and the head's weight alone: a model whose head
    is scaled under another name, or holds an adapter or more than one linear layer, would be trained on another loss.
    """
    if type(model.get_output_embeddings()) is not torch.nn.Linear:
        return False
    device = next(model.parameters()).device
    rows = torch.tensor([sequence[: LENGTHS[0]] for sequence in _sequences(model)], device=device)
    with _evaluating(model), torch.no_grad():
        own = model(input_ids=rows, labels=rows, use_cache=False).loss
        fused = model(input_ids=rows, labels=rows, fused_lm_head=True).loss
    return _close(fused, own, model)


def _sequences(model: Any) -> list[list[int]]:
    vocabulary = int(model.config.get_text_config().vocab_size)
    return [[(7 * i + 5) % vocabulary for i in range(n, 2 * n)] for n in LENGTHS]


def _states(model: Any, sequences: Sequence[Sequence[int]], batch: SequenceBatch) -> Tensor:
    device = next(model.parameters()).device
    with _evaluating(model), torch.no_grad():
        states = hidden_states(body(model), batch.to(device))
    starts = batch.starts.tolist()
    return torch.cat([states[start : start + len(row)] for start, row in zip(starts, sequences, strict=True)])


def _close(one: Tensor, other: Tensor, model: Any) -> bool:
    tolerance = QUANTISED_TOLERANCE if getattr(model, "quantization_method", None) is not None else TOLERANCE
    return bool((one.float() - other.float()).norm() <= tolerance * other.float().norm())


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode inside, the former mode afterwards: with dropout, two forward passes differ."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)

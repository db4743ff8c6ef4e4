"""The prompts of PPO: read, split, checked for length, and drawn for each rollout."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.data.batching import epoch_permutation_indices
from pipeline.data.encoding import ChatEncoder, Message
from pipeline.data.mixing import mixture_indices
from pipeline.data.records import Record, at_row
from pipeline.data.sources import Source
from pipeline.data.splits import shuffle_by_hash, split_records
from pipeline.errors import UserError, shorten

logger = logging.getLogger("pipeline.ppo")


@dataclass(frozen=True)
class Prompt:
    """A prompt, its token ids up to where the response begins, and the file's own row."""

    messages: list[Message]
    ids: list[int]
    row: dict[str, Any]


@dataclass(frozen=True)
class PromptSet:
    """Prompts to train on, with one epoch of their mixture as positions, and held-out ones."""

    train: list[Prompt]
    held_out: list[Prompt]
    epoch: list[int] = field(default_factory=list)

    def of_rollout(self, number: int, count: int, seed: int) -> list[Prompt]:
        """The prompts of rollout `number`: a function of its number alone, so that a resumed run draws the same."""
        drawn = epoch_permutation_indices(len(self.epoch), number * count, count, seed)
        return [self.train[self.epoch[i]] for i in drawn]


def prepare_prompts(
    sources: Sequence[Source], eval_sources: Sequence[Source], encoder: ChatEncoder, args: Any
) -> PromptSet:
    """Split and encode the recipe's prompts; too long ones are refused, or dropped and counted.

    Held-out prompts are those of `eval_datasets`, else `held_out_fraction` of `datasets`, ordered by hash so that the first few
    come from all sources alike.
    """
    train: list[list[Prompt]] = []
    held_out_records: list[tuple[Source, Record]] = [(s, r) for s in eval_sources for r in s.records]
    dropped = 0
    for source in sources:
        # A row whose own `split` holds it out is not trained on, wherever the held-out prompts come from.
        training, held_out = split_records(source.records, 0.0 if eval_sources else args.held_out_fraction)
        held_out_records += [(source, record) for record in held_out if not eval_sources]
        prompts = [_encode(record, source, encoder, args) for record in training]
        train.append([prompt for prompt in prompts if prompt is not None])
        dropped += len(prompts) - len(train[-1])
    location = {id(record): source for source, record in held_out_records}
    ordered = shuffle_by_hash([record for _, record in held_out_records])
    held = [_encode(record, location[id(record)], encoder, args) for record in ordered]
    held_out_prompts = [prompt for prompt in held if prompt is not None]
    dropped += len(held) - len(held_out_prompts)
    if dropped:
        logger.warning("ppo: %d prompts over max_prompt_tokens (%d) dropped", dropped, args.max_prompt_tokens)
    number = sum(map(len, train))
    if not number or not held_out_prompts:
        raise UserError(
            f"{number} prompts to train on and {len(held_out_prompts)} held out; both are needed: "
            "give `eval_datasets:` or change held_out_fraction"
        )
    epoch = mixture_indices([len(part) for part in train], [source.weight for source in sources], args.seed)
    return PromptSet([prompt for part in train for prompt in part], held_out_prompts, epoch)


def _encode(record: Record, source: Source, encoder: ChatEncoder, args: Any) -> Prompt | None:
    """The prompt, or None where it is too long and the recipe says to drop such."""
    with at_row(record):
        ids = encoder.prompt_ids(record["prompt"])
    if len(ids) <= args.max_prompt_tokens:
        return Prompt(record["prompt"], ids, record["row"])
    if args.long_prompts == "drop":
        return None
    raise UserError(
        f"prompt of {len(ids)} tokens exceeds max_prompt_tokens ({args.max_prompt_tokens}): "
        f"{shorten(record['prompt'][-1]['content'])}; raise it, or say `long_prompts: drop`",
        file=record.get("file"),
        line=record["line"],
    )

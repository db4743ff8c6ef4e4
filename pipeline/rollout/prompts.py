"""The prompts of PPO: read, split, checked for length, and drawn for each rollout."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.data.batching import epoch_permutation_indices
from pipeline.data.encoded import encode_prompts
from pipeline.data.encoding import ChatEncoder, Message
from pipeline.data.mixing import mixture_indices
from pipeline.data.packing import Chosen, Joined
from pipeline.data.sources import Source
from pipeline.data.stored_records import StoredRecords
from pipeline.data.tables import IntegerRows
from pipeline.errors import UserError, shorten

import numpy as np

logger = logging.getLogger("pipeline.ppo")


@dataclass(frozen=True)
class Prompt:
    """A prompt, its token ids up to where the response begins, and the file's own row."""

    messages: list[Message]
    ids: list[int]
    row: dict[str, Any]


class Prompts(Sequence[Prompt]):
    """Prompts of a source, read when they are asked for.

    Args:
        records, ids: all of the source.
        positions: of these prompts among them.
    """

    def __init__(self, records: StoredRecords, ids: IntegerRows, positions: np.ndarray):
        self.records, self.ids, self.positions = records, ids, positions

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Prompts(self.records, self.ids, self.positions[index])
        position = int(self.positions[index])
        record = self.records[position]
        return Prompt(record["prompt"], self.ids[position].tolist(), record["row"])


@dataclass(frozen=True)
class PromptSet:
    """Prompts to train on, with one epoch of their mixture as positions, and held-out ones."""

    train: Sequence[Prompt]
    held_out: Sequence[Prompt]
    epoch: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    def of_rollout(self, number: int, count: int, seed: int) -> list[Prompt]:
        """The prompts of rollout `number`: a function of its number alone, so that a resumed run draws the same."""
        drawn = epoch_permutation_indices(len(self.epoch), number * count, count, seed)
        return [self.train[int(self.epoch[i])] for i in drawn]


def prepare_prompts(
    sources: Sequence[Source], eval_sources: Sequence[Source], encoder: ChatEncoder, args: Any
) -> PromptSet:
    """Split and encode the recipe's prompts; too long ones are refused, or dropped and counted.

    Held-out prompts are those of `eval_datasets`, else `held_out_fraction` of `datasets`, ordered by hash so that the first few
    come from all sources alike.
    """
    train: list[Prompts] = []
    held_out: list[Prompts] = []
    for source in sources:
        # A row whose own `split` holds it out is not trained on, wherever the held-out prompts come from.
        side = source.records.held_out(0.0 if eval_sources else args.held_out_fraction)
        ids = encode_prompts(source.records, encoder)
        train.append(Prompts(source.records, ids, np.flatnonzero(~side)))
        if not eval_sources:
            held_out.append(Prompts(source.records, ids, np.flatnonzero(side)))
    for source in eval_sources:
        ids = encode_prompts(source.records, encoder)
        held_out.append(Prompts(source.records, ids, np.arange(len(source.records))))
    fitting = [_fitting(prompts, args) for prompts in train]
    held_out_fitting = [_fitting(prompts, args) for prompts in held_out]
    dropped = sum(map(len, train + held_out)) - sum(map(len, fitting + held_out_fitting))
    if dropped:
        logger.warning("ppo: %d prompts over max_prompt_tokens (%d) dropped", dropped, args.max_prompt_tokens)
    number, held_out_number = sum(map(len, fitting)), sum(map(len, held_out_fitting))
    if not number or not held_out_number:
        raise UserError(
            f"{number} prompts to train on and {held_out_number} held out; both are needed: "
            "give `eval_datasets:` or change held_out_fraction"
        )
    epoch = mixture_indices([len(part) for part in fitting], [source.weight for source in sources], args.seed)
    hashes = np.concatenate([part.records.numbers("hash", np.uint64)[part.positions] for part in held_out_fitting])
    by_hash = np.argsort(hashes, kind="stable")
    return PromptSet(Joined(fitting), Chosen(Joined(held_out_fitting), by_hash), epoch)


def _fitting(prompts: Prompts, args: Any) -> Prompts:
    """Those that are not too long.

    Raises:
        UserError: one is, and the recipe does not say to drop such.
    """
    lengths = prompts.ids.lengths[prompts.positions]
    long = np.flatnonzero(lengths > args.max_prompt_tokens)
    if len(long) and args.long_prompts != "drop":
        record = prompts.records[int(prompts.positions[long[0]])]
        raise UserError(
            f"prompt of {lengths[long[0]]} tokens exceeds max_prompt_tokens ({args.max_prompt_tokens}): "
            f"{shorten(record['prompt'][-1]['content'])}; raise it, or say `long_prompts: drop`",
            file=record.get("file"),
            line=record["line"],
        )
    return Prompts(prompts.records, prompts.ids, prompts.positions[lengths <= args.max_prompt_tokens])

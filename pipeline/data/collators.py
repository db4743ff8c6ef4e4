"""Rows of token ids into padded tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.data.encoding import IGNORE

import numpy as np
import torch
from torch import Tensor


def right_pad(rows: Sequence[Sequence[int]], value: int, width: int = 0) -> Tensor:
    """(rows, longest, or `width` where that is more) int64; shorter rows end in `value`."""
    padded = np.full((len(rows), max(width, *(len(row) for row in rows))), value, np.int64)
    for line, row in zip(padded, rows, strict=True):
        line[: len(row)] = row
    return torch.from_numpy(padded)


@dataclass
class BlockCollator:
    """Packed rows: input_ids, position_ids, labels, each (rows, longest), and no attention mask.

    Where each row holds one document, an attention mask takes the place of the positions.

    Padding stands last, counts its own positions from 0 (so it is a document of its own) and has no label.

    Args:
        position_ids: False where each row holds one document.
        width: tokens to pad to at least.
    """

    pad_id: int
    position_ids: bool = True
    width: int = 0

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        input_ids = right_pad([row["input_ids"] for row in rows], self.pad_id, self.width)
        labels = right_pad([row["labels"] for row in rows], IGNORE, self.width)
        longest = input_ids.shape[1]
        if not self.position_ids:  # TRL's SFTTrainer (1.16) refuses a batch with neither positions nor a mask
            mask = right_pad([[1] * len(row["input_ids"]) for row in rows], 0, self.width)
            return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
        positions = [[*row["position_ids"], *range(longest - len(row["position_ids"]))] for row in rows]
        return {"input_ids": input_ids, "position_ids": torch.tensor(positions), "labels": labels}


@dataclass
class RankingCollator:
    """Rankings: every response once, all surviving pairs of each prompt.

    Returns a dict of
        input_ids, attention_mask: (responses of all prompts, longest), right-padded; the score is read at the last token
        better, worse: (pairs,) row indices
        target: (pairs,) probability that `better` is preferred: 1, less where it is doubtful, 0.5 for a tie
        tie: (pairs,) bool
        margin: (pairs,) subtracted from the score difference
        pair_weight: (pairs,) the record's weight / pairs of the same prompt: prompts of weight 1 count alike
    """

    pad_id: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        ids: list[list[int]] = []
        better, worse, target, tie, margin, weight = [], [], [], [], [], []
        for row in rows:
            base = len(ids)
            ids += row["ids"]
            for pair in row["pairs"]:
                better.append(base + pair["better"])
                worse.append(base + pair["worse"])
                target.append(pair["target"])
                tie.append(pair["tie"])
                margin.append(row["margin"])
                weight.append(row["weight"] / len(row["pairs"]))
        input_ids = right_pad(ids, self.pad_id)
        lengths = torch.tensor([len(row) for row in ids])
        return {
            "input_ids": input_ids,
            "attention_mask": (torch.arange(input_ids.shape[1]) < lengths[:, None]).long(),
            "better": torch.tensor(better, dtype=torch.long),
            "worse": torch.tensor(worse, dtype=torch.long),
            "target": torch.tensor(target, dtype=torch.float32),
            "tie": torch.tensor(tie, dtype=torch.bool),
            "margin": torch.tensor(margin, dtype=torch.float32),
            "pair_weight": torch.tensor(weight, dtype=torch.float32),
            "prompts": torch.tensor(len(rows)),
        }

"""PPO-ptx: a language-modelling loss on pretraining text beside PPO's (InstructGPT, section 3.5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.data.batching import epoch_permutation_indices, microbatches
from pipeline.data.collators import BlockCollator
from pipeline.data.encoding import IGNORE
from pipeline.data.packing import Block
from pipeline.models.networks import Networks
from pipeline.models.precision import DevicePlan
from pipeline.training.processes import Processes

import numpy as np
import torch


@dataclass(frozen=True)
class PretrainingText:
    """Packed blocks of documents, and what their loss needs.

    blocks: rows of documents, lengths: their tokens; epoch: one pass over the mixture, as positions among the blocks.
    isolated: whether the model keeps documents of one block apart; where not, each block holds one document.
    """

    blocks: Sequence[Block]
    lengths: np.ndarray
    epoch: np.ndarray
    isolated: bool
    args: Any
    networks: Networks
    plan: DevicePlan
    processes: Processes
    collate: BlockCollator
    device: torch.device

    def accumulate_gradients(self, prompts: int, step: int) -> tuple[float, float]:
        """Add the gradients of ptx_coef × the mean negative log-likelihood of this step's tokens in all processes.

        Args:
            prompts: of the minibatch; `ptx_ratio` blocks are taken per prompt.
            step: number of the policy's optimizer step, which decides the blocks.

        Returns:
            the mean negative log-likelihood, nats per token; floating-point operations.
        """
        args = self.args
        number = max(1, round(args.ptx_ratio * prompts))
        drawn = epoch_permutation_indices(len(self.epoch), step * number, number, args.seed + 1)
        chosen: list[int] = self.epoch[drawn].tolist()
        tokens = sum(int((self.blocks[i]["labels"][1:] != IGNORE).sum()) for i in chosen)
        total = torch.zeros(1, dtype=torch.float64)
        groups = microbatches(self.lengths, self.processes.share(chosen), args.micro_batch_tokens)
        for rows in self.processes.equally_many(groups) if self.networks.sharded else groups:
            weight = 0.0 if rows is None else 1.0  # None: another process has one more micro-batch
            blocks = [self.blocks[i] for i in (chosen[:1] if rows is None else rows)]
            batch = {name: x.to(self.device) for name, x in self.collate(blocks).items()}
            positions = batch["position_ids"] if self.isolated else None
            with self.plan.autocast():
                nll = self.networks.policy.text_nll(batch["input_ids"], positions, batch["labels"])
            (weight * args.ptx_coef * nll / tokens).backward()
            total += weight * nll.detach().double().cpu()
        flops = 6.0 * tokens * self.networks.parameter_counts["policy"]
        return (self.processes.sum(total) / tokens).item(), flops

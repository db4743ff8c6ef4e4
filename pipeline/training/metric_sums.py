"""Metrics that are means over the tokens of a minibatch, summed up over its micro-batches and processes."""

from __future__ import annotations

from pipeline.training.processes import Processes

import torch
from torch import Tensor


class MetricSums:
    """Sums stay on the device until all micro-batches are done, so that they are copied once per minibatch."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._largest: dict[str, Tensor] = {}

    def add(self, count: int, **values: Tensor) -> None:
        """Add each metric's share: the sum of `values` (n,) over the `count` entries of the whole minibatch."""
        for name, value in values.items():
            share = value.detach().double().sum() / count
            self._sums[name] = self._sums[name] + share if name in self._sums else share

    def largest(self, name: str, values: Tensor) -> None:
        largest = values.detach().double().max()
        self._largest[name] = torch.maximum(self._largest[name], largest) if name in self._largest else largest

    def over(self, processes: Processes, device: torch.device) -> dict[str, float]:
        """The metrics over all processes. A process without any micro-batch takes part with zeros, under the same names."""
        names = processes.gather(lambda: [(list(self._sums), list(self._largest))])
        sums, largest = max(names, key=lambda pair: len(pair[0]))
        zero = torch.zeros((), dtype=torch.float64, device=device)
        totals = processes.sum(torch.stack([self._sums.get(name, zero) for name in sums]).cpu())
        metrics = dict(zip(sums, totals.tolist(), strict=True))
        if largest:
            most = processes.max(torch.stack([self._largest.get(name, zero) for name in largest]).cpu())
            metrics |= dict(zip(largest, most.tolist(), strict=True))
        return metrics

"""The processes of one launch: the only place that calls collectives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pipeline.errors import UserError

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

Item = TypeVar("Item")
BUCKET_ELEMENTS = 2**23  # of gradients in one exchange


@dataclass(frozen=True)
class Processes:
    """This process's place among those of the launch."""

    rank: int = 0
    count: int = 1

    @classmethod
    def of_this_launch(cls) -> Processes:
        from accelerate import PartialState

        state = PartialState()
        return cls(state.process_index, state.num_processes)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> list[Item]:
        """Every `count`-th item, from this process's own."""
        return list(items[self.rank :: self.count])

    def equally_many(self, items: Sequence[Item]) -> list[Item | None]:
        """This process's items, filled up with None until every process has as many: for passes that are exchanges."""
        most = int(self.max(torch.tensor([float(len(items))])).item())
        return [*items, *[None] * (most - len(items))]

    def barrier(self) -> None:
        from accelerate import PartialState

        PartialState().wait_for_everyone()

    def gather(self, compute: Callable[[], list[Any]]) -> list[Any]:
        """What every process computes, joined in the order of ranks, in all of them.

        Raises:
            UserError: in every process, if any of them raised it.
        """
        if self.count == 1:
            return compute()
        from accelerate.utils import gather_object

        try:
            computed = compute()
        except UserError as error:
            computed = [error]
        joined: list[Any] = gather_object(computed)
        for item in joined:
            if isinstance(item, UserError):
                raise item
        return joined

    def from_main(self, compute: Callable[[], Item]) -> Item:
        """What rank 0 computes, in every process; a UserError of rank 0 is raised in all of them."""
        (result,) = self.gather(lambda: [compute()] if self.is_main else [])
        return result  # type: ignore[no-any-return]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return flag if self.count == 1 else bool(self.sum(torch.tensor([float(flag)])).item() > 0)

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all processes, where the tensor was; the input is not modified."""
        if self.count == 1:
            return values
        return self._exchanged(values).sum(0)

    def max(self, values: Tensor) -> Tensor:
        """The element-wise maximum of a tensor over all processes."""
        if self.count == 1:
            return values
        return self._exchanged(values).amax(0)

    def _exchanged(self, values: Tensor) -> Tensor:
        from accelerate import PartialState
        from accelerate.utils import gather

        joined: Tensor = gather(values[None].to(PartialState().device))
        return joined.to(values.device)

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Add every parameter's gradient over all processes, in place; many gradients share an exchange.

        Those of sharded parameters were added in the backward pass.
        """
        if self.count == 1:
            return
        buckets: list[list[Tensor]] = [[]]
        for parameter in parameters:
            if isinstance(parameter, DTensor):
                continue
            if parameter.grad is None:  # no row of this minibatch fell to this process
                parameter.grad = torch.zeros_like(parameter)
            if sum(gradient.numel() for gradient in buckets[-1]) + parameter.numel() > BUCKET_ELEMENTS:
                buckets.append([])
            buckets[-1].append(parameter.grad)
        exchanges = []
        for bucket in filter(None, buckets):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            exchanges.append((bucket, flat, torch.distributed.all_reduce(flat, async_op=True)))
        for bucket, flat, exchange in exchanges:
            exchange.wait()
            for gradient, summed in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(summed.view_as(gradient))

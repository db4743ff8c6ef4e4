"""Tensors that lie in the CPU's memory between the phases that use them (PPO's `offload:`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

from pipeline.models.sharding import local

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class OffloadedTensors(AbstractContextManager[None]):
    """Tensors that are on their device inside `with`, and in the CPU's memory outside of it, from the beginning.

    A tensor stays the object that it is: its storage on the device is freed, and filled again. So tied parameters, FSDP2 and
    optimizers need not know of it. Of a sharded tensor, this process's part is moved.

    Args:
        tensors: lists the tensors each time they leave the device, since reading a checkpoint replaces an optimizer's states.
        constant: nothing changes the tensors, so they are copied to the CPU once.
    """

    def __init__(self, tensors: Callable[[], Iterable[Tensor]], *, constant: bool):
        self._tensors, self._constant = tensors, constant
        self._copies: list[tuple[Tensor, Tensor]] = []  # a storage's bytes on the device, and on the CPU
        self._away = False
        self.__exit__()

    def __enter__(self) -> None:
        if self._away:
            for there, copy in self._copies:
                there.untyped_storage().resize_(copy.numel())
                there.copy_(copy)
            self._away = False

    def __exit__(self, *exception: object) -> None:
        if not (self._copies and self._constant):
            storages = _storages(self._tensors())
            copies = [copy for _, copy in self._copies]
            if [len(copy) for copy in copies] != [len(storage) for storage in storages]:
                copies = [torch.empty(len(s), dtype=s.dtype, pin_memory=s.is_cuda) for s in storages]
            self._copies = list(zip(storages, copies, strict=True))
            for there, copy in self._copies:
                copy.copy_(there)
        for there, _ in self._copies:
            there.untyped_storage().resize_(0)
        self._away = True


@torch.no_grad()
def _storages(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The storages of tensors, each once, as bytes."""
    storages: dict[int, Tensor] = {}
    for tensor in tensors:
        part = local(tensor.detach())
        storage = part.untyped_storage()
        if storage.nbytes():
            storages[storage.data_ptr()] = torch.empty(0, dtype=torch.uint8, device=part.device).set_(storage)
    return list(storages.values())


def offloaded_networks(networks: Iterable[nn.Module]) -> OffloadedTensors:
    """Frozen networks."""
    parameters = [parameter for network in networks for parameter in network.parameters()]
    for parameter in parameters:
        if not local(parameter.detach()).untyped_storage().resizable():  # mapped from a file
            parameter.data = parameter.data.clone()
    return OffloadedTensors(lambda: parameters, constant=True)


def offloaded_moments(optimizers: Iterable[Optimizer]) -> OffloadedTensors:
    """AdamW's moments."""
    chosen = list(optimizers)

    def tensors() -> Iterable[Tensor]:
        states: list[dict[str, Any]] = [state for optimizer in chosen for state in optimizer.state.values()]
        return (state[name] for state in states for name in ("exp_avg", "exp_avg_sq"))

    return OffloadedTensors(tensors, constant=False)

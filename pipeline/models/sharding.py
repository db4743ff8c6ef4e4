"""FSDP2: every process keeps a part of each parameter, its gradient and optimizer state, and gathers a block's parameters
while it computes that block (`torch.distributed.fsdp.fully_shard`).

All stages shard through this module, on GPUs and on CPUs alike, with what `accelerate launch` says in its environment
(`recipes/accelerate/fsdp2.yaml`). accelerate itself shards on GPUs only, and knows no network whose LM head runs outside the
model's own forward pass, as PPO's does; therefore it is not asked to.

A forward or backward pass of a sharded network is an exchange that all processes take part in: they must make equally many.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor

USE_FSDP = "ACCELERATE_USE_FSDP"
RESHARDS = "reshards_after_forward"  # the option, kept in each part of a network


@dataclass(frozen=True)
class ShardingOptions:
    """What an accelerate config says about FSDP2.

    Attributes:
        reshard_after_forward: free a block's gathered parameters after its forward pass, and gather them again for the backward
            pass.
        offload: keep the parts on the CPU between passes.
        replicas: groups of processes that each hold the whole model between them; gradients are added over groups too.
    """

    reshard_after_forward: bool = True
    offload: bool = False
    replicas: int = 1


def take_options_of_launch() -> ShardingOptions | None:
    """FSDP2's options in the environment that `accelerate launch` made, or None without FSDP or without a launcher.

    The variables that would make accelerate and transformers shard too are taken out of the environment.

    Raises:
        UserError: FSDP1, groups that do not divide the processes, or another way to split a model.
    """
    processes = os.environ.get("WORLD_SIZE")
    if not _flag(USE_FSDP):
        return None
    del os.environ[USE_FSDP]
    os.environ.pop("ACCELERATE_USE_PARALLELISM_CONFIG", None)
    check_fsdp_version(os.environ.get("FSDP_VERSION", "1"))
    replicas = _replicas(int(processes or 1))
    if processes is None:  # no launcher, so no process group either
        return None
    return ShardingOptions(
        reshard_after_forward=_flag("FSDP_RESHARD_AFTER_FORWARD", default=True),
        offload=_flag("FSDP_OFFLOAD_PARAMS"),
        replicas=replicas,
    )


def _replicas(processes: int) -> int:
    """`dp_replicate_size` of the accelerate config's `parallelism_config` (accelerate 1.15 exports its keys so)."""
    sizes = {
        name: int(os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}", "1"))
        for name in ("dp_replicate_size", "dp_shard_size", "tp_size", "cp_size", "sp_size")
    }
    for name in ("tp_size", "cp_size", "sp_size"):
        if sizes[name] > 1:
            raise UserError(
                f"parallelism_config: {name} ({sizes[name]}) is not supported; models are sharded by FSDP2 alone"
            )
    replicas, shards = sizes["dp_replicate_size"], sizes["dp_shard_size"]
    if replicas < 1 or processes % replicas:
        raise UserError(f"dp_replicate_size ({replicas}) does not divide the {processes} processes; change one of them")
    if shards > 1 and replicas * shards != processes:
        raise UserError(
            f"dp_replicate_size ({replicas}) × dp_shard_size ({shards}) are not the {processes} processes; change one of them"
        )
    return replicas


def check_fsdp_version(version: object) -> None:
    """Refuse FSDP1, which accelerate takes where its config names no version."""
    if str(version) != "2":
        raise UserError(
            "the accelerate config asks for FSDP1; say `fsdp_version: 2` in its fsdp_config (recipes/accelerate/fsdp2.yaml)"
        )


def _flag(variable: str, *, default: bool = False) -> bool:
    return os.environ.get(variable, str(default)).lower() in ("1", "true")


class Sharding:
    """Shards networks over the processes of this launch.

    Args:
        device: where the parts are, unless they are offloaded.
        bf16: gather and compute in bf16; the parts, their sums of gradients and the optimizer stay fp32.
    """

    def __init__(self, options: ShardingOptions, processes: int, device: torch.device, *, bf16: bool):
        self.options, self.device = options, device
        self.mesh = _mesh(device.type, processes, options.replicas)
        dtype = torch.bfloat16 if bf16 else None
        self.precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32 if bf16 else None)

    def shard(self, network: nn.Module, *, methods: Sequence[str] = (), sum_gradients: bool = False) -> None:
        """Shard a network in place: each block of its transformer by itself, and the rest together.

        Scalar heads compute in fp32, since a score is a small difference of large numbers.

        Args:
            network: a module whose forward pass uses all of its parameters.
            methods: further methods of it that compute with its parameters.
            sum_gradients: add gradients over processes instead of averaging them.
        """
        offload = CPUOffloadPolicy() if self.options.offload else OffloadPolicy()
        settings: dict[str, Any] = {
            "mesh": self.mesh,
            "offload_policy": offload,
            "reshard_after_forward": self.options.reshard_after_forward,
        }
        for block in transformer_blocks(network):
            fully_shard(block, **settings, mp_policy=self.precision)
        heads = scalar_heads(network)
        for head in heads:
            fully_shard(head, **settings)
        if network not in heads:
            fully_shard(network, **settings, mp_policy=self.precision)
        for method in methods:
            register_fsdp_forward_method(network, method)
        begin = "begin"  # FSDP2 takes the first module that computes for the outermost one, and a block may come first
        setattr(network, begin, _nothing)
        register_fsdp_forward_method(network, begin)
        # On a GPU, torch before 2.13 takes the first argument of every call, so there must be one.
        getattr(network, begin)(None)
        for part in _parts(network):
            setattr(part, RESHARDS, self.options.reshard_after_forward)
            if sum_gradients:
                part.set_gradient_divide_factor(1.0)
                part.set_force_sum_reduction_for_comms(True)  # what gloo has; other factors need NCCL's PREMUL_SUM


def _nothing(_: None) -> None:
    pass


def _mesh(device_type: str, processes: int, replicas: int) -> DeviceMesh:
    if replicas == 1:
        return init_device_mesh(device_type, (processes,), mesh_dim_names=("shard",))
    return init_device_mesh(device_type, (replicas, processes // replicas), mesh_dim_names=("replicate", "shard"))


def transformer_blocks(network: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a network's transformers models, as transformers names them; else the items of its longest list."""
    names: set[str] = set()
    for module in network.modules():
        names |= set(getattr(module, "_no_split_modules", None) or ())
    blocks = [module for module in network.modules() if type(module).__name__ in names]
    if blocks:
        return blocks
    lists = [module for module in network.modules() if isinstance(module, nn.ModuleList)]
    return max((list(items) for items in lists), key=len, default=[])


def scalar_heads(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if isinstance(module, nn.Linear) and module.out_features == 1]


def _parts(network: nn.Module) -> list[FSDPModule]:
    return [module for module in network.modules() if isinstance(module, FSDPModule)]


def is_sharded(network: nn.Module) -> bool:
    return bool(_parts(network))


@contextlib.contextmanager
def gathered(*networks: nn.Module) -> Iterator[None]:
    """Inside, sharded networks are whole in every process, in the dtype that they compute in, and their passes exchange nothing.

    So processes may make different numbers of forward passes, as sampling does. A network that is not sharded stays as it is.
    """
    parts = [part for network in networks for part in _parts(network)]
    try:
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(getattr(part, RESHARDS), recurse=False)


# ------------------------------------------------------------------------------------------------ tensors


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered, in every process; any other tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_as(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, the same in every process, as sharded as another one is."""
    if not isinstance(other, DTensor) or isinstance(tensor, DTensor):
        return tensor
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


def first_process() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def whole_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's state on the CPU, in the first process; the others take part and get an empty one."""
    same = first_names(state)
    gathered_state: dict[str, Tensor] = {}
    for name, tensor in state.items():
        whole_tensor = whole(tensor).detach()  # one at a time: the other processes keep none
        if first_process():
            tied = gathered_state.get(same[name])
            gathered_state[name] = whole_tensor.cpu() if tied is None else tied
    return gathered_state


def first_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The first name of each tensor: tied weights have several. Right in the first process, which has a part of each."""
    first: dict[tuple[int, torch.Size], str] = {}
    return {name: first.setdefault((local(tensor).data_ptr(), tensor.shape), name) for name, tensor in tensors.items()}


def save_whole(model: Any, folder: Path) -> None:
    """`save_pretrained` of a model, sharded or not; called by every process, written by the first."""
    state = whole_state_dict(model.state_dict()) if any(isinstance(p, DTensor) for p in model.parameters()) else None
    if first_process():
        model.save_pretrained(folder, state_dict=state)


def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """`torch.nn.utils.clip_grad_norm_` of parameters that may be sharded; returns the norm before, over all processes."""
    parameters = list(parameters)
    norm = whole(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm.item()

"""One process or many: who this one is, what all agree upon, and how a model is spread over them."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Processes:
    """This process among those that `torchrun` started, or alone.

    rank, size: this one's number, and how many there are.
    device: where it computes.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def highest(self, value: int) -> int:
        """The highest of the values that the processes give; no GPU waits for it."""
        if self.size == 1:
            return value
        highest = torch.tensor(value)
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        return int(highest)

    def sum(self, values: Tensor) -> Tensor:
        """The sum of all processes' values."""
        if self.size > 1:
            dist.all_reduce(values)
        return values


def join(device: str) -> Processes:
    """Meets the other processes, where `torchrun` started several; `dist.destroy_process_group` ends it.

    Args:
        device: "cpu", "cuda" or "auto": a GPU where there is one.

    Raises:
        ValueError: there is no GPU for this process.
    """
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: got cuda; accepted: cpu, for PyTorch sees no GPU")
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    own = torch.device(kind)
    if kind == "cuda":
        own = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0)))
        if own.index >= (gpus := torch.cuda.device_count()):
            raise ValueError(f"--nproc-per-node: got more than {gpus}; accepted: at most one process for each GPU")
        torch.cuda.set_device(own)
    if "RANK" in os.environ:
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
    return Processes(rank, size, own)


def shard(model: nn.Module, blocks: list[nn.Module], dtype: torch.dtype | None, processes: Processes) -> None:
    """Spreads parameters, gradients and what the optimizer will keep over all processes (FSDP2), block by block.

    Args:
        dtype: of computation, with gradients summed in float32; None: that of the parameters.
    """
    for parameter in model.parameters():  # FSDP2 takes no channels-last weights
        parameter.data = parameter.data.contiguous()
    mesh = init_device_mesh(processes.device.type, (processes.size,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # Else it would stay whole after an evaluation, and no moving average could take a step.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def replicate(model: nn.Module, processes: Processes) -> nn.Module:
    """A model whose gradients are averaged over all processes (DDP); alone, the model itself."""
    if processes.size == 1:
        return model
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def exchange_gradients(model: nn.Module, on: bool) -> None:
    """Whether the next backward sums gradients over all processes; only that of a batch's last part needs to."""
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = on
    elif isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(on)

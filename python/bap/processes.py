"""One process or several, as torchrun starts them."""

from __future__ import annotations

import contextlib
import os

import torch
import torch.distributed as dist
from torch import nn

from bap_kernels.nn import DomainParallel

__all__ = ["Processes"]


class Processes:
    """The processes of a run; joins the group that torchrun describes, if it does.

    Args:
        device: ``"cpu"`` (gloo) or ``"cuda"`` (NCCL, one GPU for each process).

    Attributes:
        rank, world: this process and their number.
        first: whether this one writes files.
        device: of this process.

    Examples:
        >>> from bap.processes import Processes
        >>> Processes("cpu").world
        1
    """

    def __init__(self, device: str) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        several = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if several else 0
        self.world = dist.get_world_size() if several else 1
        self.first = self.rank == 0
        self.device = torch.device(device)
        if several and self.device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(self.device)

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model, or :class:`bap_kernels.nn.DomainParallel` of it where there are several processes."""
        return DomainParallel(model) if self.world > 1 else model

    def no_sync(self, run: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Keeps gradients apart in all but the last part of a batch."""
        return run.no_sync() if isinstance(run, DomainParallel) else contextlib.nullcontext()

    def average_statistics(self, run: nn.Module, domain: str) -> None:
        """Averages running statistics of a domain over the processes."""
        if isinstance(run, DomainParallel):
            run.average_statistics(domain)

    def wait(self) -> None:
        """Waits for the others."""
        if self.world > 1:
            dist.barrier()

    def leave(self) -> None:
        """Leaves the group."""
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()

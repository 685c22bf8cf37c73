"""The processes of a run, one or several, as torchrun starts them."""

from __future__ import annotations

import atexit
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from bap.files import FileError
from bap.train.lock import folder_lock
from bap_kernels.nn import DomainParallel

__all__ = ["Processes", "device_of", "leave"]


def device_of(name: str) -> torch.device:
    """The device of that name.

    Raises:
        ValueError: if PyTorch does not find it.
    """
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ValueError(
                f"device_of(): expected `device` to be there, got {name!r} where PyTorch finds {count} GPUs. "
                "Hint: -s device=cpu"
            )
    return device


def leave() -> None:
    """Leaves the group of processes, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


class Processes:
    """The processes of a run; joins the group that torchrun describes, if it does, until the process ends.

    Args:
        device: ``"cpu"`` (gloo) or ``"cuda"`` (NCCL, one GPU for each process).

    Raises:
        ValueError: if PyTorch does not find the device.

    Attributes:
        rank, world: this process and their number.
        first: whether this one writes files.
        device: of this process.

    Examples:
        >>> from bap.train.processes import Processes
        >>> Processes("cpu").world
        1
    """

    def __init__(self, device: str) -> None:
        self.device = device_of(device)
        joined = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
        if joined:
            if self.device.type == "cuda":
                device_of(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
            atexit.register(leave)
        several = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if several else 0
        self.world = dist.get_world_size() if several else 1
        self.first = self.rank == 0
        if several and self.device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(self.device)

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model, or :class:`bap_kernels.nn.DomainParallel` of it where there are several processes."""
        # All processes take the domains in one order, by the settings; comparing them would wait for the GPU.
        return DomainParallel(model, check=False) if self.world > 1 else model

    def no_sync(self, run: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Keeps gradients apart in all but the last part of a batch."""
        return run.no_sync() if isinstance(run, DomainParallel) else contextlib.nullcontext()

    def average_statistics(self, run: nn.Module, domain: str) -> None:
        """Averages running statistics of a domain over the processes."""
        if isinstance(run, DomainParallel):
            run.average_statistics(domain)

    def autocast(self, amp: str | None) -> contextlib.AbstractContextManager[Any]:
        """Mixed precision on this device: ``bf16``, ``fp16`` or None."""
        if amp is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16 if amp == "bf16" else torch.float16)

    def wait(self) -> None:
        """Waits for the others."""
        if self.world > 1:
            dist.barrier()

    @contextlib.contextmanager
    def lock(self, folder: Path | None) -> Iterator[None]:
        """Keeps other runs out of a folder by :func:`bap.train.lock.folder_lock`; the first process locks for all.

        Raises:
            FileError: in all processes, if another run has the folder.
        """
        with contextlib.ExitStack() as stack:
            problem: list[Any] = [None]
            if self.first:
                try:
                    stack.enter_context(folder_lock(folder))
                except FileError as error:
                    problem = [str(error)]
            if self.world > 1:
                dist.broadcast_object_list(problem)
            if problem[0] is not None:
                raise FileError(problem[0])
            yield

    def leave(self) -> None:
        """Leaves the group."""
        leave()

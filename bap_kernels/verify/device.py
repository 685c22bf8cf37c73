"""What a verifier's child computes on: the CUDA device that it sees, or a stand-in of the tests."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

__all__ = ["CudaDevice", "Device", "Replay"]

Replay = Callable[[], Any]
_MEMORY_BYTES = 2 * 2**30


class Device(Protocol):
    """A device as the cases need it.

    Attributes:
        torch_device: where tensors are put.
        sm_count: streaming multiprocessors, on which the choice of tiles depends.
        capability: compute capability without its point.
    """

    torch_device: torch.device
    sm_count: int
    capability: int

    def open(self) -> None:
        """Makes the device ready. What it raises is no kernel's fault."""

    def synchronize(self) -> None:
        """Waits for everything; raises what went wrong on the device."""

    def other_stream(self) -> contextlib.AbstractContextManager:
        """Computes on another stream, after what was asked for before and before what is asked for after."""

    def capture(self, run: Callable[[], Any]) -> tuple[Any, Replay] | None:
        """Records a call into a graph: its result, and what replays it; None where there are no graphs."""


class CudaDevice:
    """The only CUDA device that this process sees."""

    def __init__(self) -> None:
        self.torch_device = torch.device("cuda", 0)
        self.sm_count = self.capability = 0

    def open(self) -> None:
        """Makes a context, and limits the memory that this process takes."""
        torch.set_num_threads(1)
        if not torch.cuda.is_available():
            raise RuntimeError("the process sees no CUDA device")
        facts = torch.cuda.get_device_properties(0)
        self.sm_count, self.capability = facts.multi_processor_count, 10 * facts.major + facts.minor
        torch.cuda.set_per_process_memory_fraction(min(1.0, _MEMORY_BYTES / facts.total_memory), 0)
        torch.zeros(1, device=self.torch_device).add_(1)
        torch.cuda.synchronize()

    def synchronize(self) -> None:
        """Waits for the device."""
        torch.cuda.synchronize()

    @contextlib.contextmanager
    def other_stream(self) -> Iterator[None]:
        """A stream beside the current one."""
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            yield
        current.wait_stream(side)

    def capture(self, run: Callable[[], Any]) -> tuple[Any, Replay]:
        """A CUDA graph of the call, which has run before."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            result = run()
        return result, graph.replay

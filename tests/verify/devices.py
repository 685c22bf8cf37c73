"""Stand-ins on the CPU for the device that a verifier's child computes on."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import torch


class CpuDevice:
    """CPU tensors; no streams and no graphs."""

    sm_count, capability = 1, 80

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")

    def open(self) -> None:
        torch.set_num_threads(1)

    def synchronize(self) -> None:
        pass

    def other_stream(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def capture(self, run: Callable[[], Any]) -> None:
        return None


class Poisoned(CpuDevice):
    """A context that an illegal access has broken: every call after it raises."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = 0

    def synchronize(self) -> None:
        self.waits += 1
        if self.waits > 6:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with ...")


class Busy(CpuDevice):
    """A device in exclusive mode that another process has."""

    def open(self) -> None:
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable")


class Sleeping(CpuDevice):
    """A driver that never answers."""

    def open(self) -> None:
        threading.Event().wait()


class Graphs(CpuDevice):
    """A device whose graph replays into other memory than it was captured with."""

    def capture(self, run: Callable[[], Any]) -> Any:
        return run(), lambda: None


class Interpreter(CpuDevice):
    """Triton's interpreter, without what it repeats for each device function."""

    def open(self) -> None:
        super().open()
        from tests.interpret.conftest import _hasten  # noqa: F401  done at its import

"""The device that the compiled kernels are executed for: its set-up, and what was launched on it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from bap_kernels import _load

CONV, PACK, UNPACK, WEIGHT = "conv", "channel_pack", "channel_unpack", "weight_gradient"
_SUMS = ("sum_partials", "split_epilogue")
_CONVS = ("gathered_conv2d", "planar_conv2d", "halo_conv2d", "warpgroup_conv2d")


def library() -> Any:
    """The Python module in place of ``bap_kernels._C_cuda``; see tests/ptx/runtime/module.cpp."""
    return _load.cuda_library


def set_device(sm_count: int = 1, arch: int = 0) -> None:
    """Few SMs take large tiles, many take small ones; ``arch`` is 80, 90, or 0 for that of the process."""
    library().set_device(sm_count, arch)


_log: list[str] = []


def launched(kernel: str) -> int:
    """How often a kernel has been launched so far."""
    _log.extend(library().take_launches())
    return _log.count(kernel)


@contextlib.contextmanager
def kernels() -> Iterator[list[str]]:
    """Gives the names of the kernels that were launched inside, in order, once it is left."""
    names: list[str] = []
    library().take_launches()
    yield names
    names.extend(library().take_launches())


@contextlib.contextmanager
def launches() -> Iterator[list[str]]:
    """The same with one name for all kernels of the convolution, and without sums of partial results and of parts."""
    names: list[str] = []
    with kernels() as found:
        yield names
    names.extend(CONV if name in _CONVS else name for name in found if name not in _SUMS)

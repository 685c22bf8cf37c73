"""How much memory a piece of work takes: what autograd keeps, and the most that is taken at once.

The peak is the process's own: the high-water mark of its resident set, which Linux lets a process set back, less what
was resident before. It counts every allocation, also those of libraries that PyTorch's allocator does not see. malloc
is told to map each block of 64 KiB or more on its own and to return what is freed at once; otherwise freed memory would
stay resident and be used again unseen, or be counted though nobody holds it. As that makes allocation slower, peaks are
measured in a process of their own, never in one that is timed. Pages count when they are first written. The kernel's
counters are exact to some 100 KiB.

On a GPU the peak is that of PyTorch's allocator, which every library that PyTorch calls takes its scratch memory from.
"""

import ctypes
import multiprocessing
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MAPPED_BYTES = 64 << 10
# The largest that glibc takes: blocks beyond are always mapped.
KEPT_BYTES = 32 << 20

_Result = TypeVar("_Result")


def can_measure_peak() -> bool:
    """Whether this system has what the peak needs: glibc's malloc and a high-water mark that can be set back."""
    return hasattr(ctypes.CDLL(None), "mallopt") and Path("/proc/self/clear_refs").exists()


def keep_freed() -> bool:
    """Tell malloc to keep what is freed, in this process from now on; returns whether it does (glibc's does).

    A result of some MiB is otherwise given back and mapped anew in a call, or not, as the heap happens to lie. Its page
    faults take as long as many a convolution, the same for all variants, but not in the same rounds: they hide who is
    faster. A network whose layers use each other's memory has none of them.
    """
    malloc = ctypes.CDLL(None)
    if not hasattr(malloc, "mallopt"):
        return False
    return bool(malloc.mallopt(M_MMAP_THRESHOLD, KEPT_BYTES) and malloc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def _settle(threads: int) -> None:
    torch.set_num_threads(threads)
    malloc = ctypes.CDLL(None)
    malloc.mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)
    malloc.mallopt(M_TRIM_THRESHOLD, MAPPED_BYTES)


def worker() -> ProcessPoolExecutor:
    """Return one process with as many threads as this one, in which `peak_bytes` may be called."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, context, _settle, (torch.get_num_threads(),))


def in_fresh_process(function: Callable[..., _Result], *args: object) -> _Result:
    """Call a function of a module in a process of its own, in which `peak_bytes` may be called."""
    with worker() as pool:
        return pool.submit(function, *args).result()


def _resident(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) << 10


def resident_bytes() -> int:
    """Bytes of the resident set now."""
    return _resident("VmRSS")


def peak_bytes(run: Callable[[], object]) -> int:
    """Bytes that ``run`` takes at most beyond what is resident before; only in a process made by this module."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    run()
    return max(0, _resident("VmHWM") - before)


def cuda_peak_bytes(run: Callable[[], object]) -> int:
    """Bytes that ``run`` takes at most beyond what PyTorch's CUDA allocator held before, in this process."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def saved_bytes(forward: Callable[[], object], apart: Iterable[Tensor]) -> int:
    """Bytes of the distinct tensors that autograd saves in a forward; views that begin alike count once.

    Args:
        forward: The forward; its result, and with it the graph, is dropped.
        apart: Tensors whose storages do not count: parameters, which are there in any case.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in apart}
    held: dict[int, int] = {}
    # Kept until the end: the address of one that is freed could be given to another.
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            place = tensor.data_ptr()
            held[place] = max(held.get(place, 0), tensor.numel() * tensor.element_size())
            saved.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(held.values())

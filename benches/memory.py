"""Memory: bytes that autograd saves, and peaks.

On the CPU the peak is the high-water mark of the resident set of the process, which Linux can reset, less what was
resident before. It counts every allocation, also of libraries outside PyTorch's allocator. malloc is configured to map
every block of 64 KiB or more separately and to return freed blocks at once; otherwise freed memory would stay resident
and be reused unseen. This makes allocation slower, so peaks are measured in processes that are never timed. Pages count
from their first write. The kernel's counters are exact to some 100 KiB.

On a GPU the peak is that of PyTorch's allocator, which also provides the scratch memory of libraries.
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
# The largest threshold of glibc: larger blocks are always mapped.
KEPT_BYTES = 32 << 20

_Result = TypeVar("_Result")


def can_measure_peak() -> bool:
    """Whether this system has glibc's malloc and a resettable high-water mark."""
    return hasattr(ctypes.CDLL(None), "mallopt") and Path("/proc/self/clear_refs").exists()


def keep_freed() -> bool:
    """Configure malloc to keep freed memory in this process; return whether that is possible (it is with glibc).

    Otherwise a result of some MiB is returned to the system and mapped anew in some calls, depending on the heap. The
    page faults take as long as a convolution and hide differences between variants. Networks whose layers reuse each
    other's memory have none of them.
    """
    malloc = ctypes.CDLL(None)
    if not hasattr(malloc, "mallopt"):
        return False
    return bool(malloc.mallopt(M_MMAP_THRESHOLD, KEPT_BYTES) and malloc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def _return_freed(threads: int) -> None:
    torch.set_num_threads(threads)
    malloc = ctypes.CDLL(None)
    malloc.mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)
    malloc.mallopt(M_TRIM_THRESHOLD, MAPPED_BYTES)


def worker() -> ProcessPoolExecutor:
    """Return an executor of one process with as many threads as this one, for `peak_bytes`."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, context, _return_freed, (torch.get_num_threads(),))


def in_fresh_process(function: Callable[..., _Result], *args: object) -> _Result:
    """Call a module-level function in a new process, for `peak_bytes`."""
    with worker() as pool:
        return pool.submit(function, *args).result()


def _resident(name: str) -> int:
    match = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match.group(1)) << 10


def resident_bytes() -> int:
    """Bytes of the resident set."""
    return _resident("VmRSS")


def peak_bytes(run: Callable[[], object]) -> int:
    """Peak bytes of ``run`` beyond what is resident before; only in processes of `worker`."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    run()
    return max(0, _resident("VmHWM") - before)


def cuda_peak_bytes(run: Callable[[], object]) -> int:
    """Peak bytes of ``run`` in PyTorch's CUDA allocator beyond what is allocated before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def saved_bytes(forward: Callable[[], object], excluded: Iterable[Tensor]) -> int:
    """Bytes of the distinct tensors that autograd saves in a forward; views with one data pointer count once.

    Args:
        forward: The forward; its result, and with it the graph, is dropped.
        excluded: Tensors whose storages do not count, such as parameters.
    """
    excluded_storages = {tensor.untyped_storage().data_ptr() for tensor in excluded}
    sizes: dict[int, int] = {}
    # Keeps the tensors alive: a freed address could be reused.
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in excluded_storages:
            address = tensor.data_ptr()
            sizes[address] = max(sizes.get(address, 0), tensor.numel() * tensor.element_size())
            saved.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(sizes.values())

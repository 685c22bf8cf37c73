"""The roofline of this machine, measured in a fraction of a second, to tell what bounds a layer."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from bap_kernels.functional import gathered_conv2d

__all__ = ["Roofline", "limit_of", "measured_roofline"]

_SIDE = 768
_COPIED = 32 << 20  # bytes, beyond most caches
# A call that takes less than some times what the smallest one takes is spent on calling.
_LAUNCHES = 8
# Vectors of results are at least this wide, in channels.
_NARROW = 16
# What counts as a gain that was missed, and as bytes that stay.
_SLACK = 1.15


@dataclass(frozen=True)
class Roofline:
    """Peaks of a machine.

    Attributes:
        flop_per_s: of a matrix product.
        bytes_per_s: of a copy, read and written.
        call_s: time of the smallest gathered convolution.
    """

    flop_per_s: float
    bytes_per_s: float
    call_s: float

    def compute_s(self, macs: int) -> float:
        """Seconds that the arithmetic takes at least."""
        return 2 * macs / self.flop_per_s

    def memory_s(self, moved: int) -> float:
        """Seconds that the bytes take at least."""
        return moved / self.bytes_per_s

    def fraction(self, macs: int, moved: int, seconds: float) -> float:
        """Fraction of the roofline; above 1 where data stays in a cache.

        Examples:
            >>> from bap_kernels.plan.roofline import Roofline
            >>> Roofline(1e9, 1e9, 1e-6).fraction(macs=1_000_000, moved=4_000_000, seconds=8e-3)
            0.5
        """
        return max(self.compute_s(macs), self.memory_s(moved)) / seconds


def _best(run: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times[1:])


@lru_cache(maxsize=8)
def measured_roofline(dtype: torch.dtype, threads: int) -> Roofline:
    """The peaks of this machine's CPU, measured once for each dtype and number of threads.

    Args:
        dtype: of the matrix product and of the smallest call.
        threads: PyTorch's number of threads now.
    """
    # In a mode of its own: tensors of inference mode would not be the same in every call.
    with torch.inference_mode(False), torch.no_grad():
        a, b = torch.randn(_SIDE, _SIDE).to(dtype), torch.randn(_SIDE, _SIDE).to(dtype)
        flop_per_s = 2 * _SIDE**3 / _best(lambda: a @ b, 5)
        source = torch.zeros(_COPIED, dtype=torch.uint8)
        copied = torch.empty_like(source)
        bytes_per_s = 2 * _COPIED / _best(lambda: copied.copy_(source), 5)
        x, weight = torch.randn(1, 8, 1, 1).to(dtype), torch.randn(8, 8, 1, 1).to(dtype)
        return Roofline(flop_per_s, bytes_per_s, _best(lambda: gathered_conv2d(x, weight), 50))


def limit_of(
    peaks: Roofline,
    backend: str,
    macs: tuple[int, int],
    moved: tuple[int, int],
    times: tuple[float, float],
    results: int,
    products: int,
) -> str:
    """Why a layer gains less than its work lets it; empty where it does not.

    Args:
        peaks: of the machine.
        backend: what ran it.
        macs: (kept, all) multiply-adds.
        moved: (kept, all) bytes.
        times: seconds of the layer and of the dense convolution.
        results: channels that it writes.
        products: how many products each result sums.

    Examples:
        >>> from bap_kernels.plan.roofline import Roofline, limit_of
        >>> peaks = Roofline(1e11, 1e10, 1e-6)
        >>> limit_of(peaks, "native", (500_000, 1_000_000), (3_000_000, 4_000_000), (4e-4, 5e-4), 64, 32)
        'memory-bound: its work falls to 50%, its bytes to 75% only'
        >>> limit_of(peaks, "native", (500_000, 1_000_000), (30_000, 60_000), (5e-6, 6e-6), 64, 32)
        'launch-bound: the smallest call takes 1 of its 5 us'
    """
    work, traffic = macs[0] / max(macs[1], 1), moved[0] / max(moved[1], 1)
    seconds, dense = times
    if seconds <= _SLACK * work * dense:
        return ""
    if work == 1.0:
        return "it keeps all of its work"
    if backend == "dense":
        return "no way to skip channels was faster than the dense convolution"
    if seconds < _LAUNCHES * peaks.call_s:
        return f"launch-bound: the smallest call takes {peaks.call_s * 1e6:.0f} of its {seconds * 1e6:.0f} us"
    if peaks.memory_s(moved[0]) > peaks.compute_s(macs[0]) and traffic > _SLACK * work:
        return f"memory-bound: its work falls to {work:.0%}, its bytes to {traffic:.0%} only"
    if results < _NARROW:
        return f"too narrow: it writes {results} channels, fewer than a vector holds"
    if products < _NARROW:
        return f"too narrow: each result sums {products} products only"
    fractions = [peaks.fraction(macs[side], moved[side], times[side]) for side in range(2)]
    return f"the smaller call is less efficient: {fractions[0]:.0%} of the roofline, dense {fractions[1]:.0%}"

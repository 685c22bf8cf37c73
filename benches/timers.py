"""Clocks and the interleaved rounds in which all variants of a cell are timed."""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def nothing() -> None:
    """Do nothing: the default of `Timed.enter`."""


@dataclass
class Timed:
    """A function with the inputs that it is timed on.

    Args:
        run: Called with one input.
        inputs: Rotated through.
        enter: Called before each run, outside the timing.
    """

    run: Callable[[Tensor], object]
    inputs: Sequence[Tensor]
    enter: Callable[[], None] = nothing


class CpuClock:
    """Wall-clock seconds of one call."""

    def __call__(self, run: Callable[[Tensor], object], x: Tensor) -> float:
        """Time ``run(x)``."""
        start = time.perf_counter_ns()
        run(x)
        return (time.perf_counter_ns() - start) * 1e-9


class Marks:
    """Moments within one run; on a GPU they are events, so that marking one waits for nothing."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._taken: list[Any] = []

    def mark(self) -> None:
        """Note the moment."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._taken.append(event)
        else:
            self._taken.append(time.perf_counter())

    def seconds(self) -> tuple[float, ...]:
        """Seconds from each moment to the next; on a GPU it waits for the last."""
        pairs = pairwise(self._taken)
        if not self._cuda:
            return tuple(later - earlier for earlier, later in pairs)
        torch.cuda.synchronize()
        return tuple(earlier.elapsed_time(later) * 1e-3 for earlier, later in pairs)


class CudaClock:
    """Seconds between CUDA events around one call, the L2 cache flushed before it."""

    def __init__(self, device: torch.device) -> None:
        size = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(2 * size, dtype=torch.int8, device=device)
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, run: Callable[[Tensor], object], x: Tensor) -> float:
        """Time ``run(x)``."""
        self._flush.fill_(1)
        self._start.record()
        run(x)
        self._end.record()
        torch.cuda.synchronize()
        return self._start.elapsed_time(self._end) * 1e-3


def clock(device: torch.device) -> Callable[[Callable[[Tensor], object], Tensor], float]:
    """Return the clock of a device."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()


@dataclass(frozen=True)
class Spread:
    """Percentiles of a set of timings, in seconds, and how many there were."""

    p20: float
    p50: float
    p80: float
    rounds: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Spread":
        """Interpolate the percentiles linearly."""
        p20, p50, p80 = torch.tensor(seconds, dtype=torch.float64).quantile(
            torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
        )
        return cls(float(p20), float(p50), float(p80), len(seconds))


def interleave(
    timed: Mapping[str, Timed],
    measure: Callable[[Callable[[Tensor], object], Tensor], float],
    seconds: float,
    min_rounds: int = 5,
    max_rounds: int = 50,
) -> dict[str, list[float]]:
    """Time in rounds, each in an order of its own, so that a disturbance falls on all alike.

    The order is drawn anew (the same in every run): what one leaves in the caches and on the heap would otherwise
    favour or hinder whichever always follows it. Each call takes the next input of its pool, so that no
    variant finds in the cache the input that another has just read.

    Args:
        timed: Functions by name.
        measure: Clock.
        seconds: Time to spend; the number of rounds follows from it.
        min_rounds: Rounds made in any case.
        max_rounds: Rounds at most.

    Returns:
        Seconds of every call, by name.
    """
    samples: dict[str, list[float]] = {name: [] for name in timed}
    start = time.perf_counter()
    # By pool, not by variant: variants that share a pool go through it together.
    taken: dict[int, int] = {}
    names, order = list(timed), random.Random(0)
    for done in range(1, max_rounds + 1):
        for name in order.sample(names, len(names)):
            entry = timed[name]
            position = taken.get(id(entry.inputs), 0)
            taken[id(entry.inputs)] = position + 1
            entry.enter()
            samples[name].append(measure(entry.run, entry.inputs[position % len(entry.inputs)]))
        spent = time.perf_counter() - start
        if done >= min_rounds and spent * (done + 1) / done > seconds:
            break
    return samples


def fastest(
    candidates: Mapping[str, Callable[[Tensor], object]],
    inputs: Sequence[Tensor],
    measure: Callable[[Callable[[Tensor], object], Tensor], float],
    rounds: int = 4,
) -> str:
    """Name of the candidate with the shortest time of a few interleaved rounds, after one to warm up."""
    if len(candidates) == 1:
        return next(iter(candidates))
    timed = {name: Timed(run, inputs) for name, run in candidates.items()}
    samples = interleave(timed, measure, float("inf"), min_rounds=1, max_rounds=rounds + 1)
    return min(samples, key=lambda name: min(samples[name][1:]))

"""Clocks, and interleaved rounds of all variants of a cell."""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor


def nothing() -> None:
    """Do nothing."""


@dataclass
class Timed:
    """A function to be timed, with its inputs.

    Args:
        run: Called with one input.
        inputs: Pool, used in turn.
        enter: Called before each run, outside the timing.
    """

    run: Callable[[Tensor], object]
    inputs: Sequence[Tensor]
    enter: Callable[[], None] = nothing


class CpuClock:
    """Measures wall-clock time of one call."""

    def __call__(self, run: Callable[[Tensor], object], x: Tensor) -> float:
        """Time ``run(x)``."""
        start = time.perf_counter_ns()
        run(x)
        return (time.perf_counter_ns() - start) * 1e-9


class Marks:
    """Time stamps within one run; on a GPU these are events, so that marking does not synchronise."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._stamps: list[Any] = []

    def mark(self) -> None:
        """Record a time stamp."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._stamps.append(event)
        else:
            self._stamps.append(time.perf_counter())

    def seconds(self) -> tuple[float, ...]:
        """Seconds between consecutive time stamps; synchronises on a GPU."""
        pairs = pairwise(self._stamps)
        if not self._cuda:
            return tuple(later - earlier for earlier, later in pairs)
        torch.cuda.synchronize()
        return tuple(earlier.elapsed_time(later) * 1e-3 for earlier, later in pairs)


class CudaClock:
    """Measures the time between CUDA events around one call, with the L2 cache flushed before it."""

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
    """Percentiles of timings in seconds, and their number."""

    p20: float
    p50: float
    p80: float
    rounds: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Spread":
        """Return the percentiles, linearly interpolated."""
        p20, p50, p80 = map(float, np.percentile(seconds, (20, 50, 80)))
        return cls(p20, p50, p80, len(seconds))


def interleave(
    timed: Mapping[str, Timed],
    measure: Callable[[Callable[[Tensor], object], Tensor], float],
    seconds: float,
    min_rounds: int = 5,
    max_rounds: int = 50,
    warm: int = 0,
    calls: int = 1,
) -> dict[str, list[float]]:
    """Time the functions in rounds, each in another order, so that disturbances affect all alike.

    The order of each round is drawn from a fixed seed: in a fixed order, the state that one function leaves in caches
    and heap would always affect the same successor. Each call uses the next input of its pool, so that no function
    finds an input in the cache that another has just read.

    Args:
        timed: Functions by name.
        measure: Clock.
        seconds: Time to spend, from which the number of rounds follows.
        min_rounds: Least number of rounds.
        max_rounds: Largest number of rounds.
        warm: Untimed calls of a function in each round, before the timed ones: with more than none, functions are timed
            as they run in a loop of their own, their threads awake.
        calls: Timed calls of a function in each round.

    Returns:
        Seconds of every timed call, by name.
    """
    samples: dict[str, list[float]] = {name: [] for name in timed}
    start = time.perf_counter()
    # Position in each pool: functions that share a pool advance it together.
    positions: dict[int, int] = {}
    names, order = list(timed), random.Random(0)
    for done in range(1, max_rounds + 1):
        for name in order.sample(names, len(names)):
            entry = timed[name]
            entry.enter()
            for call in range(warm + calls):
                position = positions.get(id(entry.inputs), 0)
                positions[id(entry.inputs)] = position + 1
                spent_here = measure(entry.run, entry.inputs[position % len(entry.inputs)])
                if call >= warm:
                    samples[name].append(spent_here)
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
    """Name of the candidate with the shortest time in a few interleaved rounds, after a warm-up round."""
    if len(candidates) == 1:
        return next(iter(candidates))
    timed = {name: Timed(run, inputs) for name, run in candidates.items()}
    samples = interleave(timed, measure, float("inf"), min_rounds=1, max_rounds=rounds + 1)
    return min(samples, key=lambda name: min(samples[name][1:]))

"""Timers: variants in turns, and percentiles of their times."""

from __future__ import annotations

from itertools import pairwise, permutations

import pytest
import torch

from benches import timers


def test_interleave_shuffles_rounds_and_rotates_inputs() -> None:
    order: list[tuple[str, int]] = []
    pool = [torch.tensor(i) for i in range(5)]

    def entry(name: str) -> timers.Timed:
        return timers.Timed(lambda x: order.append((name, int(x))), pool)

    samples = timers.interleave({name: entry(name) for name in "abc"}, timers.CpuClock(), 0.0, min_rounds=30)
    assert {name: len(seconds) for name, seconds in samples.items()} == {"a": 30, "b": 30, "c": 30}
    names = [name for name, _ in order]
    assert all(sorted(names[i : i + 3]) == ["a", "b", "c"] for i in range(0, 90, 3))
    assert [x for _, x in order] == [i % 5 for i in range(90)]
    # Every variant has followed every other one.
    assert {pair for pair in pairwise(names) if pair[0] != pair[1]} == set(permutations("abc", 2))


def test_interleave_times_calls_after_untimed_ones() -> None:
    order: list[str] = []
    times = iter(range(100))
    timed = {name: timers.Timed(lambda x, name=name: order.append(name), [torch.tensor(0)]) for name in "ab"}

    def measure(run, x):
        run(x)
        return float(next(times))

    samples = timers.interleave(timed, measure, 0.0, min_rounds=2, max_rounds=2, warm=2, calls=3)
    assert [len(seconds) for seconds in samples.values()] == [6, 6]
    visits = [order[start : start + 5] for start in range(0, 20, 5)]
    assert all(len(set(visit)) == 1 for visit in visits)
    # The first two calls of a visit are not among the samples.
    assert sorted([*samples["a"], *samples["b"]]) == [5.0 * visit + call for visit in range(4) for call in (2, 3, 4)]


def test_spread_interpolates_percentiles() -> None:
    spread = timers.Spread.of([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert (spread.p20, spread.p50, spread.p80) == pytest.approx((2.0, 3.5, 5.0))

"""One call of an op, run in every way in which a kernel can fail."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bap_kernels.verify.device import Device
from bap_kernels.verify.guards import Guards

__all__ = ["REPEATS", "Step", "Wrong", "exercise"]

REPEATS = 3
Step = Callable[[str], None]


class Wrong(AssertionError):  # noqa: N818
    """A result that is not what it has to be."""


def _same_bits(results: Sequence[Tensor], first: Sequence[Tensor], what: str) -> None:
    for result, expected in zip(results, first, strict=True):
        # NaN differs from itself, and zeros of either sign are equal.
        same = torch.equal(result.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))
        if not same:
            raise Wrong(f"{what} differs from the first result")


@torch.no_grad()
def exercise(
    run: Callable[..., Sequence[Tensor]],
    arguments: Sequence[Any],
    compare: Callable[[Sequence[Tensor]], None],
    device: Device,
    step: Step,
    alone: Sequence[int] = (),
) -> None:
    """Runs a call between borders of NaN, compares it, and runs it again: repeats, another stream, a graph.

    Args:
        run: the call; returns its results.
        arguments: its arguments, tensors on the CPU.
        compare: raises AssertionError where the results are wrong.
        step: is told what follows.
        alone: places of tensors that get no borders: the library keeps packed forms of those alone that share their
            memory with nothing.

    Raises:
        Wrong: if memory around a buffer was written to, or two runs differ in a bit.
        AssertionError: of ``compare``.
    """
    guards = Guards(device.torch_device)
    placed = tuple(
        value.to(device.torch_device) if place in alone else guards.place(value)
        for place, value in enumerate(arguments)
    )
    step("first run")
    with guards:
        first = run(*placed)
    device.synchronize()
    problem = guards.check()
    if problem:
        raise Wrong(problem)
    compare(first)
    for number in range(2, REPEATS + 1):
        step(f"run {number}")
        again = run(*placed)
        device.synchronize()
        _same_bits(again, first, f"run {number}")
    step("another stream")
    with device.other_stream():
        again = run(*placed)
    device.synchronize()
    _same_bits(again, first, "the run on another stream")
    step("captured graph")
    recorded = device.capture(lambda: run(*placed))
    if recorded is not None:
        results, replay = recorded
        for _ in range(2):
            for result in results:
                result.zero_()
            replay()
            device.synchronize()
            _same_bits(results, first, "the replayed graph")

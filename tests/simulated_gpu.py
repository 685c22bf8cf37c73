"""A simulated GPU for `auto`: CPU tensors, a clock of the test's own, and ATen in place of the opt-in backends."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bap_kernels import _C


def _numbers() -> Iterator[int]:
    for number in itertools.cycle(range(20, 128)):
        _C.set_verdicts(number, {})
        yield number


# Verdicts outlive a test, so each has a device of its own, without any.
devices = _numbers()


@contextlib.contextmanager
def simulated_gpu(
    name: str = "H200", seconds: Any = None, capturing: bool = False, **options: Any
) -> Iterator[list[str]]:
    """Gives the names of the candidates that were run because they were chosen; options as in `_C.simulate_gpu`."""
    ran: list[str] = []
    _C.simulate_gpu(name, seconds, capturing=lambda: capturing, **{"ran": ran.append} | options)
    try:
        yield ran
    finally:
        _C.simulate_gpu(None)


def choose_as_on_gpu(*args: Any, **options: Any) -> tuple[str, Tensor]:
    """The name of the candidate that a gathered convolution is computed by, and its result."""
    with simulated_gpu(**options) as ran:
        y = torch.ops.bap_kernels.gathered_conv2d(*args)
    return ran[-1], y

"""The correctness gate of benchmarks."""

from __future__ import annotations

import math

import pytest
import torch

from benches import gate


@pytest.mark.parametrize("value", [math.nan, math.inf, 1.01])
def test_nan_infinite_and_wrong_values_raise(value: float) -> None:
    reference = torch.ones(4, dtype=torch.float64)
    result = torch.ones(4)
    assert gate.check("x", result, reference, 100) == 0
    result[2] = value
    with pytest.raises(gate.WrongResultError):
        gate.check("x", result, reference, 100)


def test_wrong_shape_and_layout_raise() -> None:
    with pytest.raises(gate.WrongResultError, match="shape"):
        gate.check("x", torch.ones(2), torch.ones(3, dtype=torch.float64), 1)
    with pytest.raises(gate.WrongResultError, match="channels_last"):
        gate.check_layout("x", torch.ones(1, 2, 3, 3), "channels_last")


def test_tolerance_grows_with_length_and_half_precision() -> None:
    assert gate.tolerance(torch.float32, 400, 1.0) == pytest.approx(2 * gate.tolerance(torch.float32, 100, 1.0))
    assert gate.tolerance(torch.bfloat16, 100, 1.0) > 2**-8

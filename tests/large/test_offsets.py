"""Offsets past 2^31 elements: strides that reach far over untouched memory, and one result that is truly large."""

from __future__ import annotations

import pytest
import torch

from bap_kernels import reference
from bap_kernels.testing import Case, assert_close, make_tensors, run

FAR = 2**31
pytestmark = pytest.mark.large


@pytest.fixture(scope="module")
def storage() -> torch.Tensor:
    # 4.3 GB of addresses; only the pages that a test touches take memory.
    return torch.empty(FAR + 2**20, dtype=torch.bfloat16)


def far_view(storage: torch.Tensor, values: torch.Tensor, axis: int) -> torch.Tensor:
    strides = [0] * 4
    step = 1
    for dim in (3, 2, 1, 0):
        if dim != axis:
            strides[dim] = step
            step *= values.shape[dim]
    strides[axis] = FAR // (values.shape[axis] - 1)
    return storage.as_strided(values.shape, strides).copy_(values)


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)])
def test_far_strides_of_the_input(backend: str, kernel: tuple[int, int], axis: int, storage: torch.Tensor) -> None:
    case = Case(3, 5, 4, (5, 6), kernel, padding=(kernel[0] // 2,) * 4, in_list="all", dtype=torch.bfloat16)
    sample = make_tensors(case)
    expected = reference.gathered_conv2d(*sample.args)
    sample.input = far_view(storage, sample.input, axis)
    assert sample.input.stride(axis) * (sample.input.shape[axis] - 1) >= FAR - 4
    assert_close(run(sample, backend), expected, case.dtype, sample.depth)


@pytest.mark.parametrize("axis", [0, 1])
def test_far_strides_of_the_weight(backend: str, axis: int, storage: torch.Tensor) -> None:
    sample = make_tensors(Case(1, 5, 4, (5, 6), in_list="all", out_list="all", dtype=torch.bfloat16))
    expected = reference.gathered_conv2d(*sample.args)
    sample.weight = far_view(storage, sample.weight, axis)
    assert_close(run(sample, backend), expected, torch.bfloat16, sample.depth)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_result_of_more_than_2_31_elements(backend: str, layout: str) -> None:
    side, kept = 27000, 3
    x = torch.empty(1, 1, side, side, dtype=torch.bfloat16).fill_(1)
    rows = torch.tensor([0, 1, side // 2, side - 1])
    x[0, 0, rows] = torch.randn(4, side).bfloat16()
    if layout == "channels_last":
        x = x.as_strided(x.shape, (side * side, 1, side, 1))
    weight = torch.randn(kept + 1, 1, 1, 1).bfloat16()
    index = torch.tensor([3, 0, 2], dtype=torch.int32)
    case = Case(1, 1, 4, (side, side), (1, 1), padding=(0,) * 4, dtype=torch.bfloat16)
    sample = make_tensors(case.but(size=(1, 1)))
    sample.input, sample.weight, sample.bias, sample.in_index, sample.out_index = x, weight, None, None, index
    y = run(sample, backend)
    assert y.numel() > FAR
    expected = x[:, :, rows].double() * weight[index.long()].double().view(1, kept, 1, 1)
    assert_close(y[:, :, rows], expected, torch.bfloat16, 1)

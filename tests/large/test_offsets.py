"""Offsets past 2^31 elements: strides that reach far over untouched memory, and one result that is truly large."""

from __future__ import annotations

import pytest
import torch

from bap_kernels import reference
from bap_kernels.testing import Case, assert_close, make_tensors, run

FAR = 2**31


@pytest.fixture(scope="module")
def storage() -> torch.Tensor:
    # 4.3 GB of addresses; only the pages that a test touches take memory.
    try:
        return torch.empty(FAR + 2**20, dtype=torch.bfloat16)
    except RuntimeError as error:
        pytest.skip(f"no 4.3 GB of addresses: {error}")


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


@pytest.mark.large
@pytest.mark.parametrize(
    ("backend", "layout"),
    [("native", "contiguous"), ("native", "channels_last"), ("aten", "contiguous")],
    indirect=["backend"],
)
def test_result_of_more_than_2_31_elements(backend: str, layout: str) -> None:
    batch, side, kept = 20, 5000, 5
    sample = make_tensors(Case(1, 1, 6, (1, 1), (1, 1), padding=(0,) * 4, bias=False, dtype=torch.bfloat16))
    x = torch.ones(batch, 1, side, side, dtype=torch.bfloat16)
    images, rows = torch.tensor([0, 9, 18, 19]), torch.tensor([0, 1, side // 2, side - 1])
    x[images, 0, rows] = torch.randn(4, side).bfloat16()
    sample.input = x if layout == "contiguous" else x.as_strided(x.shape, (side * side, 1, side, 1))
    sample.in_index, sample.out_index = None, torch.tensor([3, 0, 5, 2, 1], dtype=torch.int32)
    y = run(sample, backend)
    assert y.numel() > FAR
    weight = sample.weight[sample.out_index, 0, 0, 0].double()
    assert_close(y[images, :, rows], x[images, 0, rows].double()[:, None] * weight[:, None], torch.bfloat16, 1)
    assert_close(y[:, :, 2, 3], weight.expand(batch, kept), torch.bfloat16, 1)

"""The forward through the op, on every axis of its contract, against the loops of the reference."""

from __future__ import annotations

import random

import pytest
import torch

from bap_kernels.testing import LAYOUTS, LISTS, Case, check_forward, check_fused, random_case

BASE = Case(in_channels=20, out_channels=18, size=(5, 6))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FLAGS = ("in_scale", "in_shift", "in_relu", "out_scale", "out_shift", "residual", "out_relu")
POINTWISE = BASE.but(kernel=(1, 1), padding=(0, 0, 0, 0))


def runs(case: Case) -> None:
    assert check_forward(case, "triton")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (3, 2)])
def test_kernels_and_dtypes(kernel: tuple[int, int], layout: str, dtype: torch.dtype) -> None:
    padding = (kernel[0] // 2, kernel[0] // 2, kernel[1] // 2, kernel[1] // 2)
    for stride in ((1, 1), (2, 1)):
        runs(BASE.but(kernel=kernel, padding=padding, stride=stride, layout=layout, dtype=dtype))


@pytest.mark.parametrize("kernel", [(1, 1), (3, 2)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, kernel: tuple[int, int]) -> None:
    runs(BASE.but(layout=layout, kernel=kernel, weight_layout="transposed"))


@pytest.mark.parametrize("out_list", LISTS)
@pytest.mark.parametrize("in_list", LISTS)
def test_lists(in_list: str, out_list: str) -> None:
    # Each kind of list meets both layouts, on either side.
    layout = ("contiguous", "channels_last")[(LISTS.index(in_list) + LISTS.index(out_list)) % 2]
    runs(POINTWISE.but(in_list=in_list, out_list=out_list, layout=layout, bias=out_list != "null"))


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_batches(batch: int) -> None:
    runs(BASE.but(batch=batch))
    runs(POINTWISE.but(batch=batch))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_uneven_padding_dilation_and_strides(layout: str) -> None:
    runs(BASE.but(padding=(2, 0, 1, 3), dilation=(2, 1), layout=layout))
    runs(BASE.but(padding=(0, 0, 0, 0), stride=(2, 3), layout=layout))
    runs(BASE.but(kernel=(5, 7), padding=(4, 4, 6, 6), size=(1, 3), in_channels=3, layout=layout))
    # Padding of a 1x1 kernel: results that meet no pixel at all.
    runs(POINTWISE.but(padding=(1, 2, 0, 1), stride=(2, 1), layout=layout))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", [(1, 1), (3, 2)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_everything_fused(layout: str, kernel: tuple[int, int], dtype: torch.dtype) -> None:
    case = BASE.but(layout=layout, kernel=kernel, dtype=dtype)
    for residual in ("contiguous", "channels_last"):
        assert check_fused(case, FLAGS, "triton", residual_layout=residual)


@pytest.mark.parametrize("flag", FLAGS)
def test_each_fused_part(flag: str) -> None:
    for case in (POINTWISE, POINTWISE.but(layout="channels_last"), BASE.but(bias=False)):
        assert check_fused(case, (flag,), "triton", vector_dtype=torch.float32)


@pytest.mark.parametrize("residual", LAYOUTS)
def test_residuals_of_every_layout(residual: str) -> None:
    for case in (POINTWISE, POINTWISE.but(layout="channels_last")):
        assert check_fused(case, ("residual", "out_relu"), "triton", residual_layout=residual)


def small(seed: int) -> Case:
    case = random_case(random.Random(seed))
    if case.dtype == torch.float64:
        case = case.but(dtype=torch.float32)
    least = [case.dilation[d] * (case.kernel[d] - 1) + 1 for d in (0, 1)]
    size = tuple(min(case.size[d], least[d] + 6) for d in (0, 1))
    return case.but(
        depthwise=False,
        size=size,
        in_channels=min(case.in_channels, 21),
        out_channels=min(case.out_channels, 19),
        batch=min(case.batch, 2),
    )


@pytest.mark.parametrize("seed", range(24))
def test_random_cases(seed: int) -> None:
    runs(small(seed))
    assert check_fused(small(seed + 100), random.Random(seed).sample(FLAGS, 3), "triton")

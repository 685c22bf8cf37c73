"""The gradients through the op, on every axis of its contract, against the loops of the reference."""

from __future__ import annotations

import random

import pytest
import torch

from bap_kernels.testing import LAYOUTS, LISTS, Case, check_backward, random_case

BASE = Case(in_channels=18, out_channels=20, size=(5, 6))
POINTWISE = BASE.but(kernel=(1, 1), padding=(0, 0, 0, 0))
GRAD_LAYOUTS = ("contiguous", "channels_last", "sliced", "expanded")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (3, 2)])
def test_kernels_and_dtypes(kernel: tuple[int, int], layout: str, dtype: torch.dtype) -> None:
    padding = (kernel[0] // 2, kernel[0] // 2, kernel[1] // 2, kernel[1] // 2)
    check_backward(BASE.but(kernel=kernel, padding=padding, layout=layout, dtype=dtype), "triton", layout)


@pytest.mark.parametrize("dilation", [(1, 1), (2, 1), (2, 3)])
@pytest.mark.parametrize("stride", [(1, 2), (2, 2), (2, 3), (4, 2)])
def test_parities(stride: tuple[int, int], dilation: tuple[int, int]) -> None:
    for kernel, padding in (((3, 3), (1, 1, 1, 1)), ((2, 4), (0, 3, 2, 1)), ((1, 1), (0, 0, 0, 0))):
        case = BASE.but(
            size=(6, 7),
            batch=1,
            in_channels=9,
            out_channels=17,
            kernel=kernel,
            padding=padding,
            stride=stride,
            dilation=dilation,
        )
        check_backward(case, "triton")


@pytest.mark.parametrize("out_list", LISTS)
@pytest.mark.parametrize("in_list", LISTS)
def test_lists(in_list: str, out_list: str) -> None:
    # Each kind of list meets both layouts, on either side.
    layout = ("contiguous", "channels_last")[(LISTS.index(in_list) + LISTS.index(out_list)) % 2]
    check_backward(POINTWISE.but(in_list=in_list, out_list=out_list, layout=layout), "triton", layout)


@pytest.mark.parametrize("grad_layout", GRAD_LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, grad_layout: str) -> None:
    case = BASE if (LAYOUTS.index(layout) + GRAD_LAYOUTS.index(grad_layout)) % 2 else POINTWISE
    check_backward(case.but(layout=layout, weight_layout="channels_last"), "triton", grad_layout)


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_batches(batch: int) -> None:
    check_backward(BASE.but(batch=batch, bias=False), "triton")


def test_results_do_not_vary() -> None:
    from bap_kernels.testing import make_tensors
    from bap_kernels.triton import ops

    sample = make_tensors(BASE.but(batch=4, size=(9, 9)))
    grad = torch.randn(sample.output_shape)
    arguments = (grad, *sample.args[:2], *sample.args[3:8], (True, True, True))
    first = ops.gathered_conv2d_backward(*arguments)
    for one, other in zip(first, ops.gathered_conv2d_backward(*arguments), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("seed", range(14))
def test_random_cases(seed: int) -> None:
    case = random_case(random.Random(seed + 500))
    least = [case.dilation[d] * (case.kernel[d] - 1) + 1 for d in (0, 1)]
    size = tuple(min(case.size[d], least[d] + 5) for d in (0, 1))
    small = case.but(
        dtype=torch.float32 if case.dtype == torch.float64 else case.dtype,
        **{"depthwise": False, "size": size, "batch": min(case.batch, 2)},
        **{"in_channels": min(case.in_channels, 18), "out_channels": min(case.out_channels, 17)},
    )
    check_backward(small, "triton", random.Random(seed).choice(GRAD_LAYOUTS))

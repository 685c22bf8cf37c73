"""The switched convolution and its gradients, the switch read on the device alone."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from bap_kernels import reference
from bap_kernels.testing import LISTS, Case, assert_close, random_case
from bap_kernels.testing_switched import (
    check_switched,
    check_switched_backward,
    expected_gradients,
    make_switched,
    poison_switched,
    run_switched,
)

BASE = Case(in_channels=20, out_channels=18, size=(5, 6))
POINTWISE = BASE.but(kernel=(1, 1), padding=(0, 0, 0, 0))


def check(case: Case, grad_layout: str = "contiguous", off_gradient: bool = True) -> None:
    assert check_switched(case, "triton")
    assert check_switched_backward(case, "triton", grad_layout, off_gradient, loops=False)


@pytest.mark.parametrize("off_gradient", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kind", LISTS)
def test_switches(kind: str, layout: str, off_gradient: bool) -> None:
    check(BASE.but(in_list=kind, layout=layout, bias=layout == "contiguous"), layout, off_gradient)
    check(POINTWISE.but(in_list=kind, layout=layout), layout, off_gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_strides_and_dtypes(dtype: torch.dtype) -> None:
    for stride, layout in itertools.product(((2, 2), (2, 1)), ("contiguous", "channels_last", "sliced")):
        check(BASE.but(stride=stride, layout=layout, dtype=dtype, dilation=(1, 2)), "contiguous")


@pytest.mark.parametrize("mask", list(itertools.product([False, True], repeat=4)))
def test_each_gradient_alone_and_together(mask: tuple[bool, ...]) -> None:
    import bap_kernels

    sample = make_switched(BASE)
    grad = torch.randn(sample.output_shape)
    expected = expected_gradients(sample, grad)
    with bap_kernels.use_backend("triton"):
        got = torch.ops.bap_kernels.switched_conv2d_backward(grad, *sample.backward_args, True, mask)
    for wanted, one, other in zip(mask, got, expected, strict=True):
        if wanted:
            assert_close(one, other, torch.float32, 9 * 9 * 20 * grad.numel())
        else:
            assert one.shape == (0,)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_channels_that_are_off_reach_nothing(layout: str, value: float) -> None:
    for case in (BASE.but(layout=layout), POINTWISE.but(layout=layout)):
        clean, sample = make_switched(case), poison_switched(make_switched(case), value)
        leaves = [t.requires_grad_() for t in sample.tensors]
        y = run_switched(sample, "triton", off_gradient=False)
        assert_close(y, reference.switched_conv2d(*clean.args), case.dtype, sample.depth)
        grad = torch.randn(y.shape)
        import bap_kernels

        with bap_kernels.use_backend("triton"):
            got = torch.autograd.grad(y, leaves, grad)
        for one, its in zip(got, expected_gradients(clean, grad, False), strict=True):
            assert_close(one, its, case.dtype, 9 * 9 * 18 * 60)


@pytest.mark.parametrize("seed", range(8))
def test_random_cases(seed: int) -> None:
    rng = random.Random(seed + 900)
    case = random_case(rng)
    least = [case.dilation[d] * (case.kernel[d] - 1) + 1 for d in (0, 1)]
    size = tuple(min(case.size[d], least[d] + 5) for d in (0, 1))
    small = case.but(
        dtype=torch.float32 if case.dtype == torch.float64 else case.dtype,
        **{"depthwise": False, "size": size, "batch": min(case.batch, 2)},
        **{"in_channels": min(case.in_channels, 18), "out_channels": min(case.out_channels, 17)},
    )
    check(small, off_gradient=rng.random() < 0.7)

"""The switched convolution on a CUDA device, against autograd of the masked dense convolution on the CPU."""

from __future__ import annotations

import random

import pytest
import torch

from bap_kernels import reference
from bap_kernels.testing import LAYOUTS, LISTS, Case, assert_close, random_case
from bap_kernels.testing_switched import (
    check_switched,
    check_switched_backward,
    expected_gradients,
    make_switched,
    poison_switched,
)

pytestmark = pytest.mark.gpu

op = torch.ops.bap_kernels.switched_conv2d
BASE = Case(in_channels=40, out_channels=36, size=(14, 15))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check(
    case: Case,
    grad_layout: str = "contiguous",
    off_gradient: bool = True,
    loops: bool = False,
    backend: str = "auto",
) -> None:
    check_switched(case, backend, "cuda")
    check_switched_backward(case, backend, grad_layout, off_gradient, "cuda", loops)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (3, 2)])
def test_kernels_and_layouts(kernel: tuple[int, int], layout: str, dtype: torch.dtype) -> None:
    padding = (kernel[0] // 2, kernel[0] // 2, kernel[1] // 2, kernel[1] // 2)
    for stride in ((1, 1), (2, 1)):
        check(BASE.but(kernel=kernel, padding=padding, stride=stride, layout=layout, dtype=dtype))


@pytest.mark.parametrize("off_gradient", [True, False])
@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("kind", LISTS)
def test_switches(kind: str, depthwise: bool, off_gradient: bool) -> None:
    for bias in (True, False):
        check(BASE.but(in_list=kind, depthwise=depthwise, bias=bias), off_gradient=off_gradient, loops=True)


@pytest.mark.parametrize("batch", [0, 1, 2, 33])
def test_batches(batch: int) -> None:
    check(BASE.but(batch=batch, padding=(2, 0, 1, 3), dilation=(2, 1)))


@pytest.mark.parametrize("grad_layout", ["contiguous", "channels_last", "sliced", "expanded"])
def test_layouts_of_the_result_gradient(grad_layout: str) -> None:
    for case in (BASE, BASE.but(layout="channels_last"), BASE.but(depthwise=True), BASE.but(dtype=torch.bfloat16)):
        check(case, grad_layout)


@pytest.mark.parametrize("chunk", range(4))
def test_random_cases(chunk: int) -> None:
    for seed in range(9000 + 50 * chunk, 9050 + 50 * chunk):
        rng = random.Random(seed)
        case = random_case(rng)
        try:
            check(case, off_gradient=rng.random() < 0.8)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {case}") from error


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_channels_that_are_off_reach_nothing(layout: str, value: float) -> None:
    case = BASE.but(layout=layout)
    clean, sample = make_switched(case), poison_switched(make_switched(case), value).to("cuda")
    leaves = [t.requires_grad_() for t in sample.tensors]
    y = op(*sample.args, False)
    assert_close(y, reference.switched_conv2d(*clean.args), case.dtype, sample.depth)
    grad = torch.randn(y.shape)
    got = torch.autograd.grad(y, leaves, grad.cuda())
    for one, its in zip(got, expected_gradients(clean, grad, False), strict=True):
        assert_close(one, its, case.dtype, 9 * 9 * 36 * 420)


def test_never_waits_for_the_device() -> None:
    sample = make_switched(BASE).to("cuda")
    leaves = [t.requires_grad_() for t in sample.tensors]
    grad = torch.randn(sample.output_shape, device="cuda")
    torch.autograd.grad(op(*sample.args), leaves, grad)
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(op(*sample.args), leaves, grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_obeys_the_users_dtype(dtype: torch.dtype) -> None:
    sample = make_switched(BASE).to("cuda")
    sample.switch.requires_grad_()
    with torch.autocast("cuda", dtype):
        y = op(*sample.args)
    assert y.dtype == dtype
    (grad,) = torch.autograd.grad(y.float().sum(), sample.switch)
    assert grad.dtype == torch.float32


@pytest.mark.parametrize("argument", ["weight", "bias", "switch"])
def test_other_device(argument: str) -> None:
    sample = make_switched(BASE).to("cuda")
    setattr(sample, argument, getattr(sample, argument).cpu())
    with pytest.raises(ValueError, match=rf"expected `{argument}` to be on the input's device cuda:0, got cpu"):
        op(*sample.args)

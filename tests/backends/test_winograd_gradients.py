"""Gradients of Winograd convolutions of the native kernels, on every instruction set of this machine."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import bap_kernels as bk
from bap_kernels import _C, reference
from bap_kernels.testing import Case, lay_out, make_tensors, unlisted
from bap_kernels.testing_switched import make_switched, run_switched
from tests.backends.test_winograd import BASE, LAYOUTS, assert_near, bound

pytestmark = [
    pytest.mark.skipif(bool(_C.unsupported_reason("native")), reason=str(_C.unsupported_reason("native"))),
    pytest.mark.usefixtures("isa", "nan_filled_empty"),
]

# Of the error, relative to the largest gradient; as docs/kernels/cpu.md states it.
WEIGHT_GRADIENT_BOUND = 4e-6


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("padding", [(1, 1, 1, 1), (0, 0, 0, 0), (2, 0, 1, 2)])
@pytest.mark.parametrize("lists", [("odd", "odd"), ("null", "null"), ("shuffled", "null"), ("null", "odd")])
def test_gradients_equal_loops(lists: tuple[str, str], padding: tuple[int, ...], layout: str, size: int) -> None:
    case = BASE.but(in_list=lists[0], out_list=lists[1], padding=padding, layout=layout)
    sample = make_tensors(case)
    grad = torch.randn(sample.output_shape)
    expected = reference.gathered_conv2d_backward(grad, *sample.args[:2], *sample.args[3:])
    leaves = [t.requires_grad_() for t in (sample.input, sample.weight, sample.bias)]
    with bk.use_backend("native"):
        y = torch.ops.bap_kernels.gathered_conv2d(*sample.args)
        actual = torch.autograd.grad(y, leaves, grad)
    assert_near(actual[0], expected[0], bound(size, sample.kept[1]))
    assert not actual[0][:, unlisted(sample.in_index, case.in_channels)].any()
    assert_near(actual[1], expected[1], WEIGHT_GRADIENT_BOUND)
    assert not actual[1][:, unlisted(sample.in_index, case.in_channels)].any()
    assert not actual[1][unlisted(sample.out_index, case.out_channels)].any()
    assert_near(actual[2], expected[2], 1e-5)
    _C.force_winograd(0)
    with bk.use_backend("native"):
        y = torch.ops.bap_kernels.gathered_conv2d(*sample.args)
        plain = torch.autograd.grad(y, leaves, grad)
    assert not torch.equal(actual[0], plain[0]), "this was the direct input gradient"
    assert not torch.equal(actual[1], plain[1]), "this was the direct weight gradient"


def weight_gradient(x: Tensor, weight: Tensor, grad: Tensor, padding: int = 1) -> Tensor:
    leaf = weight.detach().requires_grad_()
    with bk.use_backend("native"):
        return torch.autograd.grad(bk.gathered_conv2d(x, leaf, padding=padding), leaf, grad)[0]


def exact_weight_gradient(x: Tensor, weight: Tensor, grad: Tensor, padding: int = 1) -> Tensor:
    leaf = weight.double().detach().requires_grad_()
    y = torch.nn.functional.conv2d(x.double(), leaf, padding=padding)
    return torch.autograd.grad(y, leaf, grad.double())[0]


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 17, 33, 7, 7),
        (2, 130, 20, 5, 6),  # three groups of channels
        (2, 20, 130, 6, 5),
        (5, 16, 8, 33, 18),
        (2, 500, 24, 33, 32),  # two slabs of transforms
        (1, 8, 3, 1, 1),
    ],
)
def test_weight_gradient(shape: tuple[int, ...], relu: bool, size: int, isa: str) -> None:
    batch, C_in, C_out, height, width = shape
    if isa.endswith("_emulated") and C_in == 500:
        pytest.skip("slow; its arithmetic is that of the others")
    x, weight = torch.randn(batch, C_in, height, width), torch.randn(C_out, C_in, 3, 3)
    grad = torch.randn(batch, C_out, height, width)
    x = x.relu() if relu else x
    expected = exact_weight_gradient(x, weight, grad)
    results = [weight_gradient(lay_out(x, layout), weight, lay_out(grad, layout)) for layout in LAYOUTS]
    assert_near(results[0], expected, WEIGHT_GRADIENT_BOUND)
    assert torch.equal(*results), "layouts differ"
    crossed = weight_gradient(lay_out(x, LAYOUTS[0]), weight, lay_out(grad, LAYOUTS[1]))
    assert torch.equal(results[0], crossed)


def test_error_of_long_weight_gradients(size: int, isa: str) -> None:
    if isa.endswith("_emulated"):
        pytest.skip("slow; its arithmetic is that of the others")
    x, weight, grad = torch.randn(8, 16, 56, 56), torch.randn(16, 16, 3, 3), torch.randn(8, 16, 56, 56)
    assert_near(weight_gradient(x, weight, grad), exact_weight_gradient(x, weight, grad), WEIGHT_GRADIENT_BOUND)


@pytest.mark.parametrize("shape", [(2, 100, 70, 30, 31), (3, 40, 24, 7, 7)])
def test_threads_do_not_change_weight_gradients(shape: tuple[int, ...], size: int) -> None:
    batch, C_in, C_out, height, width = shape
    x, weight = torch.randn(batch, C_in, height, width), torch.randn(C_out, C_in, 3, 3)
    grad = torch.randn(batch, C_out, height, width)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 48):
            torch.set_num_threads(count)
            results.append(weight_gradient(x, weight, grad))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert torch.equal(results[0], result)


def test_nan_of_a_channel_reaches_its_weights_alone(size: int) -> None:
    x, weight, grad = torch.randn(2, 20, 9, 9), torch.randn(18, 20, 3, 3), torch.randn(2, 18, 9, 9)
    clean = weight_gradient(x, weight, grad)
    x[1, 3, 4, 4] = math.nan
    grad[0, 5, 2, 2] = math.inf
    result = weight_gradient(x, weight, grad)
    others = torch.ones(18, 20, dtype=torch.bool)
    others[:, 3] = False
    others[5] = False
    assert torch.equal(result[others], clean[others])
    assert result[0, 3].isnan().any()
    assert not result[5, 0].isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("off_gradient", [True, False])
def test_switched(off_gradient: bool, layout: str, size: int) -> None:
    sample = make_switched(BASE.but(batch=3, size=(21, 25), layout=layout))
    grad = torch.randn(sample.output_shape)
    grad[:, ::3] = 0  # filters that nothing reads
    expected = reference.switched_conv2d_backward(grad, *sample.backward_args, off_gradient)
    leaves = [t.requires_grad_() for t in sample.tensors]
    y = run_switched(sample, "native", off_gradient)
    assert_near(y.detach(), reference.switched_conv2d(*sample.args), bound(size, 37))
    with bk.use_backend("native"):
        actual = torch.autograd.grad(y, leaves, grad)
    assert_near(actual[0], expected[0], bound(size, 41))
    for got, want in zip(actual[1:], expected[1:], strict=True):
        assert_near(got, want, 2e-5)


def test_second_derivatives_are_those_of_pytorch(size: int) -> None:
    sample = make_tensors(Case(1, 5, 4, (6, 5), dtype=torch.float64, in_list="odd", out_list="odd"))
    leaves = tuple(t.requires_grad_() for t in (sample.input, sample.weight))

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return bk.gathered_conv2d(x, weight, None, sample.in_index, sample.out_index, padding=1)

    with bk.use_backend("auto"):
        assert torch.autograd.gradcheck(function, leaves)
        assert torch.autograd.gradgradcheck(function, leaves)

"""The switched convolution and its gradients: one axis at a time around a base case, on every backend."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import bap_kernels as bk
from bap_kernels import reference
from bap_kernels.testing import LAYOUTS, LISTS, Case, assert_close, lay_out
from bap_kernels.testing_switched import (
    check_switched,
    check_switched_backward,
    expected_gradients,
    make_switched,
    run_switched,
)

pytestmark = pytest.mark.usefixtures("nan_filled_empty")

op = torch.ops.bap_kernels.switched_conv2d
backward_op = torch.ops.bap_kernels.switched_conv2d_backward
BASE = Case(in_channels=11, out_channels=7, size=(8, 9))
NATIVE_DTYPES = (torch.float32, torch.bfloat16)
GRAD_LAYOUTS = ("contiguous", "channels_last", "sliced", "sliced_last", "expanded", "transposed")


def same(kernel: tuple[int, int]) -> tuple[int, int, int, int]:
    return (kernel[0] // 2, kernel[0] // 2, kernel[1] // 2, kernel[1] // 2)


def axes() -> dict[str, Case]:
    cases = {"base": BASE, "no_bias": BASE.but(bias=False)}
    for kernel in ((1, 1), (3, 2), (1, 3), (5, 5)):
        cases[f"kernel_{kernel[0]}x{kernel[1]}"] = BASE.but(kernel=kernel, padding=same(kernel))
        cases[f"kernel_{kernel[0]}x{kernel[1]}_last"] = BASE.but(
            kernel=kernel, padding=same(kernel), layout="channels_last"
        )
    for stride in ((2, 1), (2, 2), (1, 3)):
        cases[f"stride_{stride[0]}x{stride[1]}"] = BASE.but(stride=stride)
        cases[f"stride_{stride[0]}x{stride[1]}_kernel_1x1"] = BASE.but(stride=stride, kernel=(1, 1), padding=(0,) * 4)
    # The last rows and columns are read by no output pixel.
    cases["stride_leaves_a_rest"] = BASE.but(size=(9, 10), stride=(3, 4), padding=(0,) * 4)
    for padding in ((0, 0, 0, 0), (1, 1, 0, 0), (2, 0, 0, 3), (4, 5, 3, 4)):
        cases["padding_" + "".join(map(str, padding))] = BASE.but(padding=padding)
    for dilation in ((2, 1), (1, 3)):
        cases[f"dilation_{dilation[0]}x{dilation[1]}"] = BASE.but(dilation=dilation, padding=(2, 1, 0, 3))
    cases["dilated_strided"] = BASE.but(dilation=(2, 3), stride=(2, 1), kernel=(3, 2), padding=(1, 0, 2, 2))
    for batch in (0, 1, 33):
        cases[f"batch_{batch}"] = BASE.but(batch=batch, size=(4, 5))
    for kind in LISTS:
        cases[f"on_{kind}"] = BASE.but(in_list=kind)
        cases[f"on_{kind}_no_bias"] = BASE.but(in_list=kind, bias=False)
        cases[f"depthwise_{kind}"] = BASE.but(depthwise=True, in_list=kind, stride=(2, 1))
    cases["depthwise_no_bias"] = BASE.but(depthwise=True, bias=False, layout="channels_last")
    cases["depthwise_batch_0"] = BASE.but(depthwise=True, batch=0)
    for layout in LAYOUTS:
        cases[f"layout_{layout}"] = BASE.but(layout=layout)
        cases[f"weight_{layout}"] = BASE.but(weight_layout=layout)
        cases[f"depthwise_{layout}"] = BASE.but(layout=layout, depthwise=True, padding=(1, 0, 0, 1))
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        for layout in ("contiguous", "channels_last"):
            cases[f"{dtype}_{layout}"[6:]] = BASE.but(dtype=dtype, layout=layout)
            cases[f"{dtype}_{layout}_1x1"[6:]] = BASE.but(dtype=dtype, layout=layout, kernel=(1, 1), padding=(0,) * 4)
    cases["one_channel_each"] = BASE.but(in_channels=1, out_channels=1)
    cases["one_channel_last"] = BASE.but(in_channels=1, layout="channels_last", in_list="null")
    cases["one_pixel_input"] = BASE.but(size=(1, 1))
    cases["many_channels"] = BASE.but(in_channels=70, out_channels=65)
    return cases


AXES = axes()


@pytest.mark.parametrize("name", AXES)
def test_forward_equals_reference_along_each_axis(name: str, backend: str) -> None:
    ran = check_switched(AXES[name], backend)
    assert ran or AXES[name].depthwise or AXES[name].dtype not in NATIVE_DTYPES


@pytest.mark.parametrize("off_gradient", [True, False])
@pytest.mark.parametrize("name", AXES)
def test_gradients_equal_reference_along_each_axis(name: str, off_gradient: bool, backend: str) -> None:
    case = AXES[name]
    ran = check_switched_backward(case, backend, off_gradient=off_gradient)
    assert ran or case.depthwise or case.dtype not in NATIVE_DTYPES


@pytest.mark.parametrize("grad_layout", GRAD_LAYOUTS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "expanded", "sliced"])
def test_gradients_are_right_for_each_grad_output_layout(layout: str, grad_layout: str) -> None:
    for case in (BASE, BASE.but(depthwise=True), BASE.but(kernel=(1, 1), padding=(0,) * 4), BASE.but(in_list="null")):
        assert check_switched_backward(case.but(layout=layout), grad_layout=grad_layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_switch_gradient_has_dtype_of_switch(dtype: torch.dtype) -> None:
    sample = make_switched(BASE.but(dtype=torch.float64), dtype)
    sample.switch.requires_grad_()
    y = op(*sample.args)
    assert y.dtype == torch.float64
    grad = torch.randn_like(y)
    (result,) = torch.autograd.grad(y, sample.switch, grad)
    assert_close(result, expected_gradients(sample, grad)[-1], dtype, 1000)


@pytest.mark.parametrize("kind", ["odd", "zero", "one", "all"])
@pytest.mark.parametrize("depthwise", [False, True])
def test_switch_gradient_equals_product_of_weight_and_its_gradient(depthwise: bool, kind: str) -> None:
    # <x_c, dX_c> = <W_c, dW_c>, both of the convolution on the unmasked input.
    sample = make_switched(BASE.but(dtype=torch.float64, depthwise=depthwise, in_list=kind), torch.float64)
    grad = torch.randn(sample.output_shape, dtype=torch.float64)
    x, w = sample.input.detach().requires_grad_(), sample.weight.detach().requires_grad_()
    dx, dw = torch.autograd.grad(F.conv2d(x, w, padding=1, groups=sample.groups), (x, w), grad)
    sample.switch.requires_grad_()
    (result,) = torch.autograd.grad(op(*sample.args), sample.switch, grad)
    by_weight = (sample.weight * dw).sum((1, 2, 3) if depthwise else (0, 2, 3))
    torch.testing.assert_close(result, (sample.input * dx).sum((0, 2, 3)))
    torch.testing.assert_close(result, by_weight)
    assert result.abs().min() > 0


@pytest.mark.parametrize("kind", ["odd", "null", "zero"])
def test_all_on_equals_dense_convolution_and_all_off_equals_bias(kind: str, backend: str) -> None:
    sample = make_switched(BASE.but(in_list=kind))
    y = run_switched(sample, backend)
    dense = F.conv2d(sample.input, sample.weight, sample.bias, padding=1)
    if kind == "null":
        assert y.stride() == dense.stride()
        assert_close(y, dense.double(), torch.float32, sample.depth)
    elif kind == "zero":
        assert torch.equal(y, sample.bias.view(1, -1, 1, 1).expand_as(dense))
    else:
        assert not torch.allclose(y, dense, atol=0.1)


def test_zero_input_channels_give_bias() -> None:
    x, switch = torch.zeros(2, 0, 5, 6, requires_grad=True), torch.zeros(0, requires_grad=True)
    w, b = torch.zeros(3, 0, 3, 3, requires_grad=True), torch.randn(3, requires_grad=True)
    y = bk.switched_conv2d(x, w, b, switch)
    assert torch.equal(y, b.view(1, 3, 1, 1).expand(2, 3, 3, 4))
    y.sum().backward()
    assert [t.grad.shape for t in (x, w, switch)] == [x.shape, w.shape, (0,)]
    assert b.grad.tolist() == [24.0] * 3


def test_zero_filters_give_empty_result() -> None:
    x, switch = torch.randn(2, 3, 5, 6, requires_grad=True), torch.tensor([1.0, 0, 1], requires_grad=True)
    y = bk.switched_conv2d(x, torch.zeros(0, 3, 3, 3), None, switch)
    assert y.shape == (2, 0, 3, 4)
    y.sum().backward()
    assert not x.grad.any()
    assert switch.grad.tolist() == [0, 0, 0]


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"padding": "same", "dilation": (3, 1)}], ids=str)
@pytest.mark.parametrize("kernel", [(3, 3), (4, 3), (3, 2)], ids=str)
def test_options_equal_those_of_conv2d(kernel: tuple[int, int], options: dict) -> None:
    x, w, b = torch.randn(2, 4, 11, 10), torch.randn(5, 4, *kernel), torch.randn(5)
    switch = torch.tensor([1.0, 0, 1, 1])
    expected = F.conv2d(x * switch.view(4, 1, 1), w, b, **options)
    torch.testing.assert_close(bk.switched_conv2d(x, w, b, switch, **options), expected)


def test_positional_arguments_have_documented_order() -> None:
    x, w, b, switch = torch.randn(2, 4, 9, 8), torch.randn(4, 1, 3, 3), torch.randn(4), torch.tensor([1.0, 0, 0, 1])
    switch.requires_grad_()
    actual = bk.switched_conv2d(x, w, b, switch, (2, 1), (1, 0), (1, 2), 4, False)
    torch.testing.assert_close(actual, F.conv2d(x * switch.view(4, 1, 1), w, b, (2, 1), (1, 0), (1, 2), 4))
    (grad,) = torch.autograd.grad(actual.square().sum(), switch)
    assert grad.ne(0).tolist() == [True, False, False, True]


def test_strided_switch_is_supported(backend: str) -> None:
    sample = make_switched(BASE)
    expected = run_switched(sample, backend)
    sample.switch = torch.stack((sample.switch, torch.full_like(sample.switch, 7)), 1)[:, 0]
    assert sample.switch.stride() != (1,)
    assert torch.equal(run_switched(sample, backend), expected)


def test_minus_zero_is_off() -> None:
    sample = make_switched(BASE)
    expected = op(*sample.args)
    sample.switch = torch.where(sample.switch == 0, -0.0, 1.0)
    assert sample.switch.signbit().any()
    assert torch.equal(op(*sample.args), expected)


def test_inputs_are_not_modified(backend: str) -> None:
    for layout in LAYOUTS:
        sample = make_switched(BASE.but(layout=layout))
        before = [t.clone() for t in sample.tensors]
        leaves = [t.requires_grad_() for t in sample.tensors]
        y = run_switched(sample, backend)
        grad = lay_out(torch.randn(y.shape), "sliced")
        grad_before = grad.clone()
        torch.autograd.grad(y, leaves, grad)
        assert all(torch.equal(a, b) for a, b in zip((*before, grad_before), (*sample.tensors, grad), strict=True))


def test_repeated_results_are_bit_equal() -> None:
    sample = make_switched(BASE.but(size=(20, 21)))
    grad = torch.randn(sample.output_shape)
    first = backward_op(grad, *sample.backward_args, True, [True] * 4)
    for _ in range(3):
        again = backward_op(grad, *sample.backward_args, True, [True] * 4)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_reference_equals_worked_example() -> None:
    x, w = torch.tensor([2.0, 3.0]).view(1, 2, 1, 1), torch.tensor([5.0, 7.0]).view(1, 2, 1, 1)
    args = (x, w, torch.tensor([1.0]), torch.tensor([1.0, 0.0]), (1, 1), (0,) * 4, (1, 1), 1)
    assert reference.switched_conv2d(*args).item() == reference.conv_on_masked(*args).item() == 11
    dx, dw, db, ds = reference.switched_conv2d_backward(torch.full((1, 1, 1, 1), 10.0), *args[:2], *args[3:])
    assert (dx.flatten().tolist(), dw.flatten().tolist(), db.tolist()) == ([50, 0], [20, 0], [10])
    assert ds.tolist() == [100, 210]
    ds = reference.switched_conv2d_backward(torch.ones(1, 1, 1, 1), *args[:2], *args[3:], off_gradient=False)[3]
    assert ds.tolist() == [10, 0]

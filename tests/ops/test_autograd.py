"""Gradients of the gathered convolution: against loops, autograd and finite differences."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
import torch.nn.functional as F

from bap_kernels import _C, reference
from bap_kernels.testing import LISTS, Case, assert_close, check_backward, lay_out, make_tensors, random_case

pytestmark = pytest.mark.usefixtures("nan_filled_empty")

op = torch.ops.bap_kernels.gathered_conv2d
BASE = Case(in_channels=9, out_channels=7, size=(8, 9))
GRAD_LAYOUTS = ("contiguous", "channels_last", "sliced", "sliced_last", "expanded", "transposed")


def axes() -> dict[str, Case]:
    cases = {"base": BASE, "no_bias": BASE.but(bias=False), "strided": BASE.but(stride=(2, 1), kernel=(3, 2))}
    cases["dilated"] = BASE.but(dilation=(2, 1), padding=(2, 1, 0, 3))
    cases["kernel_1x1"] = BASE.but(kernel=(1, 1), padding=(0, 0, 0, 0))
    cases["kernel_1x1_strided"] = BASE.but(kernel=(1, 1), padding=(0, 0, 0, 0), stride=(2, 2))
    cases["kernel_5x5"] = BASE.but(kernel=(5, 5), padding=(2, 2, 2, 2))
    # The last rows and columns are read by no output pixel.
    cases["stride_leaves_a_rest"] = BASE.but(size=(9, 10), stride=(3, 4), padding=(0, 0, 0, 0))
    for kind in LISTS:
        cases[f"in_{kind}"] = BASE.but(in_list=kind)
        cases[f"out_{kind}"] = BASE.but(out_list=kind)
        cases[f"both_{kind}"] = BASE.but(in_list=kind, out_list=kind)
        cases[f"depthwise_{kind}"] = BASE.but(depthwise=True, in_list=kind, stride=(2, 1))
    for batch in (0, 1, 33):
        cases[f"batch_{batch}"] = BASE.but(batch=batch, size=(4, 5))
    for layout in ("channels_last", "sliced", "sliced_last", "expanded", "transposed"):
        cases[f"layout_{layout}"] = BASE.but(layout=layout)
        cases[f"weight_{layout}"] = BASE.but(weight_layout=layout)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        cases[f"{dtype}"[6:]] = BASE.but(dtype=dtype)
        cases[f"{dtype}_channels_last"[6:]] = BASE.but(dtype=dtype, layout="channels_last")
    return cases


AXES = axes()


@pytest.mark.parametrize("name", AXES)
@pytest.mark.parametrize("backend", ["aten", "auto"])
def test_gradients_equal_reference_along_each_axis(name: str, backend: str) -> None:
    check_backward(AXES[name], backend)


@pytest.mark.parametrize("grad_layout", GRAD_LAYOUTS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradients_are_right_for_each_grad_output_layout(layout: str, grad_layout: str) -> None:
    check_backward(BASE.but(layout=layout), grad_layout=grad_layout)
    check_backward(BASE.but(layout=layout, depthwise=True), grad_layout=grad_layout)


@pytest.mark.parametrize("chunk", range(12))
@pytest.mark.parametrize("backend", ["aten", "auto"])
def test_gradients_equal_reference_on_random_cases(chunk: int, backend: str) -> None:
    # "auto" uses the native kernels wherever they can run.
    for seed in range(2000 + 25 * chunk, 2025 + 25 * chunk, 2 if backend == "aten" else 1):
        rng = random.Random(seed)
        case, grad_layout = random_case(rng), rng.choice(GRAD_LAYOUTS)
        try:
            check_backward(case, backend, grad_layout)
        except Exception as error:
            raise AssertionError(f"seed {seed}, grad_output {grad_layout}, {backend}: {case}") from error


@pytest.mark.skipif(
    _C.unsupported_reason("native") is not None, reason=f"backend native: {_C.unsupported_reason('native')}"
)
def test_native_forward_has_gradients() -> None:
    for layout in ("contiguous", "channels_last"):
        check_backward(BASE.but(layout=layout), "native")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)])
def test_gradients_equal_masked_dense_convolution(kernel: tuple[int, int], layout: str) -> None:
    pad = kernel[0] // 2
    case = BASE.but(kernel=kernel, padding=(pad,) * 4, layout=layout, dtype=torch.float64)
    sample = make_tensors(case)
    leaves = [t.requires_grad_() for t in (sample.input, sample.weight, sample.bias)]
    mask = torch.zeros(case.in_channels, 1, 1, dtype=torch.float64)
    mask[sample.in_index] = 1
    masked = F.conv2d(sample.input * mask, sample.weight, sample.bias, padding=pad)[:, sample.out_index]
    y = op(*sample.args)
    grad = torch.randn_like(y)
    for result, expected in zip(
        torch.autograd.grad(y, leaves, grad), torch.autograd.grad(masked, leaves, grad), strict=True
    ):
        assert_close(result, expected, torch.float64, 200)


@pytest.mark.parametrize(
    "case",
    [
        Case(2, 4, 3, (4, 5), dtype=torch.float64),
        Case(1, 5, 4, (5, 4), kernel=(3, 2), stride=(2, 1), padding=(1, 0, 2, 1), dtype=torch.float64),
        Case(1, 4, 3, (5, 5), in_list="null", out_list="null", dilation=(2, 1), dtype=torch.float64),
        Case(1, 4, 3, (4, 4), in_list="shuffled", out_list="shuffled", layout="channels_last", dtype=torch.float64),
        Case(2, 5, 5, (4, 5), depthwise=True, dtype=torch.float64),
        Case(1, 4, 3, (3, 3), in_list="zero", dtype=torch.float64),
    ],
)
def test_gradcheck(case: Case) -> None:
    sample = make_tensors(case)
    leaves = tuple(t.contiguous().requires_grad_() for t in (sample.input, sample.weight, sample.bias))
    assert torch.autograd.gradcheck(lambda *tensors: op(*tensors, *sample.args[3:]), leaves)
    for k in range(3):
        only = [t.detach().requires_grad_(i == k) for i, t in enumerate(leaves)]
        assert torch.autograd.gradcheck(lambda *tensors: op(*tensors, *sample.args[3:]), only)


@pytest.mark.parametrize("mask", list(itertools.product([False, True], repeat=3)))
def test_backward_computes_requested_gradients_only(mask: tuple[bool, bool, bool]) -> None:
    for case in (BASE, BASE.but(depthwise=True), BASE.but(in_list="zero"), BASE.but(out_list="zero")):
        sample = make_tensors(case)
        leaves = [t.requires_grad_(m) for t, m in zip((sample.input, sample.weight, sample.bias), mask, strict=True)]
        y = op(*sample.args)
        assert y.requires_grad == any(mask)
        grad = torch.randn_like(y)
        expected = reference.gathered_conv2d_backward(grad, sample.input, sample.weight, *sample.args[3:])
        if any(mask):
            y.backward(grad)
        direct = torch.ops.bap_kernels.gathered_conv2d_backward(
            grad, sample.input.detach(), sample.weight.detach(), *sample.args[3:], list(mask)
        )
        for leaf, exact, result, needed in zip(leaves, expected, direct, mask, strict=True):
            assert (leaf.grad is not None) == needed
            if needed:
                assert_close(leaf.grad, exact, case.dtype, 200)
                assert torch.equal(result, leaf.grad)
            else:
                assert result.shape == (0,)


def test_gradients_accumulate_and_mix_with_other_ops() -> None:
    sample = make_tensors(BASE.but(dtype=torch.float64))
    leaves = [t.requires_grad_() for t in (sample.input, sample.weight, sample.bias)]
    x = F.silu(sample.input)
    ours = (op(x, *sample.args[1:]).relu() * 3 + op(x, *sample.args[1:]).square()).sum()
    pytorch = reference.conv_on_selected(F.silu(sample.input), *sample.args[1:])
    pytorch = (pytorch.relu() * 3 + pytorch.square()).sum()
    for result, expected in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(pytorch, leaves), strict=True):
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradients_have_layout_of_their_tensor(layout: str) -> None:
    sample = make_tensors(BASE.but(layout=layout, weight_layout=layout))
    for leaf in (sample.input, sample.weight):
        leaf.requires_grad_()
    y = op(*sample.args)
    result = torch.autograd.grad(y, (sample.input, sample.weight), torch.ones_like(y))
    assert result[0].stride() == sample.input.stride()
    assert result[1].stride() == sample.weight.stride()


def test_inference_has_no_graph() -> None:
    sample = make_tensors(BASE)
    sample.weight.requires_grad_()
    with torch.no_grad():
        assert op(*sample.args).grad_fn is None
    with torch.inference_mode():
        y = op(*sample.args)
    assert y.is_inference()
    assert_close(y.clone(), reference.gathered_conv2d(*sample.args), torch.float32, sample.depth)


def test_backward_after_in_place_change_raises() -> None:
    sample = make_tensors(BASE)
    sample.weight.requires_grad_()
    y = op(*sample.args)
    sample.input.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_expanded_grad_output_is_supported() -> None:
    sample = make_tensors(BASE)
    sample.input.requires_grad_()
    y = op(*sample.args)
    (result,) = torch.autograd.grad(y.sum(), sample.input)
    grad = lay_out(torch.ones(y.shape), "contiguous")
    expected = reference.gathered_conv2d_backward(grad, *sample.args[:2], *sample.args[3:])[0]
    assert_close(result, expected, torch.float32, 9 * sample.kept[1])

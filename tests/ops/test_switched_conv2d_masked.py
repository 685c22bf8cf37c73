"""The GPU path, which does not read the switch on the host, run on a CPU: values, gradients, poison, metadata."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch

from bap_kernels import reference
from bap_kernels.testing import LAYOUTS, LISTS, Case, assert_close, lay_out, random_case
from bap_kernels.testing_switched import assert_gradients, expected_gradients, make_switched, poison_switched

pytestmark = pytest.mark.usefixtures("nan_filled_empty")

op = torch.ops.bap_kernels._switched_conv2d_masked
backward_op = torch.ops.bap_kernels._switched_conv2d_masked_backward
BASE = Case(in_channels=9, out_channels=7, size=(8, 9))


def check(case: Case, grad_layout: str = "contiguous", off_gradient: bool = True) -> None:
    sample = make_switched(case)
    y = op(*sample.args)
    assert_close(y, reference.conv_on_masked(*sample.args), case.dtype, sample.depth)
    grad = lay_out(torch.randn(y.shape).to(case.dtype), grad_layout)
    expected = expected_gradients(sample, grad, off_gradient)
    for mask in ((True,) * 4, (True, False, True, True), (False, True, True, True), (False, False, True, True)):
        result = backward_op(grad, *sample.backward_args, off_gradient, list(mask))
        for there, here in zip(
            backward_op(grad.to("meta"), *sample.to("meta").backward_args, off_gradient, list(mask)),
            result,
            strict=True,
        ):
            assert (there.shape, there.dtype) == (here.shape, here.dtype)
            reaching = [dim for dim, size in enumerate(here.shape) if size > 1 and here.numel() > 0]
            assert [there.stride(dim) for dim in reaching] == [here.stride(dim) for dim in reaching]
        # A gradient that was not requested has the shape (0,).
        assert [t.shape == (0,) for t in result[:2]] == [not m for m in mask[:2]]
        filled = [t if m else zero for t, m, zero in zip(result, mask, zeros_of(sample, case.dtype), strict=True)]
        expected_grads = list(expected) if case.bias else [*expected[:2], grad.double().sum((0, 2, 3)), expected[2]]
        for k, needed in enumerate(mask):
            if not needed:
                expected_grads[k] = torch.zeros_like(expected_grads[k])
        keep = [0, 1, 2, 3] if case.bias else [0, 1, 3]
        assert_gradients(sample, tuple(filled[k] for k in keep), tuple(expected_grads[k] for k in keep))


def zeros_of(sample, dtype: torch.dtype) -> list[torch.Tensor]:
    bias = torch.zeros(sample.weight.shape[0], dtype=dtype)
    return [torch.zeros_like(t) for t in (sample.input, sample.weight, bias, sample.switch)]


@pytest.mark.parametrize("off_gradient", [True, False])
@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("kind", LISTS)
def test_masked_equals_reference_for_each_kind_of_switch(kind: str, depthwise: bool, off_gradient: bool) -> None:
    for case in (BASE, BASE.but(bias=False, layout="channels_last"), BASE.but(batch=0), BASE.but(stride=(2, 1))):
        check(case.but(in_list=kind, depthwise=depthwise), off_gradient=off_gradient)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_masked_equals_reference_for_each_layout(layout: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for grad_layout in ("contiguous", "channels_last", "sliced", "expanded"):
            check(BASE.but(layout=layout, weight_layout=layout, dtype=dtype), grad_layout)


@pytest.mark.parametrize("chunk", range(4))
def test_masked_equals_reference_on_random_cases(chunk: int) -> None:
    for seed in range(9800 + 25 * chunk, 9825 + 25 * chunk):
        rng = random.Random(seed)
        case = random_case(rng).but(dtype=rng.choice((torch.float32, torch.bfloat16)))
        try:
            check(case, off_gradient=rng.random() < 0.7)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {case}") from error


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_nan_in_off_channels_is_ignored(layout: str, depthwise: bool, value: float) -> None:
    case = BASE.but(layout=layout, depthwise=depthwise)
    clean, sample = make_switched(case), poison_switched(make_switched(case), value)
    y = op(*sample.args)
    assert_close(y, reference.switched_conv2d(*clean.args), case.dtype, sample.depth)
    grad = torch.randn(y.shape)
    for off_gradient, of_input, of_weight in itertools.product((True, False), repeat=3):
        result = backward_op(grad, *sample.backward_args, off_gradient, [of_input, of_weight, True, True])
        expected = expected_gradients(clean, grad, off_gradient)
        off = sample.off
        for k, needed in enumerate((of_input, of_weight, True)):
            if needed:
                assert_close(result[k], expected[k], case.dtype, 9 * 9 * 7 * 8)
        assert_close(result[3][~off], expected[3][~off], torch.float32, 9 * 9 * 7 * 144)
        assert not (result[3][off].isfinite().any() if off_gradient else result[3][off].any())


def test_nan_in_grad_output_does_not_reach_off_channels() -> None:
    sample = make_switched(BASE)
    grad = torch.full(sample.output_shape, math.nan)
    grad_input, grad_weight, _, _ = backward_op(grad, *sample.backward_args, True, [True] * 4)
    off = sample.off
    assert not grad_input[:, off].any()
    assert not grad_weight[:, off].any()
    assert grad_input[:, ~off].isnan().all()

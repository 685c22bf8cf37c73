"""Every wrong argument of the switched convolution raises, and the message names argument, rule and value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

import bap_kernels as bk
from bap_kernels import _C
from bap_kernels.testing import Case
from bap_kernels.testing_switched import SwitchedSample, make_switched, run_switched

ops = torch.ops.bap_kernels
CASE = Case(in_channels=6, out_channels=5, size=(7, 8))


@dataclass(frozen=True)
class Wrong:
    """A broken argument: what it raises, and what its message holds."""

    argument: str
    value: object
    error: type[Exception]
    rule: str
    got: str
    # Whether it shows without reading data, so that Meta raises as well.
    on_meta: bool = True
    # Whether the backward, which has no bias, raises as well.
    in_backward: bool = True


def f32(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


def switch(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


WRONG = {
    "input_3d": Wrong("input", f32(6, 7, 8), ValueError, "(N, C_in, H, W)", "3 dimensions"),
    "input_integer": Wrong("input", f32(2, 6, 7, 8).long(), TypeError, "float32", "Long"),
    "weight_3d": Wrong("weight", f32(5, 6, 3), ValueError, "(C_out, C_in / groups, kH, kW)", "3 dimensions"),
    "weight_dtype": Wrong("weight", f32(5, 6, 3, 3).double(), TypeError, "input's dtype", "Double"),
    "weight_channels": Wrong("weight", f32(5, 4, 3, 3), ValueError, "C_in=6", "4"),
    "weight_empty_kernel": Wrong("weight", f32(5, 6, 0, 3), ValueError, "at least 1 x 1", "0 x 3"),
    "bias_dtype": Wrong("bias", f32(5).bfloat16(), TypeError, "input's dtype", "BFloat16", in_backward=False),
    "bias_length": Wrong("bias", f32(4), ValueError, "(5,)", "[4]", in_backward=False),
    "switch_bool": Wrong("switch", f32(6).bool(), TypeError, "float32", "Bool"),
    "switch_double": Wrong("switch", f32(6).double(), TypeError, "float64 as the input is", "Double"),
    "switch_half": Wrong("switch", f32(6).half(), TypeError, "float32", "Half"),
    "switch_short": Wrong("switch", f32(5), ValueError, "(C_in,) = (6,)", "[5]"),
    "switch_long": Wrong("switch", f32(7), ValueError, "(C_in,) = (6,)", "[7]"),
    "switch_2d": Wrong("switch", f32(6, 1), ValueError, "(C_in,) = (6,)", "[6, 1]"),
    "switch_0d": Wrong("switch", f32(), ValueError, "(C_in,) = (6,)", "[]"),
    "switch_half_on": Wrong(
        "switch", switch(1, 0, 1, 0.5, 1, 2), ValueError, "zeros and ones", "0.5 for channel 3", on_meta=False
    ),
    "switch_negative": Wrong(
        "switch", switch(0, 0, 1, 0, 0, -1), ValueError, "zeros and ones", "-1 for channel 5", on_meta=False
    ),
    "switch_nan": Wrong(
        "switch", switch(float("nan"), 0, 1, 0, 1, 1), ValueError, "zeros and ones", "nan for channel 0", on_meta=False
    ),
    "switch_inf": Wrong(
        "switch", switch(1, float("inf"), 1, 0, 1, 1), ValueError, "zeros and ones", "inf for channel 1", on_meta=False
    ),
    # One less its last bit: what a straight-through sum without brackets makes of a one.
    "switch_rounded": Wrong(
        "switch", switch(1, 1 - 2**-24, 1, 0, 1, 1), ValueError, "zeros and ones", "0.99999994", on_meta=False
    ),
    "stride_zero": Wrong("stride", (1, 0), ValueError, "at least 1", "[1, 0]"),
    "stride_length": Wrong("stride", (1, 1, 1), ValueError, "2 entries", "got 3"),
    "padding_negative": Wrong("padding", (0, 0, -1, 0), ValueError, "at least 0", "[0, 0, -1, 0]"),
    "padding_length": Wrong("padding", (1, 1), ValueError, "4 entries", "got 2"),
    "dilation_zero": Wrong("dilation", (0, 1), ValueError, "at least 1", "[0, 1]"),
    "kernel_larger_than_input": Wrong("input", f32(2, 6, 1, 0), ValueError, "dilated kernel", "1 x 0"),
    "groups_zero": Wrong("groups", 0, ValueError, "at least 1", "got 0"),
    "groups_unsupported": Wrong("groups", 2, NotImplementedError, "depthwise", "groups=2"),
    "groups_not_depthwise": Wrong("groups", 6, NotImplementedError, "depthwise", "groups=6"),
}


def sample_with(wrong: Wrong) -> SwitchedSample:
    sample = make_switched(CASE)
    setattr(sample, wrong.argument, wrong.value)
    return sample


def backward(sample: SwitchedSample) -> object:
    grad = torch.zeros(2, sample.weight.shape[0], 7, 8, device=sample.input.device)
    return ops.switched_conv2d_backward(grad, *sample.backward_args, True, [True] * 4)


CALLS: dict[str, Callable[[SwitchedSample], object]] = {
    "switched_conv2d": lambda s: ops.switched_conv2d(*s.args),
    "switched_conv2d_backward": backward,
}


def assert_message(error: Exception, op: str, argument: str, rule: str, got: str) -> None:
    # torch may put its C++ stack after the first line.
    line = str(error).splitlines()[0]
    assert line.startswith(f"{op}(): expected `{argument}`"), line
    assert rule in line, line
    assert got in line.split(", got ", 1)[1], line


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_wrong_argument(name: str, op: str, device: str) -> None:
    wrong = WRONG[name]
    if (device == "meta" and not wrong.on_meta) or (op == "switched_conv2d_backward" and not wrong.in_backward):
        return
    sample = sample_with(wrong).to(device)
    with pytest.raises(wrong.error) as caught:
        CALLS[op](sample)
    assert_message(caught.value, op, wrong.argument, wrong.rule, wrong.got.removeprefix("got "))


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("argument", ["weight", "bias", "switch"])
def test_other_device(argument: str, op: str) -> None:
    if argument == "bias" and op == "switched_conv2d_backward":
        return
    sample = make_switched(CASE)
    setattr(sample, argument, getattr(sample, argument).to("meta"))
    with pytest.raises(ValueError) as caught:
        CALLS[op](sample)
    assert_message(caught.value, op, argument, "input's device", "meta")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_switch_is_not_optional(device: str) -> None:
    sample = make_switched(CASE).to(device)
    with pytest.raises(TypeError, match=r"switched_conv2d\(\): expected `switch` to be a tensor, got None\. Hint"):
        bk.switched_conv2d(*sample.args[:3], None)


@pytest.mark.parametrize("value", [0.5, 2.0, -1.0, torch.nan])
def test_values_of_a_float64_switch(value: float) -> None:
    sample = make_switched(CASE.but(dtype=torch.float64), torch.float64)
    sample.switch[4] = value
    with pytest.raises(
        ValueError, match=rf"expected `switch` to hold zeros and ones, got {value:g} for channel 4\. Hint"
    ):
        ops.switched_conv2d(*sample.args)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("shape", [(2, 5, 7), (2, 4, 7, 8), (1, 5, 7, 8), (2, 5, 8, 7)])
def test_shape_of_the_result_gradient(shape: tuple[int, ...], device: str) -> None:
    sample = make_switched(CASE).to(device)
    args = (torch.zeros(shape, device=device), *sample.backward_args, True, [True] * 4)
    with pytest.raises(ValueError, match=r"switched_conv2d_backward\(\): expected `grad_output` to .*got"):
        ops.switched_conv2d_backward(*args)


def test_dtype_of_the_result_gradient() -> None:
    sample = make_switched(CASE)
    grad = torch.zeros(sample.output_shape, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"switched_conv2d_backward\(\): expected `grad_output` to .*got Double"):
        ops.switched_conv2d_backward(grad, *sample.backward_args, True, [True] * 4)


@pytest.mark.skipif(_C.unsupported_reason("native") is not None, reason="the native backend cannot run here")
def test_native_says_what_it_cannot_run() -> None:
    sample = make_switched(CASE.but(dtype=torch.float64))
    with pytest.raises(NotImplementedError, match=r"switched_conv2d\(\): expected a call that backend `native` .*Hint"):
        run_switched(sample, "native")


FUNCTION_WRONG = {
    "padding_word": ({"padding": "full"}, ValueError, "padding", "full"),
    "padding_same_strided": ({"padding": "same", "stride": 2}, ValueError, "stride", "(2, 2)"),
    "padding_negative": ({"padding": -1}, ValueError, "padding", "-1"),
    "padding_three": ({"padding": (1, 1, 1)}, ValueError, "padding", "(1, 1, 1)"),
    "stride_zero": ({"stride": 0}, ValueError, "stride", "0"),
    "stride_three": ({"stride": (1, 1, 1)}, ValueError, "stride", "3"),
    "dilation_zero": ({"dilation": (0, 1)}, ValueError, "dilation", "0, 1"),
    "groups": ({"groups": 3}, NotImplementedError, "groups", "3"),
}


@pytest.mark.parametrize("name", FUNCTION_WRONG)
def test_wrong_argument_of_the_function(name: str) -> None:
    kwargs, error, argument, got = FUNCTION_WRONG[name]
    sample = make_switched(CASE)
    with pytest.raises(error) as caught:
        bk.switched_conv2d(*sample.args[:4], **kwargs)
    assert_message(caught.value, "switched_conv2d", argument, "to ", got)


def test_failed_call_leaves_no_trace() -> None:
    sample = make_switched(CASE)
    before = ops.switched_conv2d(*sample.args)
    for wrong in WRONG.values():
        with pytest.raises(wrong.error):
            ops.switched_conv2d(*sample_with(wrong).args)
    assert torch.equal(ops.switched_conv2d(*sample.args), before)

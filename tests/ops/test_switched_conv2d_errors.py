"""Every invalid argument of the switched convolution raises, with argument, rule and value in the message."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import bap_kernels as bk
from bap_kernels import _C
from bap_kernels.testing import Case
from bap_kernels.testing_switched import SwitchedSample, make_switched, run_switched
from tests.ops.test_gathered_conv2d_errors import INVALID as GATHERED
from tests.ops.test_gathered_conv2d_errors import INVALID_FOR_FUNCTION, Invalid, assert_message, f32

ops = torch.ops.bap_kernels
CASE = Case(in_channels=6, out_channels=5, size=(7, 8))


def switch(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


INVALID = {
    **{name: case for name, case in GATHERED.items() if not case.depthwise and "index" not in case.argument},
    "switch_bool": Invalid("switch", f32(6).bool(), TypeError, "float32", "Bool"),
    "switch_double": Invalid("switch", f32(6).double(), TypeError, "float64 as the input is", "Double"),
    "switch_half": Invalid("switch", f32(6).half(), TypeError, "float32", "Half"),
    "switch_short": Invalid("switch", f32(5), ValueError, "(C_in,) = (6,)", "[5]"),
    "switch_long": Invalid("switch", f32(7), ValueError, "(C_in,) = (6,)", "[7]"),
    "switch_2d": Invalid("switch", f32(6, 1), ValueError, "(C_in,) = (6,)", "[6, 1]"),
    "switch_0d": Invalid("switch", f32(), ValueError, "(C_in,) = (6,)", "[]"),
    "switch_half_on": Invalid(
        "switch", switch(1, 0, 1, 0.5, 1, 2), ValueError, "zeros and ones", "0.5 for channel 3", on_meta=False
    ),
    "switch_negative": Invalid(
        "switch", switch(0, 0, 1, 0, 0, -1), ValueError, "zeros and ones", "-1 for channel 5", on_meta=False
    ),
    "switch_nan": Invalid(
        "switch", switch(float("nan"), 0, 1, 0, 1, 1), ValueError, "zeros and ones", "nan for channel 0", on_meta=False
    ),
    "switch_inf": Invalid(
        "switch", switch(1, float("inf"), 1, 0, 1, 1), ValueError, "zeros and ones", "inf for channel 1", on_meta=False
    ),
    # The largest value below 1: the result of a straight-through sum without brackets.
    "switch_rounded": Invalid(
        "switch", switch(1, 1 - 2**-24, 1, 0, 1, 1), ValueError, "zeros and ones", "0.99999994", on_meta=False
    ),
}


def sample_with(invalid: Invalid) -> SwitchedSample:
    sample = make_switched(CASE)
    setattr(sample, invalid.argument, invalid.value)
    return sample


def backward(sample: SwitchedSample) -> object:
    grad = torch.zeros(2, sample.weight.shape[0], 7, 8, device=sample.input.device)
    return ops.switched_conv2d_backward(grad, *sample.backward_args, True, [True] * 4)


CALLS: dict[str, Callable[[SwitchedSample], object]] = {
    "switched_conv2d": lambda s: ops.switched_conv2d(*s.args),
    "switched_conv2d_backward": backward,
}


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("name", INVALID)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_invalid_argument_raises(name: str, op: str, device: str) -> None:
    invalid = INVALID[name]
    if (device == "meta" and not invalid.on_meta) or (op == "switched_conv2d_backward" and not invalid.in_backward):
        return
    sample = sample_with(invalid).to(device)
    with pytest.raises(invalid.error) as error:
        CALLS[op](sample)
    assert_message(error.value, op, invalid.argument, invalid.rule, invalid.value_text)


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("argument", ["weight", "bias", "switch"])
def test_argument_on_other_device_raises(argument: str, op: str) -> None:
    if argument == "bias" and op == "switched_conv2d_backward":
        return
    sample = make_switched(CASE)
    setattr(sample, argument, getattr(sample, argument).to("meta"))
    with pytest.raises(ValueError) as error:
        CALLS[op](sample)
    assert_message(error.value, op, argument, "input's device", "meta")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_missing_switch_raises(device: str) -> None:
    sample = make_switched(CASE).to(device)
    with pytest.raises(TypeError, match=r"switched_conv2d\(\): expected `switch` to be a tensor, got None\. Hint"):
        bk.switched_conv2d(*sample.args[:3], None)


@pytest.mark.parametrize("value", [0.5, 2.0, -1.0, torch.nan])
def test_float64_switch_other_than_0_or_1_raises(value: float) -> None:
    sample = make_switched(CASE.but(dtype=torch.float64), torch.float64)
    sample.switch[4] = value
    with pytest.raises(
        ValueError, match=rf"expected `switch` to hold zeros and ones, got {value:g} for channel 4\. Hint"
    ):
        ops.switched_conv2d(*sample.args)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("shape", [(2, 5, 7), (2, 4, 7, 8), (1, 5, 7, 8), (2, 5, 8, 7)])
def test_grad_output_of_wrong_shape_raises(shape: tuple[int, ...], device: str) -> None:
    sample = make_switched(CASE).to(device)
    args = (torch.zeros(shape, device=device), *sample.backward_args, True, [True] * 4)
    with pytest.raises(ValueError, match=r"switched_conv2d_backward\(\): expected `grad_output` to .*got"):
        ops.switched_conv2d_backward(*args)


def test_grad_output_of_wrong_dtype_raises() -> None:
    sample = make_switched(CASE)
    grad = torch.zeros(sample.output_shape, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"switched_conv2d_backward\(\): expected `grad_output` to .*got Double"):
        ops.switched_conv2d_backward(grad, *sample.backward_args, True, [True] * 4)


@pytest.mark.skipif(_C.unsupported_reason("native") is not None, reason="the native backend cannot run here")
def test_native_unsupported_case_raises_with_reason() -> None:
    sample = make_switched(CASE.but(dtype=torch.float64))
    with pytest.raises(NotImplementedError, match=r"switched_conv2d\(\): expected a call that backend `native` .*Hint"):
        run_switched(sample, "native")


@pytest.mark.parametrize("name", [name for name in INVALID_FOR_FUNCTION if "index" not in name])
def test_invalid_argument_of_function_raises(name: str) -> None:
    kwargs, exception, argument, value_text = INVALID_FOR_FUNCTION[name]
    sample = make_switched(CASE)
    with pytest.raises(exception) as error:
        bk.switched_conv2d(*sample.args[:4], **kwargs)
    assert_message(error.value, "switched_conv2d", argument, "to ", value_text)


def test_failed_calls_do_not_change_later_results() -> None:
    sample = make_switched(CASE)
    before = ops.switched_conv2d(*sample.args)
    for invalid in INVALID.values():
        with pytest.raises(invalid.error):
            ops.switched_conv2d(*sample_with(invalid).args)
    assert torch.equal(ops.switched_conv2d(*sample.args), before)
